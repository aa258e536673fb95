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
    """Continue a context with text; the context itself is left as it is. Use it under ``torch.inference_mode()``.

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
    steps = torch.arange(max_length, device=device)
    cos, sin = model.rope(context.position + steps)
    slots, lengths = write + steps, context.length + 1 + steps
    starts = torch.tensor([session.key_start], device=device)
    seeds = torch.tensor([seed], device=device)
    token = torch.tensor([start], device=device)
    for index in range(max_length):
        now = slice(index, index + 1)
        rows = Rows(0, cos[now], sin[now], slots[now], starts=starts, lengths=lengths[now])
        hidden = model.transformer.forward(model.embed_tokens(token), rows, context.cache)
        token = sample(model.logits(hidden), temperature, seeds, steps[now])
        value = int(token)
        if value == stop or index == max_length - 1:
            return
        yield value
