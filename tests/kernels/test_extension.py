"""The compiled extension: what its kernels take on a GPU, that the emulation proves what it claims, who is served."""

import os
import re
import shutil
import subprocess
import sys

import cuda_on_host
import pytest
import torch

from bagel_rt.check import run as check
from bagel_rt.kernels import decode_attention, decode_linear, decode_qkv, extension, sample
from bagel_rt.kernels.backend import choose_backend

SOURCES = sorted(path.name for path in (cuda_on_host.ROOT / "csrc").glob("*.cu"))
SHARED_MEMORY = 48 * 1024  # of a block, without asking
CPU = torch.device("cpu")


def nvcc_options():
    """Options for all architectures of the extension that this CUDA compiler supports."""
    listed = subprocess.run(["nvcc", "--list-gpu-code"], stdout=subprocess.PIPE, text=True).stdout.split()
    known = [name for name in ("80", "90a", "100", "120") if f"sm_{name.rstrip('a')}" in listed]
    return [f"-gencode=arch=compute_{name},code=sm_{name}" for name in known]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler here")
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_do_not_spill_registers(source, tmp_path):
    """No spills, no local memory, no compiler warning."""
    options = nvcc_options()
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra", "-Werror", "all-warnings",
         *options, "--threads", "2", "-c", source, "-o", tmp_path / "kernels.o"],
        cwd=cuda_on_host.ROOT / "csrc", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    parts = re.split(r"Compiling entry function '(\w+)' for '(\w+)'", done.stdout)[1:]
    kernels = list(zip(parts[::3], parts[1::3], parts[2::3], strict=True))
    assert len({architecture for _, architecture, _ in kernels}) == len(options) > 0
    for name, architecture, log in kernels:
        found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert found and set(found.groups()) == {"0"}, f"{name} for {architecture}: {log}"
        assert " lmem" not in log, f"{name} for {architecture}: {log}"
        shared = re.search(r"(\d+) bytes smem", log)
        assert shared is None or int(shared[1]) <= SHARED_MEMORY, f"{name} for {architecture}: {log}"


TRIAL = """
#include "device.h"
using namespace bagel_rt;

template <class T>
__global__ void trial(int what, T* y) {
  DYNAMIC_SHARED(float, shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % WARP;
  if (what == 0) {  // every block sums the values of its threads; the last block, the sums of all blocks
    shared[thread] = static_cast<float>(thread + blockIdx.x * blockDim.x);
    __syncthreads();
    const float sum = warp_sum(shared[blockDim.x - 1 - thread]), most = warp_max(shared[thread], 8);
    if (thread % 8 == 0 && most != shared[thread + 7]) y[0] = from_float<T>(-1);
    __syncthreads();
    if (lane == 0) shared[thread / WARP] = sum;
    __syncthreads();
    if (thread == 0) y[1 + blockIdx.x] = from_float<T>(shared[0] + shared[1]);
    if (is_last_block(reinterpret_cast<int*>(y + 15), gridDim.x) && thread == 0) {
      float all = 0;
      for (unsigned b = 0; b < gridDim.x; ++b) all += to_float(load_from_l2(y + 1 + b));
      y[0] = from_float<T>(all);
    }
  }
  if (what == 1 && thread < 40) __syncthreads();
  if (what == 2 && lane != 3) warp_sum(1.0f);
  if (what == 3 && lane == 3) __shfl_sync(0xfu, 1.0f, 9);
  if (what == 4 && thread == 0) load_vector(y + 1);
  if (what == 5 && thread == 0) y[0] = from_float<T>(shared[0] == shared[0] ? 1.0f : 2.0f);
  if (what == 8) {
    const float before = to_float(y[12]);
    wait_for_previous_kernel();
    if (before != before) atomicAdd(y, y[12]);
  }
  if (what == 6 && thread == 5) y[blockDim.x] = from_float<T>(shared[100000]);
}

int main(int, char** argv) {
  alignas(16) float y[16] = {};
  const int what = argv[1][0] - '0';
  cuda_on_host::schedule = static_cast<unsigned>(argv[1][1] - '0');
  y[12] = 5;
  if (what >= 8) cuda_on_host::pending_writes = {{y + 12, 4}, {y + 8, 32}};
  try {
    with_context([&] { return format_string("trial %d", what); },
                 [&] { launch(trial<float>, 3, 64, what == 7 ? 300000 : 256, 0, what, y); });
  } catch (const std::runtime_error& error) {
    std::printf("%s", error.what());
    return 0;
  }
  std::printf("%g %g", y[0], y[15]);
}
"""


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """Compile the kernel above; return a function that runs one case and returns its output."""
    if not shutil.which("g++"):
        pytest.skip("no g++ here")
    folder = tmp_path_factory.mktemp("trial")
    (folder / "trial.cu").write_text(TRIAL)
    include = [f"-I{cuda_on_host.ROOT / part}" for part in ("csrc", "tests/cuda_on_host")]
    options = ["-std=c++17", "-O1", "-x", "c++", "-Wno-unknown-pragmas", *include]
    subprocess.run(["g++", *options, "trial.cu", "-o", "trial"], cwd=folder, check=True)
    return lambda case: subprocess.run([folder / "trial", case], capture_output=True, text=True).stdout


