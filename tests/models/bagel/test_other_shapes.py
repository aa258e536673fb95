"""Models of other shapes against a naive implementation: one dense sequence, token by token, in float64.

The recorded cases have one shape. These tests create checkpoints of random models with other head counts, odd widths
and other autoencoders, and compute every row of a request from the stored tensors by the formulas.
"""

import math
from dataclasses import replace

import denoising
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKPOINT
from PIL import Image
from safetensors.torch import load_file

from bagel_rt import Bagel
from bagel_rt.models.bagel.config import BagelConfig, VAEConfig
from bagel_rt.models.bagel.images import ResizeRule
from bagel_rt.models.bagel.random_checkpoint import make_random_checkpoint
from bagel_rt.models.bagel.settings import ImageSettings
from bagel_rt.runtime.context import Prefill

TINY = BagelConfig.from_folder(CHECKPOINT)
LLM = replace(TINY.llm, rope_theta=1e4)


def make_config(hidden, heads, kv_heads, ffn, layers=2, vit=(24, 3, 30), vae=None, **top):
    llm = replace(
        LLM, hidden_size=hidden, num_heads=heads, num_kv_heads=kv_heads, head_dim=hidden // heads,
        intermediate_size=ffn, num_layers=layers,
    )  # fmt: skip
    tower = replace(TINY.vit, hidden_size=vit[0], num_heads=vit[1], intermediate_size=vit[2], num_layers=1)
    return replace(TINY, llm=llm, vit=tower, vae=vae or TINY.vae, **top)


SHAPES = {
    "one head, one layer": make_config(8, 1, 1, 5, layers=1),
    "seven query heads to one KV head, an odd MLP": make_config(84, 7, 1, 101),
    "as many KV heads as query heads": make_config(48, 3, 3, 64),
    "head_dim 72 and a wide tower": make_config(144, 2, 1, 32, vit=(144, 2, 19)),
    "a two-level autoencoder of eight channels": make_config(
        32, 2, 2, 33,
        vae=VAEConfig(ch=32, ch_mult=(2, 1), num_res_blocks=2, z_channels=8, scale_factor=0.7, shift_factor=-0.2),
        max_latent_size=32, vae_transform=ResizeRule(64, 32, 8),
    ),
    "latent patches of one cell": make_config(
        32, 4, 2, 40, latent_patch_size=1, max_latent_size=17, vae_transform=ResizeRule(64, 32, 8),
    ),
}  # fmt: skip


