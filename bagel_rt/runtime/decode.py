"""Autoregressive decoding: one token of each row per forward, on clones of the contexts or in the contexts themselves.

The inputs of a step (the rows fed next, slots, lengths, positions, the state of the sampler) are in buffers that the
step itself advances, so every step is the same launches on the same addresses (see ``bagel_rt.runtime.graphs``). On
CUDA the host reads tokens a few steps late, while the next steps run; tokens after the end of a text are dropped.
"""

from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bagel_rt.errors import NonFiniteError
from bagel_rt.kernels import sample
from bagel_rt.runtime.batch import DecodeBatch
from bagel_rt.runtime.context import Context, DecodedText
from bagel_rt.runtime.graphs import GraphCache
from bagel_rt.runtime.interface import Model

MAX_TEXTS = 8  # texts decoded together if there is a choice: the one-token kernels take no more rows
READ_EVERY = 8  # maximum tokens per device-to-host read


def token_capacity(max_length: int) -> int:
    """Capacity of the buffers in tokens: a power of two, so that texts of similar length share buffers."""
    return 1 << max(10, (max_length - 1).bit_length())


@dataclass(frozen=True)
class TokenMode:
    """How tokens of one kind are embedded and drawn.

    Attributes:
        key: identifies the mode, including every number that its functions use; part of the key of captured steps.
        embed: ids of drawn tokens int64 [n] -> the rows that are fed next, [n, H].
        logits: last hidden states [rows, H] (before the final norm) -> logits [rows, V].
        group: number of adjacent rows that share each drawn token.
        combine: logits [rows / group, group, V] -> logits to draw from [rows / group, V]; required if group > 1.
        mask: float32 [V], added to the logits: -inf for ids that this mode must not draw; None allows all.
    """

    key: Hashable
    embed: Callable[[torch.Tensor], torch.Tensor]
    logits: Callable[[torch.Tensor], torch.Tensor]
    group: int = 1
    combine: Callable[[torch.Tensor], torch.Tensor] | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one group of rows are sampled.

    Attributes:
        temperature: divides the logits; 0 selects the most likely token.
        top_k: sample among the k most likely tokens; 0 for all.
        top_p: sample among the most likely tokens whose probabilities add up to this; 1 for all.
        seed: of the counter-based sampler.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class _Buffers:
    """The static buffers of the steps of B rows in g groups.

    Attributes:
        rows: [B, H], fed next.
        counters: int64 [4, B], all incremented by each step: the slot of the token's key, the length of the context
            including it, its RoPE position, the index of the step.
        starts: int64 [B], slots of the contexts' first tokens.
        sampling: float32 [g, 3], temperature, top_k and top_p; None if all groups select the most likely tokens.
        seeds: int64 [g].
        noise: float32 [steps, g, V], exponential draws to use instead of the sampler's own; None without them.
        written: int64 [steps, g], the tokens.
    """

    rows: torch.Tensor
    counters: torch.Tensor
    starts: torch.Tensor
    sampling: torch.Tensor | None
    seeds: torch.Tensor
    noise: torch.Tensor | None
    written: torch.Tensor


