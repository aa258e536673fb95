"""``bagel-rt check``: it passes on right kernels, and no wrong, failing or fatal one goes unnoticed."""

import json
import math
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from typer.testing import CliRunner

from bagel_rt.check import run as check
from bagel_rt.check.cases import CASES, Values
from bagel_rt.cli import app
from bagel_rt.kernels.attention import attention_lse_reference, attention_reference
from bagel_rt.kernels.backend import backend, choose_backend
from bagel_rt.kernels.decode_attention import decode_attention_reference
from bagel_rt.kernels.linear import linear_reference
from bagel_rt.kernels.norm import rms_norm_reference
from bagel_rt.kernels.registry import OPS, implementation

ON_DEVICE = ("--device", "cuda" if torch.cuda.is_available() else "cpu")


def run(*args):
    return CliRunner().invoke(app, args)


def good(*args):
    result = run(*args)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def rows(output):
    """Parse (result, op) from every case line."""
    lines = (re.split(r" {2,}", line)[:2] for line in output.splitlines())
    return [line for line in lines if line[0] in ("pass", "FAIL", "not run")]


def ops_with_kernels():
    """Ops with a kernel on this machine; CUDA ops count only if the extension is built."""
    choose_backend("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {op for op in OPS if implementation(op, device) != "reference"}
    choose_backend(None)
    return found


def test_all_kernels_pass(monkeypatch):
    monkeypatch.delenv("BAGEL_RT_BACKEND", raising=False)
    report = json.loads(good("check", *ON_DEVICE, "--json"))
    cases = report.pop("cases")
    assert report["failed"] == 0 and report["table"].startswith("sm_")
    assert report["versions"]["torch"] == torch.__version__
    assert {case["op"] for case in cases} == ops_with_kernels()
    for case in cases:
        assert case["result"] == "pass" and 0 <= case["error"] <= case["allowed"] < 0.07, case
    assert {case["dtype"] for case in cases} == {"float32", "float16", "bfloat16"}
    assert backend() == "auto", "the backend override outlives the check"


def test_all_extension_kernels_pass(emulated_extension):
    ops = [op for op, kernel in OPS.items() if "cuda" in kernel]
    chosen = [word for op in ops for word in ("--op", op)]
    cases = json.loads(good("check", "--device", "cpu", "--json", *chosen))["cases"]
    assert {case["op"] for case in cases} == set(ops)
    assert all(case["result"] == "pass" for case in cases), cases


def test_table_ends_with_the_machine():
    output = good("check", *ON_DEVICE, "--op", "cfg_euler_step", "--op", "rms_norm")
    assert {op for _, op in rows(output)} == {"rms_norm", "cfg_euler_step"}
    *_, machine, versions = output.splitlines()
    assert f"\n{len(rows(output))} pass, 0 FAIL, 0 not run\n" in output
    assert ("\n2 cases skipped: the model's own sizes need a GPU" in output) == ("cpu" in ON_DEVICE)
    assert machine.endswith(", tile sizes of sm_90") or "cuda" in ON_DEVICE
    assert f"torch {torch.__version__}" in versions


def off_by_a_bit(x, w_first, w_rest, G, eps):
    return rms_norm_reference(x, None, w_first, w_rest, G, eps)[0] * (1 + 2**-5)


def nan_in_one_row(x, w_first, w_rest, G, eps):
    y, _ = rms_norm_reference(x, None, w_first, w_rest, G, eps)
    y[0] = torch.nan
    return y


def one_row_too_few(x, w_first, w_rest, G, eps):
    return x[1:]


def out_of_resources(x, w_first, w_rest, G, eps):
    raise RuntimeError("out of resource: shared memory\nRequired: 300000")


def does_not_compile(x, w_first, w_rest, G, eps):
    raise RuntimeError("at 3:4:\n    x = y\n        ^\nNameError('y is not defined')")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel, error, note",
    [
        (off_by_a_bit, "number", ""),
        (nan_in_one_row, "nan", ""),
        (one_row_too_few, "", "returned shape (6, 72), the reference (7, 72)"),
        (out_of_resources, "", "RuntimeError: out of resource: shared memory"),
        (does_not_compile, "", "RuntimeError: at 3:4: ... NameError('y is not defined')"),
    ],
)
def test_wrong_kernel_fails_and_the_others_still_run(kernel, error, note, monkeypatch):
    monkeypatch.setattr("bagel_rt.kernels.norm._rms_norm", kernel)
    chosen = ("check", *ON_DEVICE, "--op", "rms_norm", "--op", "cfg_euler_step")
    result = run(*chosen)
    assert (result.exit_code, result.stderr) == (1, "")
    for verdict, op in rows(result.stdout):
        assert verdict == ("FAIL" if op == "rms_norm" else "pass")
    assert note in result.stdout.splitlines()[1]
    cases = json.loads(run(*chosen, "--json").stdout)["cases"]
    assert [case["result"] == "fail" for case in cases] == [case["op"] == "rms_norm" for case in cases]
    assert (isinstance(cases[0]["error"], float)) == (error == "number")