@pytest.mark.parametrize("schedule", "012")
def test_emulation_runs_barriers_shuffles_and_last_block(trial, schedule):
    assert trial("0" + schedule) == f"{sum(range(192))} 0"


@pytest.mark.parametrize(
    "case, error",
    [
        pytest.param("1", "deadlock: threads wait at a barrier or shuffle that others never reach", id="barrier"),
        pytest.param("2", "deadlock: threads wait at a barrier or shuffle that others never reach", id="shuffle"),
        pytest.param("3", "deadlock: threads wait at a barrier or shuffle that others never reach", id="mask"),
        pytest.param("4", "misaligned vector: the address must be a multiple of its size", id="alignment"),
        pytest.param("7", "too much shared memory", id="shared-memory"),
        pytest.param("9", "a block did not call wait_for_previous_kernel()", id="no-wait"),
    ],
)
def test_emulation_rejects_undefined_behavior(trial, case, error):
    assert trial(case + "0") == f"trial {case}: {error}"


def test_emulation_starts_with_nan_in_shared_memory(trial):
    assert trial("50") == "2 0"


def test_emulation_hides_pending_writes_until_the_wait(trial):
    """Only the first thread of each of the three blocks reads before its block has waited; the others read 5."""
    assert (trial("80"), trial("81")) == ("15 0", "15 0")


def test_failed_launch_reports_kernel_and_shapes(emulated_extension):
    x, w = torch.zeros(1, 64), torch.zeros(4, 64)
    product = emulated_extension.GemvArgs(False, x.data_ptr() + 4, 0, w.data_ptr(), 64, 64, 1, 64, 4, 1e-6)
    with pytest.raises(RuntimeError, match=r"decode_linear of \[1, 64\] by \[4, 64\]: misaligned vector"):
        emulated_extension.decode_linear(product, 0, False, w.data_ptr(), 0)


def test_rejects_more_rows_than_supported(emulated_extension):
    with pytest.raises(RuntimeError, match="rows must be at most 8, got 9"):
        emulated_extension.norm_shared_bytes(emulated_extension.GemvArgs(True, 0, 16, 0, 64, 64, 9, 64, 4, 1e-6))


def test_check_covers_the_emulated_kernels(emulated_extension, monkeypatch):
    cases = check.choose_cases(["decode_linear", "decode_qkv"])
    results = list(check.run(CPU, cases))
    assert {result.op for result in results} == {"decode_linear", "decode_qkv"}
    assert {result.result for result in results} == {"pass"}
    wrong = emulated_extension.decode_linear

    def doubled(product, residual, swiglu, y, stream):
        wrong(product, 0, swiglu, y, stream)  # drops the residual

    class Wrong:
        decode_linear = staticmethod(doubled)

        def __getattr__(self, name):
            return getattr(emulated_extension, name)

    monkeypatch.setattr(extension, "EXTENSION", Wrong())
    results = {result.case: result.result for result in check.run(CPU, check.choose_cases(["decode_linear"]))}
    assert results["8 rows with residual, 72 to 17"] == "FAIL"
    assert list(results.values()).count("FAIL") == 1


def test_check_skips_cuda_ops_without_an_extension(monkeypatch):
    monkeypatch.setattr(extension, "EXTENSION", None)
    assert list(check.run(CPU, check.choose_cases(["decode_linear", "decode_qkv"]))) == []


