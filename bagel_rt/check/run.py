"""``bagel-rt check``: compare every kernel with its float64 reference on small inputs."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from bagel_rt.check.case import Case, Outputs, Values
from bagel_rt.check.cases import CASES
from bagel_rt.check.info import versions
from bagel_rt.kernels import configs
from bagel_rt.kernels.backend import check_backend, choose_backend
from bagel_rt.kernels.registry import OPS, implementation
from bagel_rt.kernels.triton_language import INTERPRETED


@dataclass(frozen=True)
class Result:
    """Result of a case in one dtype.

    Attributes:
        error: maximum |actual - expected| / (|expected| + rms of its row); None if nothing was computed.
        allowed: maximum error that passes.
        result: "pass", "FAIL" or "not run".
        note: the reason, if ``error`` is None.
    """

    op: str
    case: str
    dtype: str
    error: float | None
    allowed: float
    result: str
    note: str = ""


def choose_cases(ops: Sequence[str] | None = None) -> list[Case]:
    """Select the cases of some ops, by default of all.

    Raises:
        ValueError: a name is not an op.
    """
    for op in ops or ():
        if op not in OPS:
            raise ValueError(f"--op must be one of {', '.join(sorted(OPS))}, got {op!r}.")
    return [case for case in CASES if case.op in (ops or OPS)]


def run(device: torch.device, cases: Sequence[Case] | None = None) -> Iterator[Result]:
    """Run cases, by default all, with kernels on ``device``; yield one result per case and dtype.

    A CPU runs only cases that are small enough for the interpreter. Ops with a CUDA kernel run only if the extension
    supports this device. After a sticky CUDA error, which makes the GPU unusable for this process, the remaining cases
    are "not run".

    Raises:
        ValueError: no kernel runs on this device: an old GPU, or a CPU without the interpreter.
    """
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"device must be an NVIDIA GPU to check kernels, got {device}. Install a CUDA build of PyTorch and a "
            "driver, or check small cases in Triton's interpreter: TRITON_INTERPRET=1 bagel-rt check --device cpu"
        )
    check_backend(device, "triton")
    configs.architecture(device)
    return _run(device, CASES if cases is None else cases)


def _run(device: torch.device, cases: Sequence[Case]) -> Iterator[Result]:
    device_lost = ""
    choose_backend("triton")
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            has_kernel = {op: implementation(op, device) != "reference" for op in OPS}
        for case in cases:
            runs = has_kernel[case.op] and (case.interpreted or device.type == "cuda")
            for dtype in case.dtypes if runs else ():
                result = _result(case, dtype, note=device_lost) if device_lost else _check(case, dtype, device)
                device_lost = device_lost or (result.note and device_error(device))
                yield result
    finally:
        choose_backend(None)


def _result(
    case: Case, dtype: torch.dtype, error: float | None = None, result: str = "not run", note: str = ""
) -> Result:
    name = str(dtype).removeprefix("torch.")
    return Result(case.op, case.name, name, error, case.allowed(dtype), result, note)


def _check(case: Case, dtype: torch.dtype, device: torch.device) -> Result:
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            call, reference = case.build(Values(device, dtype))
            error = _error(call(), reference())
    except Exception as problem:  # compiler and driver errors are results too
        return _result(case, dtype, None, "FAIL", _reason(problem))
    return _result(case, dtype, error, "pass" if error <= case.allowed(dtype) else "FAIL")


def _error(actual: Outputs, expected: Outputs) -> float:
    """Maximum error over all outputs; nan if ``actual`` contains one.

    Errors are relative to the scale of the row, since outputs may be small: attention over many keys averages them out,
    and an absolute error would accept wrong results.
    """
    errors = []
    for one, other in zip(actual, expected, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"the kernel returned shape {tuple(one.shape)}, the reference {tuple(other.shape)}")
        difference, other = (one.double() - other).abs(), other.abs()
        relative = difference / (other + other.square().mean(-1, keepdim=True).sqrt())
        errors.append(relative.masked_fill(difference == 0, 0).max().item())  # rows of zeros too: 0 / 0
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _reason(problem: Exception) -> str:
    """The error in one line. A compilation error starts with source code, so its last line is appended."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or ["no reason given"]
    text = f"{lines[0]} ... {lines[-1]}" if len(lines) > 1 and lines[0].startswith("at ") else lines[0]
    return f"{type(problem).__name__}: {text}"


def device_error(device: torch.device) -> str:
    """Reason why this process can no longer use ``device`` after a sticky CUDA error; empty if it can."""
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
    except Exception as problem:
        return f"the GPU is unusable for this process after the failure above ({_reason(problem)}). Use --op."
    return ""


def describe_machine(device: torch.device) -> dict:
    """Device, the architecture whose tile sizes it uses, and versions, as JSON-safe values."""
    installed = versions()
    shown: dict[str, str | None] = {name: installed[name] for name in ("bagel_rt", "python", "torch", "triton")}
    name = "cpu, Triton's interpreter"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, sm_{properties.major}{properties.minor}"
        shown["cuda"] = torch.version.cuda
    return {"device": name, "table": configs.architecture(device), "versions": shown}
