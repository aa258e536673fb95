"""Autoregressive text: one token per forward, appended to a private clone of the context."""

from collections.abc import Iterator

import torch

from bagel_rt.context import Context
from bagel_rt.kernels import sample
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.transformer import Rows


def generate_tokens(
    model: BagelModel, context: Context, start: int, stop: int, max_length: int, temperature: float, seed: int
) -> Iterator[int]:
    """Continue a context with text; the context itself is left as it is.

    Args:
        model: the network.
        context: what was said so far.
        start: the token fed first (<|im_start|>).
        stop: the token that ends the text (<|im_end|>); it is not yielded.
        max_length: forward passes at most. The token drawn by the last one is dropped, as in the official code, so at
            most ``max_length - 1`` tokens are yielded.
        temperature: 0 takes the most likely token; else the logits are divided by it and sampled.
        seed: of the counter-based sampler.

    Yields:
        Token ids, each as soon as it is known.
    """
    device = model.device
    session = context.clone()
    write = session.extend(max_length)
    first = torch.arange(max_length, device=device)
    cos, sin = model.rope(context.position + torch.arange(max_length))
    starts = torch.tensor([session.key_start], device=device)
    lengths = context.length + 1 + first
    seeds = torch.tensor([seed], device=device)
    token = torch.tensor([start], device=device)
    columns = zip(*(table.split(1) for table in (cos, sin, first + write, lengths, first)), strict=True)
    for index, (c, s, slot, length, step) in enumerate(columns):
        rows = Rows(0, c, s, slot, starts=starts, lengths=length)
        hidden = model.transformer.forward(model.embed_tokens(token), rows, context.cache)
        token = sample(model.logits(hidden), temperature, seeds, step)
        value = int(token)
        if value == stop or index == max_length - 1:
            return
        yield value
