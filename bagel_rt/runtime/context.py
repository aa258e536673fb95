"""What a model has been shown: contexts over the KV cache, and the packed forward that extends them."""

from dataclasses import dataclass

import numpy as np
import torch

from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.runtime.plan import Plan, Segment, build_plan
from bagel_rt.runtime.slots import KVCache, SlotRange

MAX_ROWS = 1 << 15  # of one packed forward, where there is a choice: more brings no speed and takes memory


@dataclass(frozen=True)
class Text:
    """Token ids, the frame (<|im_start|> ... <|im_end|>) included. Causal, one RoPE position a token."""

    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ViTImage:
    """An image for the understanding expert: patches [rows * columns, features]. All tokens share one position."""

    patches: torch.Tensor
    rows: int
    columns: int


@dataclass(frozen=True, eq=False)
class VAEImage:
    """A clean image for the generation expert: latent tokens [rows * columns, features], at one position."""

    latents: torch.Tensor
    rows: int
    columns: int


Content = Text | ViTImage | VAEImage


class Context:
    """A run of appended contents: a prefix of a storage, the next RoPE position, and what was said.

    Attributes:
        length: tokens in the KV cache.
        position: RoPE position of the next token.
        history: the contents, in order. Two contexts of equal history hold equal keys and values.
    """

    def __init__(self, cache: KVCache, capacity: int = 0):
        """An empty context that will take ``capacity`` slots at once when the first content arrives."""
        self.cache = cache
        self.capacity = capacity
        self.storage: SlotRange | None = None
        self.length = 0
        self.position = 0
        self.history: tuple[Content, ...] = ()

    @property
    def key_start(self) -> int:
        """Slot of the first token."""
        return self.storage.start if self.storage else 0

    def clone(self) -> "Context":
        """An independent context that shares the slots."""
        twin = Context(self.cache)
        twin.length, twin.position, twin.history = self.length, self.position, self.history
        if self.storage:
            twin._live_in(self.storage)
        return twin

    def same_as(self, other: "Context") -> bool:
        """Whether both were shown the same contents (images: the very same encodings)."""
        return self.history == other.history and self.position == other.position

    def fits(self, extra: int) -> bool:
        """Whether ``extra`` tokens can be written behind this context without moving it."""
        return self.storage is not None and self.storage.can_extend(self.length, extra)

    def extend(self, extra: int) -> int:
        """Take ``extra`` slots behind the context; the first one. Copies the context where it cannot grow in place."""
        if not self.fits(extra):
            storage = SlotRange(self.cache, max(self.length + extra, self.capacity, 1))
            if self.storage:
                self.cache.copy(self.storage.start, storage.start, self.length)
            self._live_in(storage)
        self.length += extra
        return self.key_start + self.length - extra

    def borrow(self, extra: int) -> "Context":
        """A holder of ``extra`` slots for tokens that see this context but are never stored in it.

        The slots lie right behind the context where that is free, else anywhere; they are the holder's last ones, and
        free again when it is dropped.
        """
        holder = self.clone() if self.fits(extra) else Context(self.cache)
        holder.extend(extra)
        return holder

    def _live_in(self, storage: SlotRange) -> None:
        if self.storage:
            self.storage.holders.discard(self)
        self.storage = storage
        storage.holders.add(self)


class Prefill:
    """Collects appends to any contexts and runs them as one packed forward.

    Contexts advance at once, so that they can be cloned between appends; their keys and values are there after
    :meth:`run`. Use it under ``torch.inference_mode()``.
    """

    def __init__(self, model: BagelModel, cache: KVCache):
        self.model = model
        self.cache = cache
        self._contents: list[Content] = []
        self._segments: list[Segment] = []
        self._positions: list[np.ndarray] = []
        self._storages: list[SlotRange | None] = []  # pending segments keep their slots taken

    def append(self, context: Context, content: Content) -> None:
        """Add a content behind a context. ValueError if it has no tokens."""
        if isinstance(content, Text):
            if not content.ids:
                raise ValueError("a text of no tokens: frame it with the start and end token at least")
            gen = np.zeros(len(content.ids), dtype=bool)
            mode, steps = "causal", len(content.ids)
            positions = context.position + np.arange(steps)
        else:
            gen = np.full(content.rows * content.columns + 2, isinstance(content, VAEImage))
            gen[[0, -1]] = False  # the two markers go through the understanding expert
            mode, steps = "full", 1
            positions = np.full(len(gen), context.position)
        pending = sum(len(segment.gen) for segment in self._segments)
        if (context.length and not context.fits(len(gen))) or pending + len(gen) > MAX_ROWS:
            self.run()  # a context that moves takes its keys along, so they must exist; and memory is bounded
        visible = context.length
        write = context.extend(len(gen))
        self._segments.append(Segment(mode, gen, context.key_start, visible, write))
        self._positions.append(positions)
        self._contents.append(content)
        self._storages.append(context.storage)
        context.position += steps
        context.history += (content,)

    def run(self) -> tuple[torch.Tensor, Plan] | None:
        """Compute what was appended.

        Returns:
            Hidden states [T, H] before the final norm, in the plan's packed order, and the plan; None if nothing was
            pending.
        """
        if not self._segments:
            return None
        plan, contents, positions = build_plan(self._segments), self._contents, np.concatenate(self._positions)
        self._contents, self._segments, self._positions = [], [], []
        hidden = self._embed(contents)[torch.from_numpy(plan.order).to(self.model.device)]
        hidden = self.model.transformer.forward(hidden, self.model.rows(plan, positions), self.cache)
        self._storages = []
        return hidden, plan

    def _embed(self, contents: list[Content]) -> torch.Tensor:
        """Hidden states of all rows in segment order, [T, H]. All ViT images go through the tower in one pack."""
        model = self.model
        images = [(c.patches, c.rows, c.columns) for c in contents if isinstance(c, ViTImage)]
        seen = model.embed_patches(images).split([r * c for _, r, c in images]) if images else ()
        seen = iter(seen)
        start, end = model.embed_markers().split(1) if any(not isinstance(c, Text) for c in contents) else (None, None)
        parts = []
        for content in contents:
            if isinstance(content, Text):
                parts.append(model.embed_tokens(torch.tensor(content.ids, device=model.device)))
            elif isinstance(content, ViTImage):
                parts += [start, next(seen), end]
            else:
                clean = model.time_embedding(torch.zeros(1, device=model.device))
                positions = model.latent_positions(content.rows, content.columns) + clean
                parts += [start, model.embed_latents(content.latents.to(model.device), positions), end]
        return torch.cat(parts)