class DecodeLoop:
    """Decodes some rows, one token of each group per step; arguments as of :func:`generate_tokens`."""

    def __init__(
        self,
        model: Model,
        mode: TokenMode,
        contexts: Sequence[Context],
        start: Sequence[int],
        max_length: int,
        sampling: Sequence[Sampling],
        graphs: GraphCache,
        noise: torch.Tensor | None,
        keep: bool,
    ) -> None:
        self.model, self.mode, self.cache, self.graphs = model, mode, contexts[0].cache, graphs
        positions = [context.position for context in contexts]
        lengths = [context.length for context in contexts]
        self._contexts = list(contexts) if keep else [context.clone() for context in contexts]
        writes = [context.extend(max_length) for context in self._contexts]
        self._rope = model.rope.table(max(positions) + max_length)
        first = model.embed_tokens(torch.tensor(start, device=model.device))
        greedy = noise is None and all(group.temperature == 0 for group in sampling)
        capacity = token_capacity(max_length)
        shape = None if noise is None else tuple(noise.shape[1:])
        self._static = graphs.acquire(
            ("decode", mode.key, len(contexts), greedy, capacity, shape, self._rope.shape[1]),
            lambda: self._allocate(first, capacity, greedy, noise),
            self,
        )
        self.buffers = self._static.buffers
        self._fill(first, list(zip(writes, lengths, positions, strict=True)), sampling, noise)

    def step(self) -> None:
        """Feed the last tokens and draw the next ones."""
        self.graphs.run(self._static, "token", self._step)

    def close(self) -> None:
        """Release the buffers."""
        self._static.release()

    def keep(self, row: int, fed: Sequence[int], max_length: int) -> None:
        """Keep the tokens that were fed to a row in its context and shorten the context by the unused slots."""
        context = self._contexts[row]
        context.length -= max_length - len(fed)
        context.position += len(fed)
        context.history += (DecodedText(tuple(fed)),)

    def _allocate(self, first: torch.Tensor, steps: int, greedy: bool, noise: torch.Tensor | None) -> _Buffers:
        rows, device = len(first), first.device
        groups = rows // self.mode.group

        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return _Buffers(
            rows=torch.empty_like(first),
            counters=integers(4, rows),
            starts=integers(rows),
            sampling=None if greedy else torch.zeros(groups, 3, device=device),
            seeds=integers(groups),
            noise=None if noise is None else torch.empty(steps, *noise.shape[1:], device=device),
            written=integers(steps, groups),
        )

    def _fill(
        self,
        first: torch.Tensor,
        places: Sequence[tuple[int, int, int]],
        sampling: Sequence[Sampling],
        noise: torch.Tensor | None,
    ) -> None:
        buffers = self.buffers
        counters = [(write, length + 1, position, 0) for write, length, position in places]
        buffers.counters.copy_(torch.tensor(counters).T)
        buffers.rows.copy_(first)
        buffers.starts.copy_(torch.tensor([context.key_start for context in self._contexts]))
        buffers.seeds.copy_(torch.tensor([group.seed for group in sampling]))
        if buffers.sampling is not None:
            buffers.sampling.copy_(torch.tensor([(one.temperature, one.top_k, one.top_p) for one in sampling]))
        if buffers.noise is not None and noise is not None:
            buffers.noise[: len(noise)] = noise

    def _step(self) -> None:
        model, mode, buffers = self.model, self.mode, self.buffers
        slots, lengths, positions, steps = buffers.counters.unbind(0)
        cos, sin = self._rope.index_select(1, positions).unbind(0)
        batch = DecodeBatch(cos, sin, slots, buffers.starts, lengths)
        logits = mode.logits(model.transformer.forward(buffers.rows, batch, self.cache))
        if mode.combine is not None:
            logits = mode.combine(logits.unflatten(0, (-1, mode.group)))
        if mode.mask is not None:
            logits = logits + mode.mask
        step = steps[:1]
        if buffers.sampling is None:
            token = sample(logits)
        elif buffers.noise is None:
            token = sample(logits, buffers.sampling, buffers.seeds, steps[:: mode.group])
        else:
            noise = buffers.noise.index_select(0, step)[0]
            token = sample(logits, buffers.sampling, buffers.seeds, steps[:: mode.group], noise)
        buffers.written.index_copy_(0, step, token[None])
        token.clamp_(min=0)  # logits that are not finite give a negative id, which must not index the embedding
        buffers.rows.copy_(mode.embed(token if mode.group == 1 else token.repeat_interleave(mode.group)))
        buffers.counters.add_(1)


