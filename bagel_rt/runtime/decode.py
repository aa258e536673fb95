"""Autoregressive decoding: one token of each row per forward, on clones of the contexts or in the contexts themselves.

What a step needs (the rows fed next, slots, lengths, positions, the sampler's state) lies in buffers that the step
itself advances, so a step is the same launches on the same addresses (see ``bagel_rt.runtime.graphs``). On CUDA tokens
are read a few steps behind, while the next steps run; what was computed beyond the end of a text is dropped.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bagel_rt.kernels import sample
from bagel_rt.runtime.batch import ForwardBatch
from bagel_rt.runtime.context import Context, DecodedText
from bagel_rt.runtime.graphs import GraphCache
from bagel_rt.runtime.interface import Model

MAX_TEXTS = 8  # texts decoded together where there is a choice: more rows leave the kernels of the one-token path
READ_EVERY = 8  # maximum tokens per device-to-host read


def token_capacity(max_length: int) -> int:
    """How many tokens the buffers have room for: powers of two, so that texts of similar length share buffers."""
    return 1 << max(10, (max_length - 1).bit_length())


@dataclass(frozen=True)
class TokenMode:
    """How tokens of one kind are read and drawn.

    Attributes:
        key: names the mode, with every number that its functions hold; captured steps are kept by it.
        embed: ids of drawn tokens int64 [n] -> the rows that are fed next, [n, H].
        logits: last hidden states [rows, H] (before the final norm) -> logits [rows, V].
        group: rows that share each drawn token, next to each other.
        combine: logits [rows / group, group, V] -> those to draw from, [rows / group, V]; needed where group > 1.
        mask: float32 [V], added to the logits: -inf for ids that this mode must not draw; None for all.
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
        temperature: 0 takes the most likely token; else the logits are divided by it.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens that have this probability together; 1 for all.
        seed: of the counter-based sampler.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class _Buffers:
    """What steps read and write, of B rows in g groups.

    Attributes:
        rows: [B, H], to be fed next.
        counters: int64 [4, B], all advanced by one at each step: the slot of the token's key, the length of the context
            with it, its RoPE position, the number of the step.
        starts: int64 [B], slots of the contexts' first tokens.
        sampling: float32 [g, 3], temperature, top_k and top_p; None if all groups take the most likely tokens.
        seeds: int64 [g].
        noise: float32 [steps, g, V], exponential draws in the place of the sampler's own; None for those.
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
    """The decoding of some rows, one token of each group a step; see :func:`generate_tokens`."""

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
    ):
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
        self._held = graphs.acquire(
            ("decode", mode.key, len(contexts), greedy, capacity, shape),
            lambda: self._allocate(first, capacity, greedy, noise),
            self,
        )
        self.buffers: _Buffers = self._held.buffers
        self._fill(first, list(zip(writes, lengths, positions, strict=True)), sampling, noise)

    def step(self) -> None:
        """Feed the last tokens and draw the next ones."""
        self.graphs.run(self._held, "token", self._step)

    def close(self) -> None:
        """Release the buffers."""
        self._held.release()

    def keep(self, row: int, fed: Sequence[int], max_length: int) -> None:
        """Leave the tokens that were fed to a row in its context, and give the room of the others back."""
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
        if buffers.noise is not None:
            buffers.noise[: len(noise)] = noise

    def _step(self) -> None:
        model, mode, buffers = self.model, self.mode, self.buffers
        slots, lengths, positions, steps = buffers.counters.unbind(0)
        cos, sin = self._rope.index_select(1, positions).unbind(0)
        batch = ForwardBatch(0, cos, sin, slots, starts=buffers.starts, lengths=lengths)
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
) -> Iterator[tuple[int, int]]:
    """Continue contexts with tokens. Use it under ``torch.inference_mode()``.

    Args:
        model: the network.
        mode: how the tokens are read and drawn.
        contexts: one per row, in one cache; the rows of a group are next to each other.
        start: the token fed first, one for all rows or one for each. It is embedded by ``model.embed_tokens``.
        stop: the token that ends a text, which is not yielded; None for exactly ``max_length`` tokens.
        max_length: forward passes at most. With ``stop`` the tokens drawn by the last one are dropped, as in the
            official code of BAGEL, so a text has at most ``max_length - 1`` tokens.
        sampling: one for each group; by default all take the most likely tokens.
        graphs: keeps buffers and the captured step for the next texts.
        noise: float32 [max_length, groups, V], exponential draws q: the token is argmax p / q of the probabilities
            after temperature, top_k and top_p.
        keep: leave the tokens that were fed, the start token first, in the contexts; otherwise they stay as they are.
            The last token of a text of fixed length is never fed: append it with what follows.

    Yields:
        (number of the group, token id), each as soon as it is known; nothing more of a text after its end.

    Raises:
        ValueError: no contexts, or numbers of rows, start tokens, samplings and noise that contradict each other.
    """
    rows, groups = len(contexts), len(contexts) // mode.group
    if not rows or rows % mode.group:
        raise ValueError(f"contexts must be a positive multiple of {mode.group}, got {rows}. Give one per row.")
    starts = [start] * rows if isinstance(start, int) else list(start)
    sampling = list(sampling) if sampling is not None else [Sampling()] * groups
    for name, given, wanted in (("start", len(starts), rows), ("sampling", len(sampling), groups)):
        if given != wanted:
            raise ValueError(f"{name} must have {wanted} entries, got {given}")
    if noise is not None and noise.shape[:2] != (max_length, groups):
        raise ValueError(f"noise must have shape [{max_length}, {groups}, V], got {tuple(noise.shape)}")
    loop = DecodeLoop(model, mode, contexts, starts, max_length, sampling, graphs or GraphCache(None), noise, keep)
    texts: list[list[int]] = [[] for _ in range(groups)]
    running, steps = set(range(groups)), 0
    try:
        for index, tokens in enumerate(_tokens(loop, max_length)):
            steps = index + 1
            for group in sorted(running):
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
    """The tokens of every step, step by step. On CUDA the device is some steps ahead of what is read."""
    written = loop.buffers.written
    ahead, reads, launched = written.is_cuda, deque(), 0
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

    def __init__(self, numbers: torch.Tensor):
        self._numbers, self._arrived = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record()

    def wait(self) -> list[list[int]]:
        """The numbers, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
