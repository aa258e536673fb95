"""Kernels of the shipped table compile without rule violations for each architecture, and violations are reported."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest

from bagel_rt.kernels import configs
from benchmarks import compiling
from benchmarks.compiling import DEVICE_LIMITS, Kernel, blocks_per_multiprocessor, run_in_processes
from benchmarks.inspect import merge, problems, unreached

pytest.importorskip("triton")

ARCHITECTURES = ("sm_80", "sm_90")
MATRIX_OPS = {"linear", "attention", "attention_dq", "attention_dk_dv"}
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448}
WIDE = ("float32", "wide dtype")  # classes whose dots do not use tensor cores


def run_inspect(*arguments, **environment):
    """Run ``python -m benchmarks.inspect`` without TRITON_INTERPRET."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "benchmarks.inspect", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parents[2], env=kept, capture_output=True, text=True)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES])
def report(request, tmp_path_factory):
    """JSON report of the shipped table for one architecture."""
    path = tmp_path_factory.mktemp("inspect") / "report.json"
    done = run_inspect("--arch", request.param, "--json", str(path))
    assert path.exists(), done.stdout + done.stderr
    return json.loads(path.read_text()) | {"architecture": request.param, "exit code": done.returncode}


def kernels_where(report, condition):
    """(op, class, kernel, tiles) of matching kernels, for readable assertion failures."""
    return [(k["op"], k["shape_class"], k["name"], k["tiles"]) for k in report["kernels"] if condition(k)]


def test_report_has_commit_and_versions(report):
    assert report["commit"] and "triton" in report["versions"]


def test_shipped_table_has_no_problems(report):
    assert [(k["op"], k["shape_class"], k["problems"]) for k in report["kernels"] if k["problems"]] == []
    assert report["exit code"] == 0


def test_every_class_of_the_table_is_compiled(report):
    assert report["unreached"] == {report["architecture"]: []}
    compiled = {(k["op"], k["shape_class"]) for k in report["kernels"] if not k["error"]}
    table = {op: architectures[report["architecture"]] for op, architectures in configs.TABLE.items()}
    assert compiled == {
        (op, name) for op, classes in table.items() for name, entry in classes.items() if entry["tiles"]
    }


def test_no_spills_and_shared_memory_fits(report):
    limit = SHARED_MEMORY[report["architecture"]]
    assert kernels_where(report, lambda k: k["spill_bytes"] or k["shared_bytes"] > limit) == []
    assert kernels_where(report, lambda k: not 0 < k["registers"] <= 255) == []
    assert kernels_where(report, lambda k: k["blocks_per_multiprocessor"] < 1) == []


def test_dots_are_detected_in_matrix_ops_only(report):
    assert {k["op"] for k in report["kernels"] if k["dots"]} == MATRIX_OPS


def test_dots_use_tensor_cores(report):
    in_16_bits = [k for k in report["kernels"] if k["dots"] and k["shape_class"] not in WIDE]
    large = [k for k in in_16_bits if min(rows for rows, *_ in k["dots"]) >= 64]
    assert {k["op"] for k in large} == MATRIX_OPS
    if report["architecture"] == "sm_80":
        assert [k for k in in_16_bits if not k["mma"]] == []
        assert kernels_where(report, lambda k: k["wgmma"] or k["tma_loads"]) == []
    else:
        assert [k for k in large if not k["wgmma"] or k["mma"]] == []
        assert kernels_where(report, lambda k: k["serialized"]) == []
        assert kernels_where(report, lambda k: k["dots"] and k["registers"] == 255) == []


def test_tma_loads_where_requested(report):
    def requests_tma(kernel):
        return any("host" in str(value) or "device" in str(value) for value in kernel["tiles"].values())

    requesting = [k for k in report["kernels"] if requests_tma(k)]
    assert (len(requesting) > 0) == (report["architecture"] == "sm_90")
    assert [k for k in requesting if not k["tma_loads"]] == []


