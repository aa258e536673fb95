"""Backend selection and the reported implementation of each op."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from bagel_rt import Bagel
from bagel_rt.kernels import configs, linear, rms_norm
from bagel_rt.kernels.backend import backend, check_backend, check_devices, choose_backend, runs_kernel
from bagel_rt.kernels.registry import OPS, implementation

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def left_to_the_environment(monkeypatch):
    monkeypatch.delenv("BAGEL_RT_BACKEND", raising=False)
    yield
    choose_backend(None)


def python(code, **environment):
    """Run ``code`` in a subprocess; an environment value of None removes the variable."""
    merged = {name: value for name, value in (os.environ | environment).items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], env=merged, capture_output=True, text=True, timeout=300)


def test_cpu_runs_references_unless_backend_is_triton(monkeypatch):
    x = torch.zeros(1)
    for choice in ("auto", "reference"):
        monkeypatch.setenv("BAGEL_RT_BACKEND", choice)
        assert backend() == choice and not runs_kernel(x)
    monkeypatch.setenv("BAGEL_RT_BACKEND", "triton")
    assert runs_kernel(x) and not runs_kernel(x.double())
    found = {op: implementation(op, CPU) for op in OPS}
    assert {op for op in OPS if found[op] == "reference"} == {"decode_linear", "decode_qkv", "sample"}
    assert set(found.values()) == {"triton", "reference"}, "no CUDA kernel runs on a CPU"


def test_extension_takes_precedence_over_triton(emulated_extension):
    assert {op for op in OPS if implementation(op, CPU) == "cuda"} == {op for op in OPS if "cuda" in OPS[op]}
    assert implementation("linear", CPU) == "triton"
    choose_backend("reference")
    assert {implementation(op, CPU) for op in OPS} == {"reference"}


def test_tensors_that_require_a_gradient_run_the_reference():
    choose_backend("triton")
    weight = torch.ones(8, requires_grad=True)
    x = torch.randn(3, 8)
    rms_norm(x, None, weight, weight, 0, 1e-6)[0].sum().backward()
    assert weight.grad is not None
    square = torch.ones(8, 8, requires_grad=True)
    assert linear(x, square, square, G=0).requires_grad
    with torch.no_grad():
        assert runs_kernel(x, square) and not linear(x, square, square, G=0).requires_grad


def test_rejects_tensor_on_another_device():
    x = torch.zeros(1)
    check_devices("sum", x=x, w=x, bias=None)
    with pytest.raises(ValueError, match="sum: w must be on cpu like x, got meta"):
        check_devices("sum", x=x, bias=None, w=x.to("meta"))


def test_rejects_unknown_backend(monkeypatch):
    monkeypatch.setenv("BAGEL_RT_BACKEND", "cuda")
    with pytest.raises(ValueError, match="BAGEL_RT_BACKEND must be 'auto', 'reference' or 'triton', got 'cuda'"):
        backend()
    with pytest.raises(ValueError, match="backend must be 'auto', 'reference' or 'triton', got 'fast'"):
        choose_backend("fast")


def test_choose_backend_overrides_the_environment(monkeypatch):
    monkeypatch.setenv("BAGEL_RT_BACKEND", "cuda")
    choose_backend("reference")
    assert backend() == "reference"
    choose_backend(None)
    with pytest.raises(ValueError, match="BAGEL_RT_BACKEND must be .* got 'cuda'"):
        backend()


def test_failed_load_leaves_the_backend_unchanged():
    choose_backend("reference")
    with pytest.raises(ValueError, match="backend must be .* got 'fast'"):
        Bagel.from_pretrained(device="cpu", backend="fast")
    assert backend() == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_backend_triton_on_a_cpu_needs_the_interpreter():
    check_backend(CPU, "triton")  # these tests run with it
    code = "from bagel_rt import Bagel; Bagel.from_pretrained(device='cpu', backend='triton')"
    done = python(code, TRITON_INTERPRET=None)
    assert "device must be cuda for backend 'triton', got cpu" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def test_references_run_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, bagel_rt.kernels as kernels
from bagel_rt.kernels.backend import check_backend
from bagel_rt.kernels.registry import implementation
x, w = torch.ones(2, 4), torch.ones(3, 4)
print(kernels.linear(x, w, 2 * w, G=1)[:, 0].tolist(), implementation("linear", torch.device("cpu")))
try:
    check_backend(torch.device("cpu"), "triton")
except ValueError as error:
    print(error)
"""
    computed, refused = python(code).stdout.splitlines()
    assert computed == "[4.0, 8.0] reference"
    assert refused == "backend 'triton' needs the triton package, which is not installed. It is Linux only."


def test_kernels_import_as_a_standalone_package(tmp_path):
    shutil.copytree(configs.PATH.parent, tmp_path / "alone", ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import sys, torch, alone
print(alone.linear(torch.ones(1, 4), torch.ones(1, 4)).item(), any(name.startswith("bagel_rt") for name in sys.modules))
"""
    assert python(code, PYTHONPATH=str(tmp_path)).stdout == "4.0 False\n"


def test_info_lists_the_implementation_of_each_op():
    code = "from bagel_rt.cli import app; app(['info', '--json'])"
    for choice in ("triton", "reference"):
        report = json.loads(python(code, BAGEL_RT_BACKEND=choice).stdout)
        choose_backend(choice)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        assert report["ops"] == {op: implementation(op, device) for op in OPS}
        assert (report["ops"]["linear"], set(report["ops"]) - set(OPS)) == (choice, set())
