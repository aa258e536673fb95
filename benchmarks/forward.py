"""One denoising forward through a few full-width layers with random weights: kernels against references."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from bagel_rt.check.case import Values
from bagel_rt.kernels.backend import choose_backend
from bagel_rt.models.bagel.config import BAGEL_7B_MOT, TransformerConfig
from bagel_rt.models.bagel.transformer import Transformer
from bagel_rt.models.bagel.weights import DecoderLayerWeights, Pair
from bagel_rt.runtime.batch import ForwardBatch, Rope
from bagel_rt.runtime.plan import Plan
from bagel_rt.runtime.slots import KVCache
from benchmarks.measure import Timer, markdown
from benchmarks.workloads import visible_pairs

LAYERS = 4
FORWARDS = ("text-to-image 1024", "edit 1024")
BACKENDS = {"kernels": "auto", "references": "reference"}


@dataclass(frozen=True)
class ForwardRow:
    """Result of one backend for one forward.

    Attributes:
        who: key of ``BACKENDS``.
        milliseconds: median time of all layers.
        layers: number of layers.
        limit: roofline time in milliseconds.
        error: ||actual - expected|| / ||expected|| of the hidden states, against the references; None for those.
    """

    forward: str
    who: str
    milliseconds: float
    layers: int
    limit: float
    error: float | None = None
    note: str = ""


def _transformer(values: Values, config: TransformerConfig, layers: int) -> Transformer:
    H, D, F = config.hidden_size, config.head_dim, config.intermediate_size
    heads = config.num_heads + config.num_kv_heads

    def pair(*shape, deviation=1.0):
        return Pair(values(*shape, deviation=deviation), values(*shape, deviation=deviation))

    def weight(rows, columns):
        return pair(rows, columns, deviation=columns**-0.5)

    def layer():
        qkv = (heads + config.num_kv_heads) * D
        return DecoderLayerWeights(
            input_norm=pair(H),
            qkv=weight(qkv, H),
            qkv_bias=pair(qkv),
            qk_norm=pair(heads, D),
            o=weight(H, config.num_heads * D),
            post_norm=pair(H),
            gate_up=weight(2 * F, H),
            down=weight(H, F),
        )

    return Transformer(config, [layer() for _ in range(layers)], pair(H))


def _roofline_ms(plan: Plan, config: TransformerConfig, layers: int, limits: tuple[float, float]) -> float:
    """Roofline time: GEMM and attention flops, or reading the weights, whichever takes longer."""
    H, D, F = config.hidden_size, config.head_dim, config.intermediate_size
    weights = H * D * (2 * config.num_heads + 2 * config.num_kv_heads) + 3 * H * F
    flops = 2 * weights * len(plan.limits) + 4 * config.num_heads * D * visible_pairs(plan)
    return 1e3 * layers * max(flops / limits[0], 2 * 2 * weights / limits[1])


@torch.inference_mode()
def measure(
    name: str,
    plan: Plan,
    timer: Timer,
    dtype: torch.dtype,
    limits: tuple[float, float],
    config: TransformerConfig = BAGEL_7B_MOT.llm,
    layers: int = LAYERS,
) -> Iterator[ForwardRow]:
    """Measure one forward with each backend. Rows are yielded at the end, since the error needs both results.

    Args:
        name: key of ``workloads.PLANS``, for the rows.
        plan: the packed batch.
        timer: times the forwards.
        dtype: of weights and activations.
        limits: flop/s and bytes/s of the device.
        config: shapes of a layer.
        layers: number of layers.
    """
    torch.manual_seed(0)
    values = Values(timer.device, dtype)
    transformer = _transformer(values, config, layers)
    cache = KVCache(layers, config.num_kv_heads, config.head_dim, dtype, timer.device, int(plan.slots.max()) + 1)
    for index in range(layers):
        for buffer in cache.layer(index):
            buffer.normal_()
    rope = Rope(config.head_dim, config.rope_theta, config.max_position_embeddings, timer.device)
    positions = plan.slots[np.argsort(plan.order)]  # one position per slot
    batch = ForwardBatch.from_plan(plan, positions, rope)
    hidden = values(len(plan.limits), config.hidden_size)
    floor, outputs, times = _roofline_ms(plan, config, layers, limits), {}, {}
    try:
        for who, backend in BACKENDS.items():
            choose_backend(backend)
            outputs[who] = transformer.forward(hidden, batch, cache).double()
            times[who] = timer.microseconds(lambda: transformer.forward(hidden, batch, cache)) / 1e3
    finally:
        choose_backend(None)
    actual, expected = outputs.values()
    error = ((actual - expected).norm() / expected.norm()).item()
    for who, milliseconds in times.items():
        reference = BACKENDS[who] == "reference"
        wrong = not reference and not error <= 3e-2
        yield ForwardRow(name, who, milliseconds, layers, floor, None if reference else error, "WRONG" if wrong else "")


def table(rows: list[ForwardRow]) -> str:
    """Markdown table with one line per forward and backend."""
    lines = []
    for row in rows:
        times = [f"{row.milliseconds:.2f}", f"{row.milliseconds / row.layers:.2f}"]
        error = "" if row.error is None else f"{row.error:.1e}"
        lines.append([row.forward, row.who, *times, f"{row.limit / row.milliseconds:.0%}", error, row.note])
    return markdown(["forward", "", "ms", "ms per layer", "of roofline", "relative L2", ""], lines)