def test_op_option_limits_the_report(tmp_path):
    path = tmp_path / "report.json"
    done = run_inspect("--arch", "sm_90", "--op", "rms_norm", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = json.loads(path.read_text())["kernels"]
    assert {k["op"] for k in kernels} == {"rms_norm"} and not any(k["problems"] for k in kernels)


@pytest.mark.slow
def test_bad_tiles_are_reported(tmp_path):
    table = deepcopy(configs.TABLE)
    linear = table["linear"]["sm_90"]
    linear["many bias"]["tiles"] |= {"num_warps": 4}  # the accumulator needs the registers of 8 warps
    linear["many residual"]["tiles"] |= {"num_stages": 5}
    linear["some bias"]["tiles"] |= {"BLOCK_N": 48}
    (tmp_path / "table.json").write_text(json.dumps(table))
    path = tmp_path / "report.json"
    options = ["--arch", "sm_90", "--op", "linear", "--table", str(tmp_path / "table.json"), "--json", str(path)]
    done = run_inspect(*options)
    result = {}
    for kernel in json.loads(path.read_text())["kernels"]:
        result.setdefault(kernel["shape_class"], []).extend(kernel["problems"])
    assert done.returncode == 1
    assert any("spills" in problem for problem in result["many bias"])
    assert any("255 registers" in problem for problem in result["many bias"])
    assert any("launch would fail" in problem for problem in result["many residual"])
    assert any("power of 2" in problem for problem in result["some bias"])
    assert result["some residual"] == []


def test_alignment_of_the_slot_does_not_specialize_the_kernel():
    """A token's slot is a one-element view whose address is 16-byte aligned for every second token only."""
    code = """
import torch
from bagel_rt.kernels import qk_norm_rope
from benchmarks.compiling import intercept_launches

row, table, cache = torch.empty(1, 36 * 128).bfloat16(), torch.empty(1, 64), torch.empty(8, 4, 128).bfloat16()
norm, slots, variants = torch.empty(32, 128).bfloat16(), torch.arange(8), set()
with intercept_launches("sm_90", lambda entry, compile_kernel: variants.add(compile_kernel().hash)):
    for token in range(3):
        qk_norm_rope(row, norm, norm, table, table, slots[token : token + 1], cache, cache, 0, 1e-6)
print(len(variants))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    where = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=where, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1"], done.stderr


def test_rejects_the_interpreter():
    done = run_inspect(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET must be unset" in done.stderr


def kernel(architecture="sm_90", **facts):
    entry = {"op": "linear", "shape_class": "many bias", "tiles": {"DESCRIPTORS": "host"}, "workloads": ["a"]}
    good = {"dots": [(128, 256, 64, "bf16")], "registers": 168, "wgmma": 4, "tma_loads": 6, "cp_async": 2}
    return Kernel(architecture, **(entry | good | facts))


@pytest.mark.parametrize(
    "facts, problem",
    [
        ({}, None),
        ({"error": "CompilationError: no"}, "CompilationError: no"),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 232_448}, None),
        ({"shared_bytes": 232_449}, "launch would fail"),
        ({"serialized": 1}, "1 wgmma are serialized"),
        ({"registers": 254}, None),
        ({"registers": 255}, "all 255 registers"),
        ({"registers": 255, "dots": []}, None),
        ({"wgmma": 0}, "without wgmma"),
        ({"mma": 16}, "16 mma.sync"),
        ({"dots": [(16, 32, 64, "bf16")], "wgmma": 0, "mma": 16}, None),
        ({"dots": [(128, 256, 64, "f32")], "wgmma": 0}, None),
        ({"tma_loads": 0}, "no TMA load"),
        ({"tma_loads": 0, "tiles": {"LOADS": "device descriptors"}}, "no TMA load"),
        ({"tma_loads": 0, "tiles": {"DESCRIPTORS": "none"}}, None),
        ({"tma_loads": 0, "cp_async": 0, "tiles": {"DESCRIPTORS": "none"}}, "without pipelined loads"),
        ({"tma_loads": 0, "cp_async": 0, "tiles": {"DESCRIPTORS": "none"}, "shape_class": "unaligned"}, None),
        ({"tiles": {"TMA_STORE": True}}, "no TMA store"),
        ({"architecture": "sm_80", "mma": 0, "wgmma": 0}, "without mma.sync"),
        ({"architecture": "sm_80", "mma": 64, "registers": 255}, None),
        ({"architecture": "sm_80", "mma": 64, "shared_bytes": 200_000}, "launch would fail"),
        ({"architecture": "sm_100", "tcgen05": 0}, "without tcgen05"),
    ],
)
def test_problems(facts, problem):
    result = problems(kernel(**facts))
    assert (result == []) if problem is None else (len(result) == 1 and problem in result[0])


@pytest.mark.parametrize(
    "architecture, registers, shared_bytes, warps, blocks",
    [
        pytest.param("sm_90", 168, 213_464, 12, 1, id="one block by shared memory"),
        pytest.param("sm_90", 168, 0, 8, 1, id="one block by registers"),
        pytest.param("sm_90", 128, 0, 8, 2, id="two blocks by registers"),
        pytest.param("sm_80", 33, 0, 4, 12, id="33 registers are rounded up to 40"),
        pytest.param("sm_80", 32, 81 << 10, 4, 2, id="1 KiB reserved per block"),
        pytest.param("sm_89", 16, 0, 4, 12, id="warps of sm_89"),
        pytest.param("sm_89", 16, 0, 1, 24, id="blocks of sm_89"),
        pytest.param("sm_90", 32, 0, 4, 16, id="warps of sm_90"),
    ],
)
def test_blocks_per_multiprocessor(architecture, registers, shared_bytes, warps, blocks):
    assert blocks_per_multiprocessor(architecture, registers, shared_bytes, warps) == blocks


def test_crash_of_a_job_is_reported():
    results = dict(run_in_processes(die_or_double, [(1,), (0,), (2,)], workers=2))
    assert results[(1,)] == 2 and results[(2,)] == 4
    assert isinstance(results[(0,)], ChildProcessError) and "exited with code 7" in str(results[(0,)])


def die_or_double(number):
    return 2 * number or os._exit(7)


def test_exception_and_timeout_of_a_job_are_reported(monkeypatch):
    monkeypatch.setattr(compiling, "JOB_TIMEOUT", 0.5)
    results = dict(run_in_processes(sleep_or_raise, [(0,), (60,), (-1,), (0.1,)], workers=2))
    assert results[(0,)] == 0 and results[(0.1,)] == 0.1
    assert isinstance(results[(60,)], ChildProcessError) and "compilation exceeded" in str(results[(60,)])
    assert isinstance(results[(-1,)], ChildProcessError) and "ValueError: sleep length" in str(results[(-1,)])
    assert multiprocessing.active_children() == []


def test_deadline_terminates_running_jobs_and_starts_no_others():
    results = list(run_in_processes(sleep_or_raise, [(0,), (60,), (61,), (0.1,)], 2, time.monotonic() + 1))
    assert results[0] == ((0,), 0) and [job for job, _ in results[1:]] == [(60,), (61,)]
    assert {str(result) for _, result in results[1:]} == {"time limit reached"}
    assert multiprocessing.active_children() == []


def sleep_or_raise(seconds):
    time.sleep(seconds)
    return seconds


def test_timeout_kills_children_of_a_job(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "JOB_TIMEOUT", 1.0)
    [(_, result)] = run_in_processes(run_for_a_minute, [(tmp_path / "process",)], workers=1)
    assert isinstance(result, ChildProcessError)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "process").read_text()), 0)


def run_for_a_minute(path):
    subprocess.run(["sh", "-c", 'echo $$ > "$0"; exec sleep 60', str(path)])


def test_merge_combines_equal_kernels_of_a_class():
    first, second, other = kernel(workloads=["b"]), kernel(workloads=["a"]), kernel(hash="other", workloads=["c"])
    assert sorted(k.workloads for k in merge([first, second, other])) == [["a", "b"], ["c"]]


def test_unreached_lists_classes_without_workload(monkeypatch):
    entry, torch_is_faster = {"tiles": {"ROWS": 1}, "source": ""}, {"tiles": None, "source": ""}
    table = {"linear": {"sm_90": {"many bias": entry, "few bias": entry, "some bias": torch_is_faster}}}
    monkeypatch.setattr(configs, "TABLE", table)
    assert unreached("sm_90", [kernel(), kernel("sm_80", shape_class="few bias")]) == ["linear few bias"]


def test_limits_cover_the_architectures_of_the_table():
    assert list(DEVICE_LIMITS) == list(configs.ARCHITECTURES)
    assert {name: DEVICE_LIMITS[name].shared_per_block for name in SHARED_MEMORY} == SHARED_MEMORY
