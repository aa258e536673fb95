"""Compare every kernel with its peers at BAGEL's sizes: time, share of the roofline, and error on the same tensors.

    python -m benchmarks.kernels [NAME...] [--compiled] [--json FILE]

Prints a table for each workload whose name contains a NAME. ``benchmarks.gpu_check`` runs all of them in order of
importance. For the timing method see :mod:`benchmarks.measure`.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend

from bagel_rt.check.case import Values
from bagel_rt.kernels import attention_dense_reference
from bagel_rt.kernels.decode_attention import decode_attention_reference
from bagel_rt.kernels.decode_linear import decode_linear_reference
from bagel_rt.kernels.decode_qkv import decode_qkv_reference
from bagel_rt.kernels.group_norm import group_norm_reference
from bagel_rt.kernels.guidance import cfg_euler_step_reference
from bagel_rt.kernels.linear import linear_reference
from bagel_rt.kernels.norm import rms_norm_reference
from bagel_rt.kernels.qk_norm_rope import qk_norm_rope_reference
from bagel_rt.kernels.sample import scores_reference
from benchmarks import peers, peers_attention, peers_decode
from benchmarks.measure import LATENCY_US, Timer, ceilings, markdown
from benchmarks.workloads import WORKLOADS, OpWorkload

OURS, WITHOUT_EXTENSION = "bagel_rt", "bagel_rt without the extension"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Maximum relative error of a row by dtype, about five roundings. A larger one means a wrong result."""
MIN_ROW_NORM = 1e-3
"""Lower bound of the norm that an error is divided by, relative to the largest row. Rows with a smaller norm can be the
result of cancellation, where the relative error is meaningless."""

_BACKENDS = {"FLASH": SDPBackend.FLASH_ATTENTION, "EFFICIENT": SDPBackend.EFFICIENT_ATTENTION,
             "CUDNN": SDPBackend.CUDNN_ATTENTION, "MATH": SDPBackend.MATH}  # fmt: skip

PEERS: dict[str, dict[str, Callable]] = {
    "linear": {
        "torch on row ranges": peers.reference_linear,
        "official": peers.official_linear,
        "torch and Liger's SwiGLU": peers.liger_swiglu,
        "vLLM-Omni": peers.vllm_omni_linear,
        "cuBLAS, one product alone": peers.cublas_gemm,
    },
    "rms_norm": {
        "torch on row ranges": peers.reference_rms_norm,
        "official": peers.official_rms_norm,
        "Liger": peers.liger_rms_norm,
        "vLLM-Omni": peers.vllm_omni_rms_norm,
    },
    "qk_norm_rope": {
        "torch on row ranges": peers.reference_qk_norm_rope,
        "official": peers.official_qk_norm_rope,
    },
    "attention": {
        "torch, gathered K and V": peers_attention.reference_attention,
        "official, SDPA": peers_attention.official_attention,
        **{f"SDPA {name}": peers_attention.sdpa(backend) for name, backend in _BACKENDS.items()},
        "SDPA EFFICIENT, expanded heads": peers_attention.sdpa(SDPBackend.EFFICIENT_ATTENTION, expand=True),
    },
    "attention_gradients": {
        **{f"SDPA {name}": peers_attention.sdpa_gradients(_BACKENDS[name]) for name in ("FLASH", "CUDNN")},
        "SDPA EFFICIENT, expanded heads": peers_attention.sdpa_gradients(SDPBackend.EFFICIENT_ATTENTION, expand=True),
    },
    "decode_attention": {
        "torch, lengths on host": peers_attention.reference_decode_attention,
        **{f"SDPA {name}": peers_attention.sdpa_decode(backend) for name, backend in _BACKENDS.items()},
    },
    "decode_linear": {
        "torch": peers_decode.torch_linear,
        WITHOUT_EXTENSION: peers_decode.triton_linear,
        "cuBLAS, one product alone": peers_decode.cublas_gemm,
    },
    "decode_qkv": {"torch": peers_decode.torch_qkv, WITHOUT_EXTENSION: peers_decode.triton_qkv},
    "sample": {"torch": peers_decode.torch_sample, "official, multinomial": peers_decode.official_sample},
    "cfg_euler_step": {"official": peers.official_cfg_euler_step},
    "group_norm": {"official": peers.official_group_norm, "official, channels first": peers.channels_first_group_norm},
}
"""Name of the public function -> name of a peer -> factory that takes the function's arguments."""