def test_runs_extension_by_dtype_gradient_device_and_backend(emulated_extension, monkeypatch):
    x = torch.zeros(2)
    assert extension.runs_extension(x) and extension.runs_extension(x.bfloat16(), None, x)
    assert not extension.runs_extension(x.half()) and not extension.runs_extension(x.double())
    assert not extension.runs_extension(x, torch.zeros(2, requires_grad=True))
    with torch.no_grad():
        assert extension.runs_extension(x, torch.zeros(2, requires_grad=True))
    assert not extension.runs_extension(torch.zeros(2, device="meta"))
    for choice in ("reference", "auto"):
        choose_backend(choice)
        assert not extension.runs_extension(x)
    choose_backend("triton")
    monkeypatch.setattr(extension, "EXTENSION", object())  # an older build with the planner only
    assert not extension.runs_extension(x)
    monkeypatch.setattr(extension, "EXTENSION", None)
    assert not extension.runs_extension(x)


def test_cuda_error_explains_missing_kernels(monkeypatch):
    monkeypatch.setattr(extension, "EXTENSION", None)
    monkeypatch.setattr(extension, "EXTENSION_ERROR", "no compiler\n")
    assert extension.cuda_error() == "no compiler"
    monkeypatch.setattr(extension, "EXTENSION", object())
    monkeypatch.setattr(extension, "_build_log", lambda: "")
    assert extension.cuda_error() == "it was built without a CUDA compiler"
    monkeypatch.setattr(extension, "_build_log", lambda: "nvcc is broken\n")
    assert extension.cuda_error() == "nvcc is broken"


def test_counters_are_allocated_once_and_limited():
    x = torch.zeros(1)
    first = extension.counters(x, 4)
    assert first.data_ptr() == extension.counters(x, extension.COUNTERS).data_ptr() and first.dtype == torch.int32
    assert len(first) == extension.COUNTERS and not first.any()
    with pytest.raises(ValueError, match="number of counters must be at most 4096, got 4097"):
        extension.counters(x, 4097)


def test_each_stream_has_its_own_counters(monkeypatch):
    x, seen = torch.zeros(1), {}
    for handle in 2 * list(range(extension.STREAMS)):
        monkeypatch.setattr(extension, "stream", lambda _, handle=handle: handle)
        address = extension.counters(x, 1).data_ptr()
        assert seen.setdefault(handle, address) == address
    assert len(set(seen.values())) == extension.STREAMS
    monkeypatch.setattr(extension, "stream", lambda _: extension.STREAMS)
    assert extension.counters(x, 1).data_ptr() in seen.values()


class Calls:
    """A call of each kernel on tensors placed in memory by ``place``; each method returns the outputs."""

    def __init__(self, place=lambda tensor: tensor):
        generator = torch.Generator().manual_seed(3)

        def values(*shape):
            return torch.randn(*shape, generator=generator).bfloat16()

        self.norm, self.bias, self.qk_norm = values(136), values(64), values(3, 16)
        self.x, self.w, self.q, self.residual = (place(values(3, *row)) for row in ((136,), (136,), (2, 16), (3,)))
        self.k_cache, self.v_cache, self.logits = (place(values(3, *row)) for row in ((1, 16), (1, 16), (9000,)))
        self.wide, self.cos, self.sin = values(64, 136), *values(2, 3, 8).float()
        self.slots, self.starts, self.lengths = torch.tensor([[2, 0, 1], [0, 2, 1], [3, 1, 0]])
        self.settings = torch.tensor([[0.0, 0, 1], [1, 0, 0.5], [1, 9, 1]])
        self.counters = extension.counters(self.x, extension.COUNTERS)

    def decode_linear(self):
        return [decode_linear(self.x, self.w, norm=self.norm, residual=self.residual)]

    def decode_qkv(self):
        tables, caches = (self.cos, self.sin), (self.k_cache, self.v_cache)
        q = decode_qkv(self.x, self.norm, self.wide, self.bias, self.qk_norm, *tables, self.slots, *caches, 1e-6)
        return [q, *(cache.clone() for cache in caches)]

    def decode_attention(self):
        return [decode_attention(self.q, self.k_cache, self.v_cache, self.starts, self.lengths)]

    def sample(self):
        return [sample(self.logits, self.settings, self.slots, self.starts), sample(self.logits)]


