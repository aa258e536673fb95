"""Baseline for benchmarks: BAGEL composed of plain PyTorch operators as in the official code.

It uses this runtime's weights and gives the same results, but does the work of the official inferencer
(ByteDance-Seed/Bagel, commit 056b5fd), reimplemented:

- Rows stay in sequence order. Every norm, projection and MLP gathers the rows of each expert by index, runs the expert
  and scatters the results. Image latents use the generation expert, the two image markers the understanding expert.
- Query, key, value, gate and up are separate GEMMs.
- Guidance branches run one after another, including redundant ones: text-to-image runs three, two of which have the
  same context.
- A context owns its keys and values and is copied for each snapshot. Every layer of every step, and of every decoded
  token, concatenates them with the new keys and values.
- Attention is ``scaled_dot_product_attention``; everything else is elementwise operators and ``linear``.
- One request at a time; every token is read back by the host.

The autoencoder is this runtime's. Text decoding is greedy. ``compiler`` (such as ``torch.compile``) is applied to the
decoder layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from bagel_rt.models.bagel.contexts import Noise, frame_text
from bagel_rt.models.bagel.embed import position_ids, time_embedding, unpatchify
from bagel_rt.models.bagel.guidance import schedule
from bagel_rt.models.bagel.images import tensor_to_image, to_rgb
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE
from bagel_rt.models.bagel.settings import ImageSettings, resolve_settings
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.request import ImageResult, Progress


class Expert(NamedTuple):
    """One expert's weights of a decoder layer, split as in the official modules; views of the fused weights."""

    input_norm: torch.Tensor
    q: tuple[torch.Tensor, torch.Tensor]
    k: tuple[torch.Tensor, torch.Tensor]
    v: tuple[torch.Tensor, torch.Tensor]
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    o: torch.Tensor
    post_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass
class Context:
    """KV cache of a context: keys and values of every layer [n, kv_heads, head_dim], and the next RoPE position."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    position: int = 0

    def copy(self) -> "Context":
        """A deep copy."""
        return Context([k.clone() for k in self.keys], [v.clone() for v in self.values], self.position)


@dataclass
class ExpertRows:
    """int64 indices of the rows of the understanding and of the generation expert in a sequence."""

    und: torch.Tensor
    gen: torch.Tensor


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension: float32 statistics, rounded before the weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotary embedding of x [n, heads, D] with cos and sin [n, D]."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention of q [n, Hq, D] to k, v [m, Hkv, D]. The causal mask is aligned to the lower right."""
    n, m = len(q), len(k)
    mask, square = None, False
    if causal and n > 1:
        if n == m:
            square = True
        else:
            mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=square, enable_gqa=q.shape[1] != k.shape[1])
    return x[0].transpose(0, 1)


def und_layer(e: Expert, x, cos, sin, past_k, past_v, causal: bool, eps: float):
    """A decoder layer with understanding rows only; returns (x, concatenated keys, concatenated values)."""
    D, n = len(e.q_norm), len(x)
    normed = rms_norm(x, e.input_norm, eps)
    q, k, v = (F.linear(normed, *weights).view(n, -1, D) for weights in (e.q, e.k, e.v))
    q, k = rotate(rms_norm(q, e.q_norm, eps), cos, sin), rotate(rms_norm(k, e.k_norm, eps), cos, sin)
    k, v = torch.cat([past_k, k]), torch.cat([past_v, v])
    x = x + F.linear(attend(q, k, v, causal).flatten(1), e.o)
    normed = rms_norm(x, e.post_norm, eps)
    return x + F.linear(F.silu(F.linear(normed, e.gate)) * F.linear(normed, e.up), e.down), k, v


def routed_layer(und: Expert, gen: Expert, x, und_rows, gen_rows, cos, sin, past_k, past_v, eps: float):
    """A decoder layer with rows of both experts; returns (x, concatenated keys, concatenated values)."""
    D, n = len(und.q_norm), len(x)
    expert_rows = ((und, und_rows), (gen, gen_rows))
    normed = torch.zeros_like(x)
    for e, rows in expert_rows:
        normed[rows] = rms_norm(x[rows], e.input_norm, eps)
    q, k, v = (x.new_zeros(n, len(weights[0])) for weights in (und.q, und.k, und.v))
    for e, rows in expert_rows:
        own = normed[rows]
        q[rows], k[rows], v[rows] = F.linear(own, *e.q), F.linear(own, *e.k), F.linear(own, *e.v)
    q, k, v = (states.view(n, -1, D) for states in (q, k, v))
    wide_q, wide_k = q.float(), k.float()  # the official code uses float32 from here to attention
    normed_q, normed_k = torch.zeros_like(wide_q), torch.zeros_like(wide_k)
    for e, rows in expert_rows:
        normed_q[rows] = rms_norm(wide_q[rows], e.q_norm, eps)
        normed_k[rows] = rms_norm(wide_k[rows], e.k_norm, eps)
    q, k = rotate(normed_q, cos, sin).to(x.dtype), rotate(normed_k, cos, sin).to(x.dtype)
    k, v = torch.cat([past_k, k]), torch.cat([past_v, v])
    attended = attend(q, k, v, False).flatten(1)
    projected = torch.zeros_like(x)
    for e, rows in expert_rows:
        projected[rows] = F.linear(attended[rows], e.o)
    x = x + projected
    mlp = torch.zeros_like(x)
    for e, rows in expert_rows:
        own = rms_norm(x[rows], e.post_norm, eps)
        mlp[rows] = F.linear(F.silu(F.linear(own, e.gate)) * F.linear(own, e.up), e.down)
    return x + mlp, k, v