def test_cases_after_a_sticky_error_are_not_run(monkeypatch):
    monkeypatch.setattr("bagel_rt.kernels.norm._rms_norm", out_of_resources)
    monkeypatch.setattr(check, "device_error", lambda device: "the GPU is lost")
    result = run("check", *ON_DEVICE)
    first, *others = rows(result.stdout)
    assert result.exit_code == 1 and first == ["FAIL", "rms_norm"]
    assert {verdict for verdict, _ in others} == {"not run"} and ": the GPU is lost\n" in result.stdout
    assert f"0 pass, 1 FAIL, {len(others)} not run" in result.stdout


def test_cpu_without_interpreter_suggests_triton_interpret():
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bagel_rt.cli", "check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"bagel-rt: error: --device must be an NVIDIA GPU .*TRITON_INTERPRET=1.*\n", done.stderr)
    assert "backend" not in done.stderr


def test_old_gpu_suggests_the_reference_backend(monkeypatch):
    def too_old(device):
        raise ValueError("GPU must be sm_80. Set BAGEL_RT_BACKEND=reference to run without them.")

    monkeypatch.setattr("bagel_rt.kernels.configs.architecture", too_old)
    result = run("check", *ON_DEVICE)
    assert (result.exit_code, result.stdout) == (2, "") and "BAGEL_RT_BACKEND=reference" in result.stderr


def test_rejects_unknown_op():
    result = run("check", "--op", "softmax")
    assert (result.exit_code, result.stdout) == (
        2,
        "",
    ) and "--op must be one of add_rms_norm, attention" in result.stderr


LARGE = [case for case in CASES if not case.interpreted and not re.search("gate and up|down|vocabulary", case.name)]


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case.op}: {case.name}")
def test_gpu_only_sizes_match_their_references(case):
    call, reference = case.build(Values(torch.device("cpu"), torch.bfloat16))
    assert check._error(call(), reference()) <= case.allowed(torch.bfloat16)


def drop_last_k(x, w_first, w_rest, *others):
    return linear_reference(x[:, :-64], w_first[:, :-64], w_rest[:, :-64], *others)


def drop_last_of_9064_keys(q, k, v, starts, lengths, scale):
    return decode_attention_reference(q, k, v, starts, lengths - 64, scale)


def drop_last_keys(q, k, v, limits, blocks, scale):
    blocks = blocks.clone()
    blocks[:, 6] = torch.maximum(blocks[:, 5], blocks[:, 6] - 32)  # where the second range of keys ends
    return attention_reference(q, k, v, limits, blocks, scale)


def drop_last_keys_in_lse(q, k, v, limits, blocks, scale):
    out, _ = attention_lse_reference(q, k, v, limits, blocks, scale)
    return out, attention_lse_reference(q, k, v, (limits - 32).clamp(min=1), blocks, scale)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, kernel, name",
    [
        ("linear._linear", drop_last_k, "BAGEL's qkv, one row"),
        ("linear._linear", drop_last_k, "BAGEL's o, "),
        ("decode_attention._decode_attention", drop_last_of_9064_keys, "length 9064"),
        ("attention._attention", drop_last_keys, "own span detached"),
        ("attention._attention_lse", drop_last_keys_in_lse, "own span detached"),
    ],
)
def test_kernel_that_drops_its_last_tile_fails(launcher, kernel, name, monkeypatch):
    module, function = launcher.split(".")
    monkeypatch.setattr(import_module(f"bagel_rt.kernels.{module}"), function, kernel)
    op = "attention_lse" if function.endswith("lse") else module
    [case] = [case for case in CASES if case.op == op and case.name.startswith(name)]
    result = check._check(case, torch.bfloat16, torch.device("cpu"))
    assert result.result == "FAIL" and result.error > 2 * result.allowed


@pytest.mark.parametrize(
    "actual, error",
    [
        pytest.param([[3e-3, 4e-3], [0.0, 0.0]], 0, id="equal, with a row of zeros"),
        pytest.param([[3e-3, 5e-3], [0.0, 0.0]], 1e-3 / (4e-3 + 12.5e-6**0.5), id="small values are judged as such"),
        pytest.param([[3e-3, 4e-3], [0.0, 1e-9]], math.inf, id="anything but zero where all is zero"),
        pytest.param([[3e-3, math.nan], [0.0, 0.0]], math.nan, id="nan"),
    ],
)
def test_errors_are_relative_to_the_row(actual, error):
    expected = torch.tensor([[3e-3, 4e-3], [0.0, 0.0]], dtype=torch.float64)
    found = check._error((torch.tensor(actual, dtype=torch.float64),), (expected,))
    assert found == pytest.approx(error, nan_ok=True)
