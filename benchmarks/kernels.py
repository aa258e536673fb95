"""Every kernel at BAGEL's sizes beside its peers: time, share of the roofline, and error on the same tensors.

    python -m benchmarks.kernels [NAME...] [--compiled] [--json FILE]

prints a table per workload whose name contains a NAME. ``benchmarks.gpu_check`` runs all of them, in order of worth.
Times are those of :meth:`benchmarks.measure.Clock.in_rotation`: cold caches, reads and writes paid for.
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
from benchmarks.measure import LATENCY, Clock, ceilings, markdown
from benchmarks.workloads import WORKLOADS, Workload

OURS, WITHOUT_EXTENSION = "bagel_rt", "bagel_rt, the extension not built"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest error of a row by dtype, some five roundings; anyone above it computes something else."""
SMALL_ROW = 1e-3
"""Rows shorter than this part of the longest one are judged as if they were so long: they may be sums to nothing."""

_BACKENDS = {"FLASH": SDPBackend.FLASH_ATTENTION, "EFFICIENT": SDPBackend.EFFICIENT_ATTENTION,
             "CUDNN": SDPBackend.CUDNN_ATTENTION, "MATH": SDPBackend.MATH}  # fmt: skip

PEERS: dict[str, dict[str, Callable]] = {
    "linear": {
        "torch on row ranges": peers.reference_linear,
        "official": peers.official_linear,
        "torch and Liger's SwiGLU": peers.liger_swiglu,
        "vLLM-Omni": peers.vllm_omni_linear,
        "cuBLAS, one product alone": peers.one_product,
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
        "torch, K and V gathered": peers_attention.reference_attention,
        "official, SDPA": peers_attention.official_attention,
        **{f"SDPA {name}": peers_attention.sdpa(backend) for name, backend in _BACKENDS.items()},
        "SDPA EFFICIENT, heads expanded": peers_attention.sdpa(SDPBackend.EFFICIENT_ATTENTION, expand=True),
    },
    "attention_gradients": {
        **{f"SDPA {name}": peers_attention.sdpa_gradients(_BACKENDS[name]) for name in ("FLASH", "CUDNN")},
        "SDPA EFFICIENT, heads expanded": peers_attention.sdpa_gradients(SDPBackend.EFFICIENT_ATTENTION, expand=True),
    },
    "decode_attention": {
        "torch, lengths on the host": peers_attention.reference_decode_attention,
        **{f"SDPA {name}": peers_attention.sdpa_decode(backend) for name, backend in _BACKENDS.items()},
    },
    "decode_linear": {
        "torch": peers_decode.torch_linear,
        WITHOUT_EXTENSION: peers_decode.triton_linear,
        "cuBLAS, one product alone": peers_decode.one_product,
    },
    "decode_qkv": {"torch": peers_decode.torch_qkv, WITHOUT_EXTENSION: peers_decode.triton_qkv},
    "sample": {"torch": peers_decode.torch_sample, "official, multinomial": peers_decode.official_sample},
    "cfg_euler_step": {"official": peers.official_guided_step},
    "group_norm": {"official": peers.official_group_norm, "official, channels first": peers.channels_first_group_norm},
}
"""Public function -> name of a peer -> what makes it from the function's arguments."""

COMPILED: dict[str, dict[str, Callable]] = {
    "linear": {"official, torch.compile": peers.official_linear},
    "rms_norm": {"official, torch.compile": peers.official_rms_norm},
    "qk_norm_rope": {"official, torch.compile": peers.official_qk_norm_rope},
    "attention": {"FlexAttention": peers_attention.flex},
    "attention_gradients": {"FlexAttention": peers_attention.flex_gradients},
    "decode_linear": {"torch.compile": peers_decode.torch_linear},
    "decode_qkv": {"torch.compile": peers_decode.torch_qkv},
    "sample": {"torch.compile": peers_decode.torch_sample},
    "cfg_euler_step": {"official, torch.compile": peers.official_guided_step},
    "group_norm": {"official, torch.compile": peers.official_group_norm},
}
"""The same for peers that take seconds to compile; they also take ``wrap``, which compiles a function."""


