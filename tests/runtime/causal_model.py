"""A very small model of another kind than BAGEL, for the seam between models and the runtime.

One expert; drawn ids have an embedding and a head of their own and come from two guided rows; an image is a causal
block that a time token precedes, embedded and read by the model around the transformer.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from bagel_rt.kernels import attention, decode_attention, linear, qk_norm_rope, rms_norm
from bagel_rt.runtime.batch import DecodeBatch, Rope
from bagel_rt.runtime.context import ContentRows
from bagel_rt.runtime.decode import TokenMode
from bagel_rt.runtime.slots import KVCache

H, D, HQ, HKV, V, C, N, LAYERS, EPS = 32, 8, 4, 2, 40, 6, 5, 2, 1e-6


@dataclass(frozen=True)
class Tokens:
    ids: tuple[int, ...]

    def rows(self, position):
        n = len(self.ids)
        none = np.zeros(n, bool)
        return ContentRows(none, position + np.arange(n), causal=True, advance=n, recomputed=none)


@dataclass(frozen=True)
class CausalImage:
    tokens: int

    def rows(self, position):
        n = self.tokens + 1  # the time token comes first
        return ContentRows(np.zeros(n, bool), position + np.arange(n), True, n, recomputed=np.ones(n, bool))


class CausalModel:
    def __init__(self):
        g = torch.Generator().manual_seed(0)
        matrix = lambda *shape: torch.randn(shape, generator=g) * shape[-1] ** -0.5  # noqa: E731
        self.device, self.transformer = torch.device("cpu"), self
        self.rope = Rope(D, 1e4, 256, self.device)
        self.tokens, self.ids, self.head = matrix(V, H) * 5, matrix(V, H) * 5, matrix(V, H)
        self.time, self.patch_in, self.patch_out = matrix(H, 1), matrix(H, C), matrix(C, H)
        self.ones, self.qk = torch.ones(H), torch.ones(HQ + HKV, D)
        shapes = {"qkv": ((HQ + 2 * HKV) * D, H), "o": (H, HQ * D), "up": (4 * H, H), "down": (H, 2 * H)}
        self.layers = [{name: matrix(*shape) for name, shape in shapes.items()} for _ in range(LAYERS)]
        self.image = TokenMode("ids, scale 3", lambda i: F.embedding(i, self.ids), self.logits, 2, self.guide)

    def make_cache(self):
        return KVCache(LAYERS, HKV, D, torch.float32, "cpu")

    def embed_tokens(self, ids):
        return F.embedding(ids, self.tokens)

    def embed(self, contents):
        zeros = lambda one: torch.zeros(one.tokens + 1, H)  # noqa: E731
        return torch.cat(
            [self.embed_tokens(torch.tensor(c.ids)) if isinstance(c, Tokens) else zeros(c) for c in contents]
        )

    def logits(self, hidden):
        return linear(self.norm(hidden), self.head, self.head, G=0)

    @staticmethod
    def guide(logits):  # of (conditional, unconditional) rows
        return logits[:, 1] + 3 * (logits[:, 0] - logits[:, 1])

    def norm(self, x):
        return rms_norm(x, None, self.ones, self.ones, 0, EPS)[0]

    def forward(self, x, batch, cache):
        for index, w in enumerate(self.layers):
            k, v = cache.layer(index)
            qkv = linear(self.norm(x), w["qkv"], w["qkv"], G=0)
            q = qk_norm_rope(qkv, self.qk, self.qk, batch.cos, batch.sin, batch.slots, k, v, 0, EPS)
            if isinstance(batch, DecodeBatch):
                y = decode_attention(q, k, v, batch.starts, batch.lengths)
            else:
                y = attention(q, k, v, batch.limits, batch.blocks)
            x = linear(y.flatten(1), w["o"], w["o"], G=0, residual=x)
            x = linear(linear(self.norm(x), w["up"], w["up"], G=0, swiglu=True), w["down"], w["down"], G=0, residual=x)
        return x

    def dense(self, rows):
        """Last hidden states of one sequence, every row before it visible, without a cache."""
        x, (cos, sin) = rows, (t[:, None] for t in self.rope(torch.arange(len(rows))))
        for w in self.layers:
            q, k, v = (self.norm(x) @ w["qkv"].T).unflatten(1, (-1, D)).split([HQ, HKV, HKV], 1)
            q, k = (F.rms_norm(t, (D,), None, EPS) for t in (q, k))
            q, k = (torch.cat([t[..., : D // 2] * cos - t[..., D // 2 :] * sin,
                               t[..., D // 2 :] * cos + t[..., : D // 2] * sin], -1) for t in (q, k))  # fmt: skip
            k, v = (t.repeat_interleave(HQ // HKV, 1) for t in (k, v))
            y = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True)
            x = x + y.transpose(0, 1).flatten(1) @ w["o"].T
            z = self.norm(x) @ w["up"].T
            x = x + (F.silu(z[:, 0::2]) * z[:, 1::2]) @ w["down"].T
        return x


class Flow:
    """Euler steps of v = 2 v_cond - v_uncond; its buffers are itself, as nothing in them changes from run to run."""

    guided, key = [True] * 4, "flow"

    def __init__(self, model):
        self.model, self.times = model, torch.arange(4.0)[:, None] / 4

    def __len__(self):
        return 4

    uses, allocate, fill = (lambda *_: True), (lambda self: self), (lambda *_: None)

    def encode(self, state, index):
        time = self.times.index_select(0, index) @ self.model.time.T
        return torch.cat([time, state @ self.model.patch_in.T]), state  # the skip around the transformer

    def outputs(self, hidden, carry, packed):
        hidden = self.model.norm(hidden).unflatten(0, (len(packed.sizes), -1))[:, 1:]  # without the time tokens
        return hidden @ self.model.patch_out.T + carry

    def update(self, state, outputs, packed, index, guided):
        state += (2 * outputs[0] - outputs[-1]) / 4