COMPILED_PEERS: dict[str, dict[str, Callable]] = {
    "linear": {"official, torch.compile": peers.official_linear},
    "rms_norm": {"official, torch.compile": peers.official_rms_norm},
    "qk_norm_rope": {"official, torch.compile": peers.official_qk_norm_rope},
    "attention": {"FlexAttention": peers_attention.flex},
    "attention_gradients": {"FlexAttention": peers_attention.flex_gradients},
    "decode_linear": {"torch.compile": peers_decode.torch_linear},
    "decode_qkv": {"torch.compile": peers_decode.torch_qkv},
    "sample": {"torch.compile": peers_decode.torch_sample},
    "cfg_euler_step": {"official, torch.compile": peers.official_cfg_euler_step},
    "group_norm": {"official, torch.compile": peers.official_group_norm},
}
"""Same for peers that take seconds to compile. Their factories also take ``wrap``, which compiles a function."""


@dataclass(frozen=True)
class Row:
    """Result of this package or of one peer on one workload.

    Attributes:
        who: ``OURS`` or the name of a peer.
        microseconds: median time; None if it did not run.
        error: ||actual - expected|| / ||expected|| of the worst output row; None if it does not compute the whole op.
        note: the reason for a None, or "WRONG".
    """

    workload: str
    who: str
    microseconds: float | None = None
    error: float | None = None
    note: str = ""


class DeviceLost(Exception):
    """The CUDA context of this process is unusable after a kernel fault."""


def _wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def expected_outputs(name: str, arguments: tuple, options: dict) -> tuple[tuple[torch.Tensor, ...], Callable]:
    """The op's outputs in float64, and a function that selects the corresponding part of a call's outputs."""
    if name in ("attention", "attention_gradients"):
        return _expected_attention(*arguments, **options)
    if name == "sample":
        return _expected_sample(*arguments)
    arguments = tuple(map(_wide, arguments))
    if name == "decode_linear":
        options = {option: _wide(value) for option, value in options.items()}
        return (decode_linear_reference(*arguments, **options),), tuple
    if name == "decode_qkv":
        return (decode_qkv_reference(*arguments), *arguments[8:10]), tuple
    if name == "linear":
        x, w_first, w_rest, bias_first, bias_rest = arguments + (None,) * (5 - len(arguments))
        residual, swiglu = _wide(options.get("residual")), options.get("swiglu", False)
        return (linear_reference(x, w_first, w_rest, bias_first, bias_rest, residual, options["G"], swiglu),), tuple
    if name == "qk_norm_rope":
        return (qk_norm_rope_reference(*arguments), *arguments[6:8]), tuple
    if name == "rms_norm":
        return rms_norm_reference(*arguments), tuple
    if name == "group_norm":
        return (group_norm_reference(*arguments),), tuple
    if name == "decode_attention":
        scale = options.get("scale") or arguments[0].shape[2] ** -0.5
        return (decode_attention_reference(*arguments, scale),), tuple
    x, v, image_table, cfg_table, *launch = arguments
    cfg_euler_step_reference(moved := x.clone(), v, image_table, cfg_table, *launch)
    return (moved,), tuple