def guide(cond, no_text, no_img, settings: ImageSettings) -> torch.Tensor:
    """Guided velocity of a step. ``no_img`` is None if image guidance is off."""

    def renormalize(v, dim):
        size = torch.norm(cond, dim=dim, keepdim=True) / (torch.norm(v, dim=dim, keepdim=True) + 1e-8)
        return v * size.clamp(min=settings.cfg_renorm_min, max=1.0)

    v = no_text + settings.cfg_text_scale * (cond - no_text)
    if settings.cfg_renorm_type == "text_channel":
        v = renormalize(v, -1)
    if no_img is not None:
        v = no_img + settings.cfg_img_scale * (v - no_img)
    if settings.cfg_renorm_type != "text_channel":
        v = renormalize(v, None if settings.cfg_renorm_type == "global" else -1)
    return v


@dataclass
class _RequestContexts:
    """The contexts of a request's guidance branches, its noise and the (height, width) of its image."""

    cond: Context
    no_text: Context
    no_img: Context
    noise: Noise
    size: tuple[int, int] | None = None


class OfficialInferencer:
    """The official inferencer on the runtime's model, with the methods, defaults and results of ``Bagel``."""

    def __init__(self, model: BagelModel, tokenizer: Tokenizer, compiler: Callable | None = None):
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self._experts = [tuple(_expert(layer, number, self.config.llm) for number in (0, 1))
                         for layer in model.weights.layers]  # fmt: skip
        wrap = compiler or (lambda function: function)
        self._und_layer, self._routed_layer = wrap(und_layer), wrap(routed_layer)

    @torch.inference_mode()
    def generate(self, prompt: str | Sequence[str], *, size, seed: int, think=False, progress=None, **hyperparameters):
        """Generate an image, or one image per prompt sequentially."""
        if not isinstance(prompt, str):
            options = {"size": size, "think": think, "progress": progress, **hyperparameters}
            return [self.generate(text, seed=seed + index, **options) for index, text in enumerate(prompt)]
        settings, text = resolve_settings("generate", hyperparameters)
        contexts = self._open_contexts(seed, THINK_BEFORE_IMAGE if think else None)
        contexts.size = size
        self._add_text(contexts, prompt)
        return self._denoise(contexts, seed, settings, text if think else None, progress)

    @torch.inference_mode()
    def edit(self, image: Image.Image, prompt: str, *, seed: int, think=False, progress=None, **hyperparameters):
        """Edit an image."""
        settings, text = resolve_settings("edit", hyperparameters)
        contexts = self._open_contexts(seed, THINK_BEFORE_IMAGE if think else None)
        self._add_image(contexts, image, generates=True)
        self._add_text(contexts, prompt)
        return self._denoise(contexts, seed, settings, text if think else None, progress)

    @torch.inference_mode()
    def chat(self, prompt: str, images=(), *, think=False, progress=None, **hyperparameters) -> str:
        """Answer a question about images."""
        _, text = resolve_settings("chat", hyperparameters)
        contexts = self._open_contexts(0, THINK_BEFORE_ANSWER if think else None)
        for image in [images] if isinstance(images, Image.Image) else images:
            self._add_image(contexts, image, generates=False)
        self.append_text(contexts.cond, prompt)
        return self.generate_text(contexts.cond, text.max_think_token_n, progress)

    # Contexts

    def empty(self) -> Context:
        """A context without tokens."""
        llm, device = self.config.llm, self.model.device
        empty = torch.empty(0, llm.num_kv_heads, llm.head_dim, dtype=self.model.dtype, device=device)
        return Context([empty] * llm.num_layers, [empty] * llm.num_layers)

    def append_text(self, context: Context, text: str) -> None:
        """Append a framed text: causal, one position per token."""
        ids = frame_text(self.tokenizer, text).ids
        positions = context.position + torch.arange(len(ids))
        self.forward(context, self._embed(ids), positions, causal=True, append=True)
        context.position += len(ids)

    def append_latents(self, context: Context, latents: torch.Tensor, grid_h: int, grid_w: int) -> None:
        """Append the clean latents [grid_h * grid_w, features] of an image (timestep 0)."""
        hidden, expert_rows = self._image_rows(latents, 0.0, grid_h, grid_w)
        positions = torch.full((len(hidden),), context.position)
        self.forward(context, hidden, positions, expert_rows, append=True)
        context.position += 1

    def append_patches(self, context: Context, patches: torch.Tensor, grid_h: int, grid_w: int) -> None:
        """Append the ViT patches [grid_h * grid_w, features] of an image."""
        embedded = self._encode_vision(patches, grid_h, grid_w)
        markers = self._embed(self.model.markers)
        hidden = torch.cat([markers[:1], embedded, markers[1:]])
        self.forward(context, hidden, torch.full((len(hidden),), context.position), append=True)
        context.position += 1

    def _open_contexts(self, seed: int, system: str | None) -> _RequestContexts:
        contexts = _RequestContexts(self.empty(), self.empty(), self.empty(), Noise(seed))
        if system is not None:
            self.append_text(contexts.cond, system)
            self.append_text(contexts.no_img, system)
        return contexts

    def _add_text(self, contexts: _RequestContexts, text: str) -> None:
        contexts.no_text = contexts.cond.copy()
        self.append_text(contexts.cond, text)
        self.append_text(contexts.no_img, text)

    def _add_image(self, contexts: _RequestContexts, image: Image.Image, generates: bool) -> None:
        resized = self.config.vae_transform.resize(to_rgb(image))
        if generates:
            clean = self.model.encode_latents(resized, contexts.noise)
            self.append_latents(contexts.cond, clean.latents, clean.grid_h, clean.grid_w)
        vit = self.model.encode_patches(self.config.vit_transform.resize(resized))
        self.append_patches(contexts.cond, vit.patches.to(self.model.device, self.model.dtype), vit.grid_h, vit.grid_w)
        if generates:
            contexts.no_text = contexts.cond.copy()
        contexts.size = (resized.height, resized.width)

    # Loops

    def generate_text(self, context: Context, max_length: int, progress: Callable | None = None) -> str:
        """Decode greedily from a context, which is not modified."""
        extended, token, ids = context.copy(), self.tokenizer.bos, [self.tokenizer.bos]
        for index in range(max_length):
            hidden = self._embed([token])
            position = torch.tensor([extended.position])
            hidden = self.forward(extended, hidden, position, causal=True, append=True)
            extended.position += 1
            token = int(F.linear(hidden, self.model.weights.lm_head).argmax(-1))
            if token == self.tokenizer.eos or index == max_length - 1:
                break
            ids.append(token)
            if progress:
                progress(Progress("text", len(ids) - 1, max_length - 1))
        return self.tokenizer.answer(ids)

    def _denoise(self, contexts: _RequestContexts, seed: int, settings: ImageSettings, text, progress) -> ImageResult:
        thought = None
        if text is not None:
            thought = self.generate_text(contexts.cond, text.max_think_token_n, progress)
            self.append_text(contexts.cond, thought)
        grid_h, grid_w = (side // self.config.latent_stride for side in contexts.size)
        x = contexts.noise.draw(grid_h * grid_w, self.config.latent_features).to(self.model.device)
        points = schedule(settings.num_timesteps, settings.timestep_shift)
        low, high = torch.tensor(settings.cfg_interval)
        for index, (t, next_t) in enumerate(zip(points[:-1], points[1:], strict=True)):
            guided = bool(low < t <= high)
            x = x - self.velocity(contexts, x, float(t), grid_h, grid_w, settings, guided) * float(t - next_t)
            if progress:
                progress(Progress("image", index + 1, len(points) - 1))
        latent = unpatchify(x, grid_h, grid_w, self.config.latent_patch_size)
        image = tensor_to_image(self.model.vae.decode(latent[None])[0])
        parameters = asdict(settings) | {"height": contexts.size[0], "width": contexts.size[1]}
        return ImageResult(image, seed, parameters, x, thought)

    def velocity(
        self, contexts: _RequestContexts, x, t: float, grid_h: int, grid_w: int, settings: ImageSettings, guided: bool
    ):
        """Velocity of the latents [grid_h * grid_w, features] at time t."""
        hidden, expert_rows = self._image_rows(x, t, grid_h, grid_w)

        def branch(context):
            positions = torch.full((len(hidden),), context.position)
            last = self.forward(context, hidden, positions, expert_rows)
            return F.linear(last[expert_rows.gen], *self.model.weights.llm2vae)

        cond = branch(contexts.cond)
        no_text = branch(contexts.no_text) if guided and settings.cfg_text_scale > 1 else None
        no_img = branch(contexts.no_img) if guided and settings.cfg_img_scale > 1 else None
        return cond if no_text is None else guide(cond, no_text, no_img, settings)

    # The network

    def forward(
        self,
        context: Context,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        expert_rows: ExpertRows | None = None,
        causal: bool = False,
        append: bool = False,
    ) -> torch.Tensor:
        """Run a sequence [n, H] after a context through all layers and the final norm.

        ``append`` adds its keys and values to the context.
        """
        eps, norm = self.config.llm.rms_norm_eps, self.model.weights.norm
        cos, sin = self.model.rope(positions)
        cos, sin = (torch.cat([table, table], -1).to(hidden.dtype) for table in (cos, sin))
        for index, (gen, und) in enumerate(self._experts):
            past = (context.keys[index], context.values[index])
            if expert_rows is None:
                hidden, k, v = self._und_layer(und, hidden, cos, sin, *past, causal, eps)
            else:
                rows = (expert_rows.und, expert_rows.gen)
                hidden, k, v = self._routed_layer(und, gen, hidden, *rows, cos, sin, *past, eps)
            if append:
                context.keys[index], context.values[index] = k, v
        if expert_rows is None:
            return rms_norm(hidden, norm.und, eps)
        normed = torch.zeros_like(hidden)
        normed[expert_rows.und] = rms_norm(hidden[expert_rows.und], norm.und, eps)
        normed[expert_rows.gen] = rms_norm(hidden[expert_rows.gen], norm.gen, eps)
        return normed

    def _embed(self, ids) -> torch.Tensor:
        return F.embedding(torch.tensor(list(ids), device=self.model.device), self.model.weights.embed_tokens)

    def _image_rows(self, latents: torch.Tensor, t: float, grid_h: int, grid_w: int) -> tuple[torch.Tensor, ExpertRows]:
        """Hidden states [n + 2, H] of marker, latents, marker, and the rows of each expert."""
        weights, device, n = self.model.weights, self.model.device, len(latents)
        index = position_ids(grid_h, grid_w, self.config.max_latent_size, self.config.interpolate_pos).to(device)
        time = time_embedding(weights.time_embedder, torch.full((n,), t, device=device))
        embedded = F.linear(latents.to(self.model.dtype), *weights.vae2llm) + time + weights.latent_positions[index]
        expert_rows = ExpertRows(torch.tensor([0, n + 1], device=device), torch.arange(1, n + 1, device=device))
        hidden = embedded.new_zeros(n + 2, embedded.shape[1])
        hidden[expert_rows.und] = self._embed(self.model.markers)
        hidden[expert_rows.gen] = embedded
        return hidden, expert_rows

    def _encode_vision(self, patches: torch.Tensor, grid_h: int, grid_w: int) -> torch.Tensor:
        """Embed patches [n, features] with the vision tower and the connector: [n, H]."""
        vit, config, weights = self.model.weights.vit, self.config.vit, self.model.weights
        side, V, eps = config.max_patches_per_side, config.hidden_size, config.layer_norm_eps
        index = position_ids(grid_h, grid_w, side, self.config.interpolate_pos).to(self.model.device)
        x = F.linear(patches, *vit.patch_embedding) + vit.position_embedding[index]
        for layer in vit.layers:
            normed = F.layer_norm(x, (V,), *layer.norm1, eps)
            q, k, v = (
                F.linear(normed, weight, bias).view(-1, config.num_heads, config.head_dim)
                for weight, bias in zip(layer.qkv.weight.split(V), layer.qkv.bias.split(V), strict=True)
            )
            x = x + F.linear(attend(q, k, v, False).flatten(1), *layer.out)
            normed = F.layer_norm(x, (V,), *layer.norm2, eps)
            x = x + F.linear(F.gelu(F.linear(normed, *layer.fc1), approximate="tanh"), *layer.fc2)
        x = F.layer_norm(x, (V,), *vit.post_norm, eps)
        first, second = weights.connector
        return F.linear(F.gelu(F.linear(x, *first), approximate="tanh"), *second) + weights.vit_positions[index]


def _expert(layer, number: int, config) -> Expert:
    """Weights of one expert (0: generation, 1: understanding) of a decoder layer."""
    D, heads = config.head_dim, config.num_heads
    rows = [heads * D, config.num_kv_heads * D, config.num_kv_heads * D]
    projections = zip(layer.qkv[number].split(rows), layer.qkv_bias[number].split(rows), strict=True)
    gate, up = layer.gate_up[number].view(config.intermediate_size, 2, -1).unbind(1)
    qk_norm = layer.qk_norm[number]  # one row per head; all heads have the same weight
    return Expert(
        layer.input_norm[number], *projections, qk_norm[0], qk_norm[heads],
        layer.o[number], layer.post_norm[number], gate, up, layer.down[number],
    )  # fmt: skip