class Naive:
    """The decoder by the formulas of the official code, with lists of keys and values that have one entry per token."""

    def __init__(self, weights, config):
        self.w, self.c = {name: tensor.double() for name, tensor in weights.items()}, config.llm
        self.keys = [[] for _ in range(self.c.num_layers)]
        self.values = [[] for _ in range(self.c.num_layers)]

    def norm(self, x, weight):
        return x / (x.square().mean(-1, keepdim=True) + self.c.rms_norm_eps).sqrt() * weight

    def rotate(self, x, position):
        half = self.c.head_dim // 2
        angle = position * torch.tensor([self.c.rope_theta ** (-2 * i / self.c.head_dim) for i in range(half)]).double()
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def run(self, tokens, causal, keep=True):
        """Run tokens of (hidden, position, expert suffix); return the normalized last hidden state of each."""
        c, w = self.c, self.w
        state = [hidden for hidden, _, _ in tokens]
        for layer in range(c.num_layers):
            p = f"language_model.model.layers.{layer}."
            queries, keys, values = [], [], []
            for x, (_, position, e) in zip(state, tokens, strict=True):
                y = self.norm(x, w[f"{p}input_layernorm{e}.weight"])
                q, k, v = (
                    (w[f"{p}self_attn.{n}_proj{e}.weight"] @ y + w[f"{p}self_attn.{n}_proj{e}.bias"]).view(
                        -1, c.head_dim
                    )
                    for n in "qkv"
                )
                queries.append(self.rotate(self.norm(q, w[f"{p}self_attn.q_norm{e}.weight"]), position))
                keys.append(self.rotate(self.norm(k, w[f"{p}self_attn.k_norm{e}.weight"]), position))
                values.append(v)
            for index, (_, _, e) in enumerate(tokens):
                visible = index + 1 if causal else len(tokens)
                all_keys = torch.stack(self.keys[layer] + keys[:visible])
                all_values = torch.stack(self.values[layer] + values[:visible])
                heads = []
                for head in range(c.num_heads):
                    kv_head = head // (c.num_heads // c.num_kv_heads)
                    weights = (all_keys[:, kv_head] @ queries[index][head] / math.sqrt(c.head_dim)).softmax(0)
                    heads.append(weights @ all_values[:, kv_head])
                state[index] = state[index] + w[f"{p}self_attn.o_proj{e}.weight"] @ torch.cat(heads)
                y = self.norm(state[index], w[f"{p}post_attention_layernorm{e}.weight"])
                gate, up = (w[f"{p}mlp{e}.{n}_proj.weight"] @ y for n in ("gate", "up"))
                state[index] = state[index] + w[f"{p}mlp{e}.down_proj.weight"] @ (F.silu(gate) * up)
            if keep:
                self.keys[layer] += keys
                self.values[layer] += values
        return [
            self.norm(x, w[f"language_model.model.norm{e}.weight"]) for x, (_, _, e) in zip(state, tokens, strict=True)
        ]

    def embed(self, token):
        return self.w["language_model.model.embed_tokens.weight"][token]

    def time(self, t):
        frequencies = torch.tensor([10000 ** (-i / 128) for i in range(128)]).double()
        x = torch.cat([(t * frequencies).cos(), (t * frequencies).sin()])
        x = F.silu(self.w["time_embedder.mlp.0.weight"] @ x + self.w["time_embedder.mlp.0.bias"])
        return self.w["time_embedder.mlp.2.weight"] @ x + self.w["time_embedder.mlp.2.bias"]

    def latents(self, tokens, grid, side, t):
        _, grid_w = grid
        for index, token in enumerate(tokens.double()):
            position = (index // grid_w) * side + index % grid_w
            projected = self.w["vae2llm.weight"] @ token + self.w["vae2llm.bias"]
            yield projected + self.time(t) + self.w["latent_pos_embed.pos_embed"][position]


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def bagel_and_weights(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_random_checkpoint(folder, request.param, seed=1, shard_bytes=1 << 30, tokenizer=CHECKPOINT)
    weights = {}
    for shard in sorted(folder.glob("ema*.safetensors")):
        weights |= load_file(shard)
    return Bagel.from_pretrained(folder, device="cpu"), weights


def test_text_image_and_denoising_step_match_the_naive_model(bagel_and_weights):
    bagel, weights = bagel_and_weights
    model, config = bagel.model, bagel.model.config
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    with torch.inference_mode():
        prefill = Prefill(model, bagel.cache)
        contexts = model.open_contexts(prefill, bagel.tokenizer, [], seed=4)
        contexts.add_text("a red boat")
        contexts.add_image(image)
        contexts.add_text("make it night")
        prefill.run()
        grid = (2, 3)
        noise = torch.randn(6, config.latent_features)
        settings = ImageSettings(num_timesteps=3, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0))
        denoiser = denoising.start(model, bagel.cache, contexts.branches, noise, settings, grid)
        velocities = denoiser.branch_outputs(0)[0]

    first, vae, vit, last = contexts.cond.history
    vit_tokens = model.embed_patches([vit])[0].double()  # the vision tower has its own tests
    start, end = model.markers
    for velocity, contents in zip(velocities, ([first, vae, vit, last], [first, vae, vit], [first, last]), strict=True):
        naive, position = Naive(weights, config), 0
        for content in contents:
            if content is first or content is last:
                naive.run([(naive.embed(token), position + i, "") for i, token in enumerate(content.ids)], causal=True)
                position += len(content.ids)
                continue
            inner, expert = (vit_tokens, "") if content is vit else (
                naive.latents(vae.latents, (vae.grid_h, vae.grid_w), config.max_latent_size, 0.0), "_moe_gen",
            )  # fmt: skip
            tokens = [(naive.embed(start), position, ""), *((x, position, expert) for x in inner)]
            naive.run([*tokens, (naive.embed(end), position, "")], causal=False)
            position += 1
        inner = naive.latents(noise, grid, config.max_latent_size, 1.0)
        tokens = [(naive.embed(start), position, ""), *((x, position, "_moe_gen") for x in inner)]
        hidden = naive.run([*tokens, (naive.embed(end), position, "")], causal=False, keep=False)[1:-1]
        expected = torch.stack([naive.w["llm2vae.weight"] @ x + naive.w["llm2vae.bias"] for x in hidden])
        assert (velocity - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_every_task_runs(bagel_and_weights):
    bagel, _ = bagel_and_weights
    image = Image.new("RGB", (50, 30), "red")
    generated = bagel.generate(["a", "b"], seed=1, num_timesteps=3)
    assert [result.image.size for result in generated] == [(bagel.model.config.default_resolution,) * 2] * 2
    edited = bagel.edit(image, "make it blue", seed=1, num_timesteps=3, think=True, max_think_token_n=4)
    assert edited.image.size == bagel.model.config.vae_transform.output_size(50, 30)
    assert isinstance(bagel.chat("what?", image, max_think_token_n=4), str)