def _expected_attention(q, k_cache, v_cache, limits, blocks, gradient=None, return_lse=False):
    """Outputs of the first and last KV head and their query heads. Float64 scores of all heads take too long."""
    group, kv_heads = q.shape[1] // k_cache.shape[1], k_cache.shape[1]
    checked = sorted({0, kv_heads - 1})
    heads = [kv * group + member for kv in checked for member in range(group)]
    key_start, limit, own_start, own_end = (span[:, None] for span in peers_attention.row_spans(limits, blocks))
    slot = torch.arange(k_cache.shape[0], device=q.device)
    mask = (slot >= key_start) & (slot < key_start + limit) | (slot >= own_start) & (slot < own_end)
    inputs = [tensor.double() for tensor in (q[:, heads], k_cache[:, checked], v_cache[:, checked])]
    for tensor in inputs:
        tensor.requires_grad_(gradient is not None)
    out, lse = torch.empty_like(inputs[0]), []
    for index, head in enumerate(heads):  # one head at a time: [T, slots] scores in float64 take gigabytes
        kv = checked.index(head // group)
        q_head, k_head, v_head = inputs[0][:, [index]], inputs[1][:, [kv]], inputs[2][:, [kv]]
        with torch.set_grad_enabled(gradient is not None):
            attended = attention_dense_reference(q_head, k_head, v_head, mask)
            if gradient is not None:
                attended.backward(gradient[:, [head]].double())
        out[:, [index]] = attended.detach()
        if return_lse:
            scores = q_head[:, 0] @ k_head[:, 0].T * q.shape[2] ** -0.5
            lse.append(scores.masked_fill_(~mask, -torch.inf).logsumexp(1))
    if return_lse:
        return (out, torch.stack(lse, 1)), lambda outputs: (outputs[0][:, heads], outputs[1][heads].T)
    if gradient is None:
        return (out,), lambda outputs: (outputs[0][:, heads],)
    return (out.detach(), *(tensor.grad for tensor in inputs)), lambda outputs: (
        outputs[0][:, heads], outputs[1][:, heads], outputs[2][:, checked], outputs[3][:, checked],
    )  # fmt: skip


def _expected_sample(logits, settings=None, seed=None, step=None):
    """Maximum of logits plus noise, compared with that of the sampled token: near-ties may give different tokens."""
    logits = logits.double()
    scores = logits if settings is None else scores_reference(logits, settings, seed, step)
    return (scores.amax(1, keepdim=True),), lambda outputs: (scores.gather(1, outputs[0][:, None]),)


def _prepare_ours(function: Callable, arguments: tuple, options: dict) -> peers.PreparedCall:
    if function.__name__ == "cfg_euler_step":  # works in place; the peers need the original latents
        arguments = (arguments[0].clone(), *arguments[1:])
    outputs = {
        "rms_norm": tuple,
        "attention": lambda result: result if isinstance(result, tuple) else (result,),
        "attention_gradients": tuple,
        "qk_norm_rope": lambda q: (q, *arguments[6:8]),
        "decode_qkv": lambda q: (q, *arguments[8:10]),
        "cfg_euler_step": lambda _: arguments[:1],  # read after the first call, before the next one moves them on
    }.get(function.__name__, peers.as_tuple)
    return peers.PreparedCall(lambda: function(*arguments, **options), outputs)


def _copy_inputs(count: int, arguments: tuple, options: dict) -> list[tuple[tuple, dict]]:
    """``count`` sets of inputs: the original and clones."""

    def clone(value):
        return value.clone() if isinstance(value, torch.Tensor) else value

    clones = [
        (tuple(map(clone, arguments)), {name: clone(value) for name, value in options.items()})
        for _ in range(count - 1)
    ]
    return [(arguments, options), *clones]


def measure(
    workload: OpWorkload, timer: Timer, compiled: bool = False, wrap: Callable = peers.torch_compile
) -> Iterator[Row]:
    """Measure one workload: this package and its eager peers, or with ``compiled`` the peers that ``wrap`` compiles.

    Raises:
        DeviceLost: after yielding the row with the reason.
    """
    torch.manual_seed(0)
    function, arguments, options = workload.build(Values(timer.device, workload.dtype))
    inputs = _copy_inputs(timer.num_copies(workload.bytes), arguments, options)
    name = function.__name__
    if compiled:
        factories = {who: partial(factory, wrap=wrap) for who, factory in COMPILED_PEERS.get(name, {}).items()}
    else:
        factories = {OURS: partial(_prepare_ours, function)} | PEERS[name]
    expected = None
    for who, factory in factories.items():
        if compiled:
            torch.compiler.reset()  # otherwise dynamo's recompile limit turns later workloads eager
        try:
            calls = [factory(a, o) if who == OURS else factory(*a, **o) for a, o in inputs]
            call = calls[0]
            result = call.run()
            error = None
            if call.outputs is not None:
                expected = expected or expected_outputs(name, arguments, options)
                error = worst_row_error(expected[1](call.outputs(result)), expected[0])
            del result
            note = "WRONG" if error is not None and not error <= TOLERANCE[workload.dtype] else ""
            if error is None:
                note = "computes only part of the op"
            time = timer.microseconds_rotating([call.run for call in calls])
            yield Row(workload.name, who, time, error, note)
        except Exception as error:  # a peer that fails or is not installed becomes a row with a note
            reason = next(iter(str(error).splitlines()), "")
            unsupported = isinstance(error, peers.Unsupported)
            yield Row(workload.name, who, note=reason if unsupported else f"{type(error).__name__}: {reason}")
            _check_alive(timer.device)
    if timer.device.type == "cuda":
        torch.cuda.empty_cache()


def _check_alive(device: torch.device) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as error:
            raise DeviceLost(next(iter(str(error).splitlines()), "")) from None


def worst_row_error(outputs: Iterable[torch.Tensor], references: Iterable[torch.Tensor]) -> float:
    """Largest relative L2 error over all rows, where a row is one index of the first dimension."""
    worst = 0.0
    for actual, expected in zip(outputs, references, strict=True):
        actual, expected = (tensor.double().reshape(tensor.shape[0], -1) for tensor in (actual, expected))
        equal = actual == expected  # masks equal infinities: the log-sum-exp of a row without visible keys
        norm = expected.masked_fill(expected.isinf(), 0).norm(dim=1)
        norm = norm.clamp(min=max(MIN_ROW_NORM * norm.max().item(), 1e-30))
        error = ((actual - expected).masked_fill(equal, 0).norm(dim=1) / norm).max().item()
        worst = math.nan if math.isnan(error) or math.isnan(worst) else max(worst, error)
    return worst


PRIORITY = (
    "text-to-image 1024", "decode", "keys", "cfg_euler_step global of 3 branches, 1024", "attention, edit 1024",
    "edit 1024", "ViT", "training", "text-to-image 512", "1024", "",
)  # fmt: skip
"""Substrings of workload names, most important first."""


def tasks(workloads: Iterable[OpWorkload] = WORKLOADS) -> list[tuple[OpWorkload, bool]]:
    """(workload, compiled), most important first; ``compiled`` selects the compiled peers, which run later."""
    ranked = sorted(workloads, key=lambda workload: next(i for i, part in enumerate(PRIORITY) if part in workload.name))
    first = [workload for workload in ranked if PRIORITY[0] in workload.name]
    early = [workload for workload in ranked if any(part in workload.name for part in PRIORITY[:5])]
    late = [workload for workload in ranked if workload not in early]
    order = [(workload, False) for workload in early] + [(workload, True) for workload in first]
    order += [(workload, False) for workload in late]
    return order + [(workload, True) for workload in ranked if workload not in first]


Ceilings = tuple[float, float] | None
"""flop/s and bytes/s of the device, or None if unknown."""


def _roofline_us(workload: OpWorkload, limits: Ceilings) -> float | None:
    """Lower bound of the time in microseconds: compute or memory traffic, whichever takes longer."""
    return max(workload.flops / limits[0], workload.bytes / limits[1]) * 1e6 if limits else None


def _roofline_share(floor: float | None, microseconds: float) -> str:
    """Percentage of the roofline; empty where launch latency is the limit."""
    return "" if floor is None or floor < LATENCY_US else f"{floor / microseconds:.0%}"


def best_peer(rows: list[Row]) -> Row | None:
    """The fastest peer that computes the whole op correctly."""
    valid = [row for row in rows if row.who != OURS and row.microseconds and _valid(row)]
    return min(valid, key=lambda row: row.microseconds, default=None)


def table(workload: OpWorkload, rows: list[Row], limits: Ceilings) -> str:
    """Markdown table of one workload, fastest first; the ratio is relative to :func:`best_peer`."""
    floor, peer, lines = _roofline_us(workload, limits), best_peer(rows), []
    for row in sorted(rows, key=lambda row: row.microseconds or math.inf):
        error = "" if row.error is None else f"{row.error:.1e}"
        figures = [""] * 5
        if row.microseconds:
            rate = f"{workload.flops / row.microseconds / 1e6:.0f}" if workload.flops else ""
            ratio = f"{peer.microseconds / row.microseconds:.2f}" if peer else ""
            bandwidth, share = (
                f"{workload.bytes / row.microseconds / 1e3:.0f}",
                _roofline_share(floor, row.microseconds),
            )
            figures = [f"{row.microseconds:.1f}", rate, bandwidth, share, ratio]
        lines.append([row.who, *figures, error, row.note])
    header = ["", "us", "TFLOP/s", "GB/s", "of roofline", "x best peer", "error", ""]
    limit = "" if floor is None else f", roofline {floor:.1f} us"
    latency = "" if floor is None or floor >= LATENCY_US else ", latency-bound"
    return f"**{workload.name}**{limit}{latency}\n\n{markdown(header, lines)}"


def overview(measured: list[tuple[OpWorkload, list[Row]]], limits: Ceilings) -> str:
    """Markdown table with one line per workload: this package and its fastest peer."""
    lines = []
    for workload, rows in measured:
        ours = next((row for row in rows if row.who == OURS and row.microseconds), None)
        fastest = best_peer(rows)
        figures = [""] * 2
        if ours:
            figures = [f"{ours.microseconds:.1f}", _roofline_share(_roofline_us(workload, limits), ours.microseconds)]
        peer = [fastest.who, f"{fastest.microseconds:.1f}"] if fastest else [""] * 2
        ratio = f"{fastest.microseconds / ours.microseconds:.2f}" if ours and fastest else ""
        lines.append([workload.name, *figures, *peer, ratio])
    return markdown(["workload", "us", "of roofline", "fastest peer", "peer us", "speedup"], lines)


def _valid(row: Row) -> bool:
    return row.error is not None and not row.note


def run(workloads, timer: Timer, limits: Ceilings, compiled: bool) -> list[Row]:
    """Measure workloads and print their tables."""
    results = []
    for workload in workloads:
        rows = list(measure(workload, timer))
        rows += measure(workload, timer, compiled=True) if compiled else []
        results += rows
        print(table(workload, rows, limits), end="\n\n", flush=True)
    return results


def main() -> None:
    """Measure the selected workloads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="substring of workload names; default: all")
    parser.add_argument("--compiled", action="store_true", help="also measure torch.compile and FlexAttention")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "kernels: error: PyTorch found no CUDA device.\n")
    device = torch.device("cuda")
    selected = [w for w in WORKLOADS if not arguments.names or any(name in w.name for name in arguments.names)]
    rows = run(selected, Timer(device), ceilings(device), arguments.compiled)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([asdict(row) for row in rows], file, indent=2)


if __name__ == "__main__":
    main()