KERNELS = ("decode_linear", "decode_qkv", "decode_attention", "sample")


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_waits_before_it_accesses_written_memory(emulated_extension, name):
    calls = Calls()
    run, weights = getattr(calls, name), ("w", "wide", "norm", "bias", "qk_norm")
    expected = run()
    written = [tensor for key, tensor in vars(calls).items() if key not in weights]
    try:
        emulated_extension.set_pending_writes([(tensor.data_ptr(), tensor.nbytes) for tensor in written])
        for seed in range(3):
            emulated_extension.set_schedule(seed)
            assert all(map(torch.equal, run(), expected))
    finally:
        emulated_extension.set_pending_writes([])


@pytest.mark.parametrize("name", KERNELS)
def test_row_strides_above_32_bits(emulated_extension, tmp_path, name):
    """Uses a sparse file, of which only the rows take disk space."""
    apart, used = 2**30 + 64, 0
    mapped = torch.from_file(str(tmp_path / "mapped"), shared=True, size=3 * apart, dtype=torch.bfloat16)

    def place(tensor):
        nonlocal used
        placed = mapped.as_strided(tensor.shape, (apart, *tensor.stride()[1:]), used)
        used += tensor[0].numel() + -tensor[0].numel() % 8
        return placed.copy_(tensor)

    far, near = Calls(place), Calls()
    assert all(map(torch.equal, getattr(far, name)(), getattr(near, name)()))


SANITIZED = """
import sys
from pathlib import Path
import torch
import cuda_on_host
from bagel_rt.kernels import backend, decode_attention, decode_linear, decode_qkv, extension, sample
extension.EXTENSION = cuda_on_host.load(Path(sys.argv[1]))
backend.choose_backend("triton")
for dtype in (torch.float32, torch.bfloat16):
    for B, K, N in ((1, 8, 2), (3, 264, 49), (8, 1032, 18)):
        x, w, residual = torch.randn(B, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(B, N).to(dtype)
        decode_linear(x, w, norm=w[0], residual=residual)
        decode_linear(x, w, residual=residual)
        decode_linear(x, w[: N // 2 * 2], norm=w[0], swiglu=True)
        shapes = (128, K), (128,), (3, 32), (2, B, 1, 32)
        w, bias, qk_norm, caches = (torch.randn(*shape).to(dtype) for shape in shapes)
        tables = torch.randn(2, B, 16)
        decode_qkv(x, w[0], w, bias, qk_norm, *tables, torch.arange(B), *caches, 1e-6)
    q, keys = torch.randn(2, 7, 16).to(dtype), torch.randn(2, 150, 1, 16).to(dtype)
    bounds = torch.tensor([[0, 7], [150, 3]])
    decode_attention(q, *keys, *bounds)
    sample(torch.randn(2, 4099).to(dtype)[:, 1:], torch.tensor([[0.0, 0, 1], [1, 9, 0.5]]), *bounds)
print("right")
sys.stdout.flush()
x, w, y = torch.randn(1, 64), torch.randn(4, 64), torch.randn(1, 8)
wrong = extension.EXTENSION.GemvArgs(False, x.data_ptr(), 0, w.data_ptr(), 64, 64, 1, 64, 8, 1e-6)  # w has 4 rows
extension.EXTENSION.decode_linear(wrong, 0, False, y.data_ptr(), 0)
print("not reached")
"""


@pytest.mark.slow
def test_kernels_stay_in_bounds_under_address_sanitizer():
    """Valid calls pass under -fsanitize=address; a call that reads past the end of a tensor aborts."""
    found = [
        subprocess.run([shutil.which("g++") or "false", f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libstdc++.so")
    ]
    preloaded = [one.stdout.strip() for one in found]
    if not all(map(os.path.isabs, preloaded)):
        pytest.skip("g++ has no sanitizer here")
    module = cuda_on_host.build("-DBAGEL_RT_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_COMPILER=g++")
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(module)], cwd=cuda_on_host.ROOT / "tests", capture_output=True, text=True,
        env=os.environ | {"LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0",
                          "PYTHONPATH": os.pathsep.join([str(cuda_on_host.ROOT), str(cuda_on_host.ROOT / "tests")])},
    )  # fmt: skip
    assert done.stdout == "right\n" and done.returncode != 0, done.stderr
    assert "heap-buffer-overflow" in done.stderr