def generate_tokens(
    model: Model,
    mode: TokenMode,
    contexts: Sequence[Context],
    start: int | Sequence[int],
    stop: int | None,
    max_length: int,
    sampling: Sequence[Sampling] | None = None,
    graphs: GraphCache | None = None,
    noise: torch.Tensor | None = None,
    keep: bool = False,
) -> Generator[tuple[int, int], None, None]:
    """Continue contexts with tokens. Use it under ``torch.inference_mode()``.

    Args:
        model: the network.
        mode: how the tokens are embedded and drawn.
        contexts: one per row, in one cache; the rows of a group are adjacent.
        start: the token fed first, one for all rows or one for each. It is embedded by ``model.embed_tokens``.
        stop: the token that ends a text, which is not yielded; None for exactly ``max_length`` tokens.
        max_length: maximum number of forward passes. With ``stop`` the tokens drawn by the last one are dropped, as in
            the official code of BAGEL, so a text has at most ``max_length - 1`` tokens.
        sampling: one for each group; by default all select the most likely tokens.
        graphs: keeps buffers and the captured step for the next texts.
        noise: float32 [max_length, groups, V], exponential draws q: the token is argmax p / q of the probabilities
            after temperature, top_k and top_p.
        keep: append the tokens that were fed, the start token first, to the contexts; otherwise the contexts do not
            change. The last token of a text of fixed length is never fed: append it with the next content.

    Yields:
        (index of the group, token id), each as soon as it is known; nothing more of a text after its end.

    Raises:
        ValueError: no contexts, or numbers of rows, start tokens, samplings and noise that do not match.
        NonFiniteError: the logits of a text that has not ended are not finite.
    """
    rows, groups = len(contexts), len(contexts) // mode.group
    if not rows or rows % mode.group:
        raise ValueError(f"contexts must be a positive multiple of {mode.group}, got {rows}. Give one per row.")
    starts = [start] * rows if isinstance(start, int) else list(start)
    sampling = list(sampling) if sampling is not None else [Sampling()] * groups
    for name, actual, expected in (("start", len(starts), rows), ("sampling", len(sampling), groups)):
        if actual != expected:
            raise ValueError(f"{name} must have {expected} entries, got {actual}.")
    if noise is not None and noise.shape[:2] != (max_length, groups):
        raise ValueError(f"noise must have shape [{max_length}, {groups}, V], got {tuple(noise.shape)}.")
    loop = DecodeLoop(model, mode, contexts, starts, max_length, sampling, graphs or GraphCache(None), noise, keep)
    texts: list[list[int]] = [[] for _ in range(groups)]
    running, steps = set(range(groups)), 0
    try:
        for index, tokens in enumerate(_tokens(loop, max_length)):
            steps = index + 1
            for group in sorted(running):
                if tokens[group] < 0:  # NOT_FINITE of the sampler
                    raise NonFiniteError("the logits")
                if stop is not None and (tokens[group] == stop or index == max_length - 1):
                    running.discard(group)
                else:
                    texts[group].append(tokens[group])
                    yield group, tokens[group]
            if not running:
                return
    finally:
        loop.close()
        for row in range(rows if keep else 0):
            fed = [starts[row], *texts[row // mode.group]][:steps]  # the tokens of the last step were not fed
            loop.keep(row, fed, max_length)


def _tokens(loop: DecodeLoop, max_length: int) -> Iterator[list[int]]:
    """The tokens of every step. On CUDA the device runs some steps ahead of the host's reads."""
    written = loop.buffers.written
    reads: deque[_Read] = deque()
    ahead, launched = written.is_cuda, 0
    while launched < max_length or reads:
        if launched < max_length and len(reads) <= ahead:
            first = launched
            # Ramp up the read interval to keep the time to the first token low.
            launched = min(max_length, first + (min(READ_EVERY, max(1, first)) if ahead else 1))
            for _ in range(first, launched):
                loop.step()
            reads.append(_Read(written[first:launched]))
        else:
            yield from reads.popleft().wait()


class _Read:
    """A device-to-host copy of integers in flight."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = numbers
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record()

    def wait(self) -> list[list[int]]:
        """The numbers, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[list[int]] = self._numbers.tolist()
        return numbers
