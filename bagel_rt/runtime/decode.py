"""Autoregressive text: one token of each row per forward, appended to private clones of the contexts.

What a token needs (the last one, slots, lengths, positions, the sampler's state) lies in buffers that the step itself
advances, so a step is the same launches on the same addresses (see ``bagel_rt.runtime.graphs``). On CUDA tokens are
read a few steps behind, while the next steps run; what was computed beyond the end of a text is dropped.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bagel_rt.kernels import sample
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.transformer import Rows
from bagel_rt.runtime.context import Context
from bagel_rt.runtime.graphs import GraphCache

MAX_TEXTS = 8  # decoded together; the kernels of the one-token path take no more
READ_EVERY = 8  # tokens at most between two looks at what was written, on CUDA


@dataclass(frozen=True)
class Sampling:
    """How one text is sampled.

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
    """What steps read and write, of B texts.

    Attributes:
        token: int64 [B], to be fed next.
        counters: int64 [4, B], all advanced by one at each step: the slot of the token's key, the length of the context
            with it, its RoPE position, the number of the step.
        starts: int64 [B], slots of the contexts' first tokens.
        sampling: float32 [B, 3], temperature, top_k and top_p; None if all texts take the most likely tokens.
        seeds: int64 [B].
        written: int64 [steps, B], the tokens.
    """

    token: torch.Tensor
    counters: torch.Tensor
    starts: torch.Tensor
    sampling: torch.Tensor | None
    seeds: torch.Tensor
    written: torch.Tensor

    @classmethod
    def allocate(cls, texts: int, steps: int, greedy: bool, device: torch.device) -> "_Buffers":
        def integers(*shape):
            return torch.zeros(shape, dtype=torch.int64, device=device)

        sampling = None if greedy else torch.zeros(texts, 3, device=device)
        return cls(
            integers(texts), integers(4, texts), integers(texts), sampling, integers(texts), integers(steps, texts)
        )


class TextLoop:
    """The decoding of up to 8 texts, one token of each a step; see :func:`generate_tokens`."""

    def __init__(self, model: BagelModel, contexts: Sequence[Context], start: int, max_length: int, sampling, graphs):
        self.model, self.cache, self.graphs = model, contexts[0].cache, graphs
        sessions = [context.clone() for context in contexts]
        writes = [session.extend(max_length) for session in sessions]
        self._sessions = sessions  # keep the slots
        greedy = all(row.temperature == 0 for row in sampling)
        capacity = 1 << max(10, (max_length - 1).bit_length())
        self._workspace = graphs.workspace(
            ("decode", len(contexts), greedy, capacity),
            lambda: _Buffers.allocate(len(contexts), capacity, greedy, model.device),
            self,
        )
        self.buffers: _Buffers = self._workspace.buffers
        self._rope = model.rope_table(max(context.position for context in contexts) + max_length)
        self._fill(contexts, writes, start, sampling)

    def step(self) -> None:
        """Feed the last tokens and write the next ones."""
        self.graphs.run(self._workspace, "token", self._step)

    def close(self) -> None:
        """Give the buffers back."""
        self._workspace.give_back()

    def _fill(self, contexts, writes: list[int], start: int, sampling: Sequence[Sampling]) -> None:
        buffers = self.buffers
        rows = zip(contexts, writes, strict=True)
        counters = [(write, context.length + 1, context.position, 0) for context, write in rows]
        buffers.counters.copy_(torch.tensor(counters).T)
        buffers.token.fill_(start)
        buffers.starts.copy_(torch.tensor([session.key_start for session in self._sessions]))
        buffers.seeds.copy_(torch.tensor([row.seed for row in sampling]))
        if buffers.sampling is not None:
            buffers.sampling.copy_(torch.tensor([(row.temperature, row.top_k, row.top_p) for row in sampling]))

    def _step(self) -> None:
        model, buffers = self.model, self.buffers
        slots, lengths, positions, steps = buffers.counters.unbind(0)
        cos, sin = self._rope.index_select(1, positions).unbind(0)
        rows = Rows(0, cos, sin, slots, starts=buffers.starts, lengths=lengths)
        hidden = model.transformer.forward(model.embed_tokens(buffers.token), rows, self.cache)
        if buffers.sampling is None:
            token = sample(model.logits(hidden))
        else:
            token = sample(model.logits(hidden), buffers.sampling, buffers.seeds, steps)
        buffers.token.copy_(token)
        buffers.written.index_copy_(0, steps[:1], token[None])
        buffers.counters.add_(1)


def generate_tokens(
    model: BagelModel,
    contexts: Sequence[Context],
    start: int,
    stop: int,
    max_length: int,
    sampling: Sequence[Sampling] | None = None,
    graphs: GraphCache | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue contexts with texts; the contexts themselves are left as they are. Use it under
    ``torch.inference_mode()``.

    Args:
        model: the network.
        contexts: what was said so far, 1 to 8 of them, in one cache.
        start: the token fed first (<|im_start|>).
        stop: the token that ends a text (<|im_end|>); it is not yielded.
        max_length: forward passes at most. The tokens drawn by the last one are dropped, as in the official code, so a
            text has at most ``max_length - 1`` tokens.
        sampling: one for each context; by default all take the most likely tokens.
        graphs: where buffers and the captured step are kept for the next texts.

    Yields:
        (number of the context, token id), each as soon as it is known; after a text's end nothing more of it.

    Raises:
        ValueError: no context, or too many.
    """
    if not 1 <= len(contexts) <= MAX_TEXTS:
        raise ValueError(f"{len(contexts)} texts at once: allowed are 1 to {MAX_TEXTS}")
    sampling = sampling or [Sampling()] * len(contexts)
    loop = TextLoop(model, contexts, start, max_length, sampling, graphs or GraphCache(None))
    running = set(range(len(contexts)))
    try:
        for index, tokens in enumerate(_tokens(loop, max_length)):
            for number in sorted(running):
                if tokens[number] == stop or index == max_length - 1:
                    running.discard(number)
                else:
                    yield number, tokens[number]
            if not running:
                return
    finally:
        loop.close()


def _tokens(loop: TextLoop, max_length: int) -> Iterator[list[int]]:
    """The tokens of every step, step by step. On CUDA the device is some steps ahead of what is read."""
    written = loop.buffers.written
    ahead, reads, launched = written.is_cuda, deque(), 0
    while launched < max_length or reads:
        if launched < max_length and len(reads) <= ahead:
            first = launched
            # Few at first: whoever waits for the first token should not wait for the eighth.
            launched = min(max_length, first + (min(READ_EVERY, max(1, first)) if ahead else 1))
            for _ in range(first, launched):
                loop.step()
            reads.append(_Read(written[first:launched]))
        else:
            yield from reads.popleft().wait()


class _Read:
    """Numbers on their way from the device to the host."""

    def __init__(self, numbers: torch.Tensor):
        self._numbers, self._arrived = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record()

    def wait(self) -> list[list[int]]:
        """The numbers, when they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