@dataclass(frozen=True)
class Row:
    """One contender at one workload.

    Attributes:
        microseconds: median time; None where it did not run.
        error: ||got - want|| / ||want|| of the worst row of its outputs; None where they are not the op's.
        note: why something is None, or that the result is wrong.
    """

    workload: str
    who: str
    microseconds: float | None = None
    error: float | None = None
    note: str = ""


class DeviceLost(Exception):
    """The GPU takes no more work from this process."""


def _wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def judge(name: str, arguments: tuple, options: dict) -> tuple[tuple[torch.Tensor, ...], Callable]:
    """What the op must return, in float64, and which part of a contender's outputs that is."""
    if name in ("attention", "attention_gradients"):
        return _judge_attention(*arguments, **options)
    if name == "sample":
        return _judge_sample(*arguments)
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


def _judge_attention(q, k_cache, v_cache, limits, blocks, gradient=None, return_lse=False):
    """All rows, but only the first and the last KV head and their queries: all heads' scores would not fit."""
    group, kv_heads = q.shape[1] // k_cache.shape[1], k_cache.shape[1]
    chosen = sorted({0, kv_heads - 1})
    heads = [kv * group + member for kv in chosen for member in range(group)]
    key_start, limit, own_start, own_end = (span[:, None] for span in peers_attention.row_spans(limits, blocks))
    slot = torch.arange(k_cache.shape[0], device=q.device)
    mask = (slot >= key_start) & (slot < key_start + limit) | (slot >= own_start) & (slot < own_end)
    inputs = [tensor.double() for tensor in (q[:, heads], k_cache[:, chosen], v_cache[:, chosen])]
    for tensor in inputs:
        tensor.requires_grad_(gradient is not None)
    out, lse = torch.empty_like(inputs[0]), []
    for place, head in enumerate(heads):
        kv = chosen.index(head // group)
        one = inputs[0][:, [place]], inputs[1][:, [kv]], inputs[2][:, [kv]]
        with torch.set_grad_enabled(gradient is not None):
            attended = attention_dense_reference(*one, mask)
            if gradient is not None:
                attended.backward(gradient[:, [head]].double())
        out[:, [place]] = attended.detach()
        if return_lse:
            scores = one[0][:, 0] @ one[1][:, 0].T * q.shape[2] ** -0.5
            lse.append(scores.masked_fill_(~mask, -torch.inf).logsumexp(1))
    if return_lse:
        return (out, torch.stack(lse, 1)), lambda made: (made[0][:, heads], made[1][heads].T)
    if gradient is None:
        return (out,), lambda made: (made[0][:, heads],)
    return (out.detach(), *(tensor.grad for tensor in inputs)), lambda made: (
        made[0][:, heads], made[1][:, heads], made[2][:, chosen], made[3][:, chosen],
    )  # fmt: skip


def _judge_sample(logits, settings=None, seed=None, step=None):
    """Logits plus noise, what the token drawn has most of: tokens themselves may differ where two are next to equal."""
    logits = logits.double()
    scores = logits if settings is None else scores_reference(logits, settings, seed, step)
    return (scores.amax(1, keepdim=True),), lambda made: (scores.gather(1, made[0][:, None]),)


def _ours(function: Callable, arguments: tuple, options: dict) -> peers.Contender:
    if function.__name__ == "cfg_euler_step":  # in place: the latents of the workload stay for the peers
        arguments = (arguments[0].clone(), *arguments[1:])
    outputs = {
        "rms_norm": lambda made: made,
        "attention": lambda made: made if isinstance(made, tuple) else (made,),
        "attention_gradients": lambda made: made,
        "qk_norm_rope": lambda q: (q, *arguments[6:8]),
        "decode_qkv": lambda q: (q, *arguments[8:10]),
        "cfg_euler_step": lambda _: arguments[:1],  # after the first call: every further one moves them on
    }.get(function.__name__, peers.one)
    return peers.Contender(lambda: function(*arguments, **options), outputs)


def _copies(number: int, arguments: tuple, options: dict) -> list[tuple[tuple, dict]]:
    """Inputs and copies of them, ``number`` together."""

    def copy(value):
        return value.clone() if isinstance(value, torch.Tensor) else value

    copies = range(number - 1)
    made = [(tuple(map(copy, arguments)), {name: copy(value) for name, value in options.items()}) for _ in copies]
    return [(arguments, options), *made]


def measure(workload: Workload, clock: Clock, compiled: bool = False, wrap: Callable = peers.compiled) -> Iterator[Row]:
    """Rows of one workload: this package and the quick peers, or with ``compiled`` the peers that ``wrap`` compiles.

    Raises:
        DeviceLost: after the row that tells why.
    """
    torch.manual_seed(0)
    function, arguments, options = workload.build(Values(clock.device, workload.dtype))
    inputs = _copies(clock.sets(workload.bytes), arguments, options)
    name = function.__name__
    if compiled:
        makers = {who: partial(maker, wrap=wrap) for who, maker in COMPILED.get(name, {}).items()}
    else:
        makers = {OURS: partial(_ours, function)} | PEERS[name]
    want = None
    for who, maker in makers.items():
        if compiled:
            torch.compiler.reset()  # it gives up on a function that it has compiled a few times
        try:
            contenders = [maker(*given) if who == OURS else maker(*given[0], **given[1]) for given in inputs]
            contender = contenders[0]
            made = contender.run()
            error = None
            if contender.outputs is not None:
                want = want or judge(name, arguments, options)
                error = _error(want[1](contender.outputs(made)), want[0])
            del made
            note = "WRONG" if error is not None and not error <= TOLERANCE[workload.dtype] else ""
            if error is None:
                note = "not the whole op"
            time = clock.in_rotation([contender.run for contender in contenders])
            yield Row(workload.name, who, time, error, note)
        except Exception as problem:  # a peer that is missing or fails is a line
            reason = next(iter(str(problem).splitlines()), "")
            unsuitable = isinstance(problem, peers.Unsuitable)
            yield Row(workload.name, who, note=reason if unsuitable else f"{type(problem).__name__}: {reason}")
            _check_alive(clock.device)
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()


def _check_alive(device: torch.device) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as problem:
            raise DeviceLost(next(iter(str(problem).splitlines()), "")) from None


def _error(got, want) -> float:
    """Of the worst row; a row is what one index of the first dimension has."""
    worst = 0.0
    for one, other in zip(got, want, strict=True):
        one, other = (tensor.double().reshape(tensor.shape[0], -1) for tensor in (one, other))
        same = one == other  # infinities too: the log-sum-exp of a row that sees nothing
        size = other.masked_fill(other.isinf(), 0).norm(dim=1)
        size = size.clamp(min=max(SMALL_ROW * size.max().item(), 1e-30))
        error = ((one - other).masked_fill(same, 0).norm(dim=1) / size).max().item()
        worst = math.nan if math.isnan(error) or math.isnan(worst) else max(worst, error)
    return worst


WORTH = (
    "text-to-image 1024", "decode", "keys", "cfg_euler_step global of 3 branches, 1024", "attention, edit 1024",
    "edit 1024", "ViT", "training", "text-to-image 512", "1024", "",
)  # fmt: skip
"""Parts of workloads' names, the ones that matter most first."""


def tasks(workloads: Iterable[Workload] = WORKLOADS) -> list[tuple[Workload, bool]]:
    """(workload, compiled peers or not) in order of worth: compiled peers of the first forward after a few others."""
    ranked = sorted(workloads, key=lambda workload: next(i for i, part in enumerate(WORTH) if part in workload.name))
    first = [workload for workload in ranked if WORTH[0] in workload.name]
    early = [workload for workload in ranked if any(part in workload.name for part in WORTH[:5])]
    late = [workload for workload in ranked if workload not in early]
    order = [(workload, False) for workload in early] + [(workload, True) for workload in first]
    order += [(workload, False) for workload in late]
    return order + [(workload, True) for workload in ranked if workload not in first]


Limits = tuple[float, float] | None
"""flop/s and bytes/s of the device; None where nobody knows them."""


def _floor(workload: Workload, limits: Limits) -> float | None:
    """Microseconds that the roofline allows."""
    return max(workload.flops / limits[0], workload.bytes / limits[1]) * 1e6 if limits else None


def _share(floor: float | None, microseconds: float) -> str:
    """Of the roofline; nothing where latency is the limit."""
    return "" if floor is None or floor < LATENCY else f"{floor / microseconds:.0%}"


def best_peer(rows: list[Row]) -> Row | None:
    """The fastest of those that do the same work and do it right."""
    rivals = [row for row in rows if row.who != OURS and row.microseconds and _sound(row)]
    return min(rivals, key=lambda row: row.microseconds, default=None)


def table(workload: Workload, rows: list[Row], limits: Limits) -> str:
    """Markdown: one line per contender, the fastest first; ratios are to the fastest peer that does the same work."""
    floor, rival, lines = _floor(workload, limits), best_peer(rows), []
    for row in sorted(rows, key=lambda row: row.microseconds or math.inf):
        error = "" if row.error is None else f"{row.error:.1e}"
        figures = [""] * 5
        if row.microseconds:
            rate = f"{workload.flops / row.microseconds / 1e6:.0f}" if workload.flops else ""
            ratio = f"{rival.microseconds / row.microseconds:.2f}" if rival else ""
            speed, share = f"{workload.bytes / row.microseconds / 1e3:.0f}", _share(floor, row.microseconds)
            figures = [f"{row.microseconds:.1f}", rate, speed, share, ratio]
        lines.append([row.who, *figures, error, row.note])
    header = ["", "us", "TFLOP/s", "GB/s", "of roofline", "x best peer", "error", ""]
    limit = "" if floor is None else f", limit {floor:.1f} us"
    latency = "" if floor is None or floor >= LATENCY else ", bound by latency"
    return f"**{workload.name}**{limit}{latency}\n\n{markdown(header, lines)}"


def overview(measured: list[tuple[Workload, list[Row]]], limits: Limits) -> str:
    """Markdown: one line per workload, this package beside its fastest peer."""
    lines = []
    for workload, rows in measured:
        ours = next((row for row in rows if row.who == OURS and row.microseconds), None)
        rival = best_peer(rows)
        figures = [""] * 2
        if ours:
            figures = [f"{ours.microseconds:.1f}", _share(_floor(workload, limits), ours.microseconds)]
        peer = [rival.who, f"{rival.microseconds:.1f}"] if rival else [""] * 2
        ratio = f"{rival.microseconds / ours.microseconds:.2f}" if ours and rival else ""
        lines.append([workload.name, *figures, *peer, ratio])
    return markdown(["workload", "us", "of roofline", "fastest peer", "its us", "x faster"], lines)


def _sound(row: Row) -> bool:
    return row.error is not None and not row.note


def run(workloads, clock: Clock, limits: Limits, compiled: bool) -> list[Row]:
    """Measure workloads and print their tables."""
    found = []
    for workload in workloads:
        rows = list(measure(workload, clock))
        rows += measure(workload, clock, compiled=True) if compiled else []
        found += rows
        print(table(workload, rows, limits), end="\n\n", flush=True)
    return found


def main() -> None:
    """Measure the workloads asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a workload's name; default: all")
    parser.add_argument("--compiled", action="store_true", help="torch.compile and FlexAttention too")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "kernels: error: PyTorch finds no CUDA device here\n")
    device = torch.device("cuda")
    chosen = [w for w in WORKLOADS if not arguments.names or any(name in w.name for name in arguments.names)]
    found = run(chosen, Clock(device), ceilings(device), arguments.compiled)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([asdict(row) for row in found], file, indent=2)


if __name__ == "__main__":
    main()
