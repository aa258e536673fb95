"""Estimate the device memory of a request from the model's configuration alone, and advise how to reduce it.

The estimate follows the runtime buffer by buffer: a packed forward keeps a few tensors of its rows at a time (see
``models/bagel/transformer.py``), contexts allocate slots in the order of ``engine.py``, and captured graphs keep their
memory pool between steps. It applies to the kernels; the PyTorch references, used on a CPU, need more. The CUDA
context, libraries and allocator rounding are covered by an allowance, :data:`RUNTIME`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from PIL import Image

from bagel_rt.models.bagel.autoencoder import AutoEncoder, decode_memory, encode_memory
from bagel_rt.models.bagel.config import BagelConfig, TransformerConfig
from bagel_rt.models.bagel.contexts import count_tokens
from bagel_rt.models.bagel.guidance import step_capacity
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.models.bagel.weights import BagelWeights
from bagel_rt.models.bagel.workload import Workload
from bagel_rt.runtime.batch import table_size
from bagel_rt.runtime.context import MAX_ROWS
from bagel_rt.runtime.decode import MAX_TEXTS, token_capacity
from bagel_rt.runtime.slots import GROWTH

RUNTIME = 1 << 30  # bytes: CUDA context, kernel modules, cuBLAS and cuDNN workspaces; an allowance, not measured
_LONG_TEXT = 256  # tokens: the advice shortens longer texts to this


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device, by use.

    Attributes:
        workload: the request.
        weights: transformer, vision tower and embeddings in the workload's dtype, the autoencoder in float32.
        kv_cache: the buffers of all slots.
        buffers: static buffers of denoising and decoding: packed hidden states, rotary tables, embeddings of positions
            and times, latents, tokens.
        graphs: the memory pool of captured graphs at the peak; 0 without graphs.
        phases: temporary memory of each phase of the request.
        phase: the phase at the peak.
        runtime: :data:`RUNTIME`.
    """

    workload: Workload
    weights: int
    kv_cache: int
    buffers: int
    graphs: int
    phases: dict[str, int]
    phase: str
    runtime: int = RUNTIME

    @property
    def total(self) -> int:
        """Peak bytes."""
        kept = self.weights + self.kv_cache + self.buffers + self.graphs + self.runtime
        return kept + self.phases[self.phase]

    def fits(self, available: int) -> bool:
        """Whether ``available`` bytes are enough."""
        return self.total <= available

    def advice(self, available: int | None = None) -> list[str]:
        """Changes to the request that need less memory, the largest saving first, then all of them together.

        Args:
            available: bytes; each line then says whether the change is enough. If all changes together are not, the
                only line says so.
        """
        least = self._least()
        if available is not None and not least.fits(available):
            return [least._refusal(available)]
        lines, work = [], self.workload
        estimates = [(_estimate(replace(work, **change(work))), label) for label, change in self._changes()]
        for estimate, label in sorted(estimates, key=lambda entry: entry[0].total):
            saved = self.total - estimate.total
            if saved > self.total // 1000:
                lines.append(f"{label}: {saved / 1e9:.1f} GB less, {estimate._against(available)}")
        if len(lines) > 1:
            lines.append(f"all of these: {(self.total - least.total) / 1e9:.1f} GB less, {least._against(available)}")
        return lines

    def _least(self) -> "MemoryEstimate":
        """The estimate after all changes that may help."""
        work = self.workload
        for _, change in self._changes():
            work = replace(work, **change(work))
        return _estimate(work)

    def _refusal(self, available: int) -> str:
        """State that even this request, the smallest one, does not fit."""
        reason = f"a smaller request would still need {self.total / 1e9:.1f} GB"
        if self.weights + RUNTIME > available:
            reason = f"no request fits: the weights alone need {self.weights / 1e9:.1f} GB"
        return f"{reason}. Use a GPU with at least {math.ceil(self.total / 1e9)} GB."

    def advice_text(self, available: int | None = None) -> str:
        """:meth:`advice` as lines to follow the table; "" if there is none."""
        lines = self.advice(available)
        if available is not None and not self._least().fits(available):
            return lines[0]
        return "\n".join(["to reduce it:", *(f"- {line}" for line in lines)]) if lines else ""

    def as_dict(self, available: int | None = None) -> dict[str, Any]:
        """The estimate as JSON-safe values, in bytes; with ``available`` also whether it fits, and the advice."""
        work = self.workload
        workload = {key: value for key, value in vars(work).items() if key != "config"}
        workload |= {"dtype": str(work.dtype).removeprefix("torch."), "settings": asdict(work.settings)}
        names = ("weights", "kv_cache", "buffers", "graphs", "phases", "runtime", "phase", "total")
        report = {"workload": workload} | {name: getattr(self, name) for name in names}
        if available is not None:
            report |= {"available": available, "fits": self.fits(available), "advice": self.advice(available)}
        return report

    def __str__(self) -> str:
        """A table in GB of 10**9 bytes."""
        rows = [
            ("weights", self.weights),
            ("KV cache", self.kv_cache),
            ("buffers", self.buffers),
            ("CUDA graphs", self.graphs),
            (self.phase, self.phases[self.phase]),
            ("CUDA and libraries, allowance", self.runtime),
            ("total", self.total),
        ]
        return "\n".join(f"{name:36}{size / 1e9:8.2f} GB" for name, size in rows)

    def _against(self, available: int | None) -> str:
        total = f"{self.total / 1e9:.1f} GB in total"
        return total if available is None else f"{total}, {'fits' if self.fits(available) else 'still too much'}"

    def _changes(self) -> list[tuple[str, Callable[[Workload], dict[str, Any]]]]:
        """(label, workload -> fields to replace) of every change that may help; they are applied in this order."""
        work = self.workload
        changes: list[tuple[str, Callable[[Workload], dict[str, Any]]]] = []
        if work.dtype == torch.float32:
            changes.append(("bfloat16 weights (dtype=bfloat16)", lambda _: {"dtype": torch.bfloat16}))
        if work.batch > 1:
            changes.append(("one request at a time", lambda _: {"batch": 1}))
        if len(work.images) > 1:
            changes.append(("only the last input image", lambda _: {"images": work.images[-1:]}))
        for quarters in (3, 2):  # the smaller size last, because it replaces the larger one
            smaller = partial(self._smaller, quarters)
            height, width = replace(work, **smaller(work)).drawn
            if work.draws and (height, width) != work.drawn:
                changes.append((f"images of {width}x{height}", smaller))
        if work.max_think_token_n > _LONG_TEXT:
            changes.append((f"max_think_token_n={_LONG_TEXT}", lambda _: {"max_think_token_n": _LONG_TEXT}))
        if work.draws and work.branches == 3:
            settings = replace(work.settings, cfg_img_scale=1.0)
            changes.append(("cfg_img_scale=1", lambda _: {"settings": settings}))
        if work.graphs:
            changes.append(("graphs=False, slower", lambda _: {"graphs": False}))
        return changes

    def _smaller(self, quarters: int, work: Workload) -> dict[str, Any]:
        """Sizes scaled by ``quarters`` / 4."""
        if work.images:
            images = self.workload.images[-len(work.images) :]
            return {"images": tuple(tuple(max(1, side * quarters // 4) for side in size) for size in images)}
        stride = work.config.latent_stride
        return {"size": tuple(max(1, side * quarters // 4 // stride) * stride for side in self.workload.size)}


def expected_memory(config: BagelConfig, **workload: Any) -> MemoryEstimate:
    """Estimate the device memory of a request, the first after loading. Nothing is allocated.

    Args:
        config: of the model, from :meth:`BagelConfig.from_folder`.
        workload: arguments of :meth:`Workload.with_defaults`.

    Raises:
        ValueError: the request could not run.
    """
    return _estimate(Workload.with_defaults(config, **workload))


def _estimate(work: Workload) -> MemoryEstimate:
    config = work.config
    llm, itemsize = config.llm, work.dtype.itemsize
    slot = 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * itemsize
    slots, before = cache_slots(work)
    phases = {"growing the KV cache": before * slot, "prefill": _prefill(work)}
    if work.draws:
        phases["encoding images"] = max((encode_memory(config.vae, *size) for size in work.resized), default=0)
        phases["denoising"] = _denoising(work)
        phases["decoding images"] = decode_memory(config.vae, *work.drawn)
    if work.written:
        texts = min(work.batch, MAX_TEXTS)
        # Logits in the model's dtype and, at most, twice in float32: divided by the temperature, and with noise added.
        phases["decoding text"] = _forward(llm, texts, itemsize) + texts * llm.vocab_size * (itemsize + 8)
    graphs, phase = _peak(phases, work.graphs)
    return MemoryEstimate(work, _weights(config, work.dtype), slots * slot, _buffers(work), graphs, phases, phase)


def _peak(phases: dict[str, int], graphs: bool) -> tuple[int, str]:
    """(bytes of the graphs' memory pool, phase) at peak memory.

    All graphs share one pool, which is as large as the largest captured phase, because they run one after another. A
    phase is captured at its second run, so the pool grows in the order of the list below.
    """

    def pool(names: set[str]) -> int:
        return max((phases[name] for name in names & phases.keys()), default=0) * graphs

    steps = {"denoising", "decoding text"}
    moments = [
        (pool({"decoding text"}), {"growing the KV cache"}),  # before the first denoising step
        (pool(steps), steps | {"decoding images"}),  # the first request: its image is decoded eagerly
        (pool(steps | {"decoding images"}), {"prefill", "encoding images"}),  # a second request like it
    ]
    candidates = [
        (bytes_of_graphs, name) for bytes_of_graphs, names in moments for name in sorted(names & phases.keys())
    ]
    return max(candidates, key=lambda moment: moment[0] + phases[moment[1]])


def explain(config: BagelConfig, dtype: torch.dtype, *, available: int | None = None, **workload: Any) -> str:
    """The expected memory of a request and the advice, as text for an out-of-memory error.

    Args:
        config, dtype: of the model.
        available: bytes of the whole device.
        workload: other arguments of :meth:`Workload.with_defaults`.

    Raises:
        ValueError: the request could not run.
    """
    estimate = expected_memory(config, dtype=dtype, **workload)
    capacity = f"; the device has {available / 1e9:.1f} GB" if available is not None else ""
    lines = [f"the request needs about {estimate.total / 1e9:.1f} GB in total{capacity}:", str(estimate)]
    if available is not None and estimate.fits(available):
        lines.append("that should fit: free memory used by other programs, or by other tensors of this one")
    if advice := estimate.advice_text(available):
        lines.append(advice)
    return "\n".join(lines)


def explain_requests(
    config: BagelConfig,
    dtype: torch.dtype,
    tokenizer: Tokenizer,
    requests: Sequence[Any],
    available: int | None,
    graphs: bool,
) -> str:
    """:func:`explain` for a batch of :class:`~bagel_rt.request.Request`, estimated as if all were like the largest."""
    draws = requests[0].draws

    def counted(request: Any) -> tuple[int, int]:
        return count_tokens(config, tokenizer, request.parts, draws)[:2]

    request = max(requests, key=lambda request: sum(counted(request)))
    images = [part.size[::-1] for part in request.inputs if isinstance(part, Image.Image)]
    return explain(
        config,
        dtype,
        available=available,
        task="chat" if not draws else "edit" if images else "generate",
        size=request.size if draws else None,
        images=images,
        batch=len(requests),
        text_tokens=max(1, counted(request)[0]),
        max_think_token_n=request.text.max_think_token_n if request.generates_text else 0,
        settings=request.image if draws else None,
        graphs=graphs,
    )


def cache_slots(work: Workload, growth: int = GROWTH) -> tuple[int, int]:
    """(slots of the KV cache after the request, slots before its last growth), starting from an empty cache.

    Args:
        growth: minimum number of slots by which the cache grows; 0 on a CPU.
    """
    image = work.rows if work.draws else 0
    rooms = [work.text_tokens + work.image_tokens + work.written + image]
    if work.draws and work.images:
        rooms.append(work.text_tokens + image)  # the context without images has its own slots
    # Branches whose context is not followed by free slots: the one without text, and the one without the thought.
    apart = (work.branches > 1) + (work.branches > 2 and not work.images)
    slots = before = room = 0
    for length in rooms * work.batch + [image] * apart * work.group:
        if length > room:
            before, grown = slots, max(length - room, slots // 2, growth)
            slots, room = slots + grown, room + grown
        room -= length
    return slots, before


@lru_cache(maxsize=8)  # advice estimates several workloads
def _weights(config: BagelConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights, counted on the meta device by storage, because fused parameters share storages."""
    slots = BagelWeights.allocate(config, "meta", dtype).weight_slots(config).values()
    with torch.device("meta"):
        vae = AutoEncoder(config.vae)
    storages = {tensor.untyped_storage() for tensor in (*(slot.view for slot in slots), *vae.parameters())}
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _forward(llm: TransformerConfig, rows: int, itemsize: int) -> int:
    """Peak bytes of the decoder stack for ``rows`` rows, excluding its input (see ``Transformer``)."""
    H, heads = llm.hidden_size, llm.num_heads * llm.head_dim
    attend = 2 * H + (heads + 2 * llm.num_kv_heads * llm.head_dim) + 2 * heads  # hidden, norm or sum; qkv; q, output
    feed_forward = 2 * H + llm.intermediate_size  # hidden, norm or sum; SwiGLU's output
    return rows * itemsize * max(attend, feed_forward)


def _plan(llm: TransformerConfig, rows: int) -> int:
    """Bytes of a :class:`~bagel_rt.runtime.batch.ForwardBatch`: float32 rotary tables, slots, limits and blocks."""
    return rows * (4 * llm.head_dim + 16)


def _prefill(work: Workload) -> int:
    """Peak bytes of the packed prefill."""
    config, itemsize = work.config, work.dtype.itemsize
    H, vit = config.llm.hidden_size, config.vit
    texts = work.text_tokens * (1 + (work.draws and bool(work.images)))  # a second time in the context without images
    thoughts = work.written * work.draws
    rows = min(work.batch * max(texts + work.image_tokens, thoughts), MAX_ROWS)
    packed = rows * H * itemsize + _plan(config.llm, rows) + _forward(config.llm, rows, itemsize)
    # The vision tower runs before any row is packed. It needs the patches in both dtypes, and the largest of: input and
    # output of a block with its QKV, with its MLP before and after GELU, or the layers of the connector.
    V, F = vit.hidden_size, vit.intermediate_size
    block = max(5 * V + 2 * F, 7 * V + F, V + 3 * H)
    patches = min(work.batch * work.patches, MAX_ROWS)
    return max(packed, patches * (config.patch_features * (itemsize + 4) + block * itemsize))


def _denoising(work: Workload) -> int:
    """Peak bytes of a step: the decoder stack, the embedded latents and the velocities."""
    config, itemsize = work.config, work.dtype.itemsize
    latents = work.group * work.latents
    rows = work.branches * work.group * work.rows
    embedded = latents * config.llm.hidden_size * itemsize
    return embedded + _forward(config.llm, rows, itemsize) + rows * config.latent_features * itemsize


def _buffers(work: Workload) -> int:
    """Bytes of the static buffers."""
    config, itemsize = work.config, work.dtype.itemsize
    llm, H = config.llm, config.llm.hidden_size
    total = 0
    if work.written:
        positions = work.text_tokens + 2 * len(work.images) + work.max_think_token_n  # an image has one or two
        total += 4 * llm.head_dim * table_size(positions)  # rotary tables
        capacity = token_capacity(work.max_think_token_n)
        # Per text: the row fed next, the drawn tokens, four counters, start slot, seed and three sampling numbers.
        total += min(work.batch, MAX_TEXTS) * (H * itemsize + 8 * (capacity + 9))
    if work.draws:
        latents = work.group * work.latents
        guided, steps = work.guided_steps
        apart = work.branches > 1 and guided < steps  # unguided steps have their own packed buffers
        for branches in {work.branches, 1} if apart else {work.branches}:
            rows = branches * work.group * work.rows
            total += rows * (H * itemsize + 8) + _plan(llm, rows)
        capacity = step_capacity(steps)
        total += (latents + capacity) * H * itemsize  # embeddings of positions and times
        total += latents * config.latent_features * 4  # the state
        total += (capacity + 2) * work.group * 20  # cfg_table of every step, image_table of both packed forwards
        total += 4 * (work.latents * config.latent_features + 3 * math.prod(work.drawn))  # a latent and its pixels
    return total
