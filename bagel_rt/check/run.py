"""``bagel-rt check``: every kernel on small inputs, beside its reference in float64 on the same inputs."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from bagel_rt.check.case import Case, Values
from bagel_rt.check.cases import CASES
from bagel_rt.check.info import versions
from bagel_rt.kernels import configs
from bagel_rt.kernels.backend import check_backend, choose_backend
from bagel_rt.kernels.registry import OPS, implementation


@dataclass(frozen=True)
class Result:
    """What came of one case in one dtype.

    Attributes:
        error: largest |got - want| / (|want| + rms of its row); None where nothing was computed.
        allowed: the largest error that passes.
        result: "pass", "FAIL" or "not run".
        note: why there is no error.
    """

    op: str
    case: str
    dtype: str
    error: float | None
    allowed: float
    result: str
    note: str = ""


def choose_cases(ops: Sequence[str] | None = None) -> list[Case]:
    """The cases of some ops, by default of all.

    Raises:
        ValueError: a name is no op.
    """
    for op in ops or ():
        if op not in OPS:
            raise ValueError(f"--op must be one of {', '.join(sorted(OPS))}, got {op!r}")
    return [case for case in CASES if case.op in (ops or OPS)]


def run(device: torch.device, cases: Sequence[Case] | None = None) -> Iterator[Result]:
    """Run cases, all by default, with kernels on ``device``, one result per case and dtype.

    On a CPU only those that the interpreter can do in a moment; of ops whose kernels are CUDA, those only where the
    extension has them for this device. After an error that leaves the GPU unusable for this
    process, which CUDA calls sticky, the rest is "not run".

    Raises:
        ValueError: no kernels on this device: an old GPU, or a CPU without the interpreter.
    """
    check_backend(device, "triton")
    configs.architecture(device)
    return _run(device, CASES if cases is None else cases)


def _run(device, cases):
    gone = ""
    choose_backend("triton")
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            has_kernel = {op: implementation(op, device) != "reference" for op in OPS}
        for case in cases:
            runs = has_kernel[case.op] and (case.interpreted or device.type == "cuda")
            for dtype in case.dtypes if runs else ():
                result = _result(case, dtype, note=gone) if gone else _check(case, dtype, device)
                gone = gone or (result.note and lost(device))
                yield result
    finally:
        choose_backend(None)


def _result(case: Case, dtype: torch.dtype, error: float | None = None, result="not run", note="") -> Result:
    name = str(dtype).removeprefix("torch.")
    return Result(case.op, case.name, name, error, case.allowed(dtype), result, note)


def _check(case: Case, dtype: torch.dtype, device: torch.device) -> Result:
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            call, reference = case.build(Values(device, dtype))
            error = _error(call(), reference())
    except Exception as problem:  # whatever a compiler or a driver has to say is the result
        return _result(case, dtype, None, "FAIL", _reason(problem))
    return _result(case, dtype, error, "pass" if error <= case.allowed(dtype) else "FAIL")


def _error(got, want) -> float:
    """The largest of all outputs; nan if there is one in ``got``.

    An element is judged by the scale of its row: over many keys attention is small, and all of it may be wrong by less
    than a fraction of 1.
    """
    errors = []
    for one, other in zip(got, want, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"the kernel returned shape {tuple(one.shape)}, the reference {tuple(other.shape)}")
        difference, other = (one.double() - other).abs(), other.abs()
        relative = difference / (other + other.square().mean(-1, keepdim=True).sqrt())
        errors.append(relative.masked_fill(difference == 0, 0).max().item())  # rows of zeros too: 0 / 0
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _reason(problem: Exception) -> str:
    """The error in one line; of a compilation error, which begins with source code, the last line too."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or ["no reason given"]
    text = f"{lines[0]} ... {lines[-1]}" if len(lines) > 1 and lines[0].startswith("at ") else lines[0]
    return f"{type(problem).__name__}: {text}"


def lost(device: torch.device) -> str:
    """Why nothing more can run on ``device`` in this process; empty if it can."""
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
    except Exception as problem:
        return f"the GPU refuses this process any work after the failure above ({_reason(problem)}); use --op"
    return ""


def machine(device: torch.device) -> dict:
    """Device, the architecture whose tile sizes it uses, and versions, JSON-ready."""
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    found = versions()
    return {
        "device": f"{properties.name}, sm_{properties.major}{properties.minor}"
        if cuda
        else "cpu, Triton's interpreter",
        "table": configs.architecture(device),
        "versions": {name: found[name] for name in ("bagel_rt", "python", "torch", "triton")}
        | ({"cuda": torch.version.cuda} if cuda else {}),
    }
