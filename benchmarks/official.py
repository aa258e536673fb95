"""BAGEL composed as the official code composes it, of ordinary PyTorch operators: what the runtime is measured beside.

The weights and the results are this runtime's; the work is the official inferencer's (ByteDance-Seed/Bagel, commit
056b5fd), written anew:

- rows stay in the order of the sequence; an expert's rows are gathered by index, run and scattered, in every norm,
  projection and MLP of a layer (the two markers of an image and its latents take turns);
- query, key, value, gate and up are products of their own;
- the guidance branches run one after another, all that the official code runs: text-to-image has three, of which two
  see the same context;
- a context owns its keys and values and is copied for each snapshot; every layer of every step concatenates them with
  the keys and values of the step, and every decoded token makes longer ones;
- attention is ``scaled_dot_product_attention``, everything else elementwise operators and ``linear``;
- one request at a time, and the host reads every token.

The autoencoder is the runtime's own for both. Text is greedy. A ``compiler`` such as ``torch.compile`` is given the
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
    """One expert's tensors of a decoder layer, as the official modules have them: views of the runtime's fused ones."""

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
    """What was said: keys and values of every layer [n, kv_heads, head_dim], and the next RoPE position."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    position: int = 0

    def copy(self) -> "Context":
        """A snapshot with tensors of its own."""
        return Context([k.clone() for k in self.keys], [v.clone() for v in self.values], self.position)


@dataclass
class Rows:
    """Where the rows of a sequence go: int64 indices of the understanding and of the generation expert's."""

    und: torch.Tensor
    gen: torch.Tensor


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension: float32 statistics, rounded before the weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions, half-split: x [n, heads, D], cos and sin [n, D]."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """q [n, Hq, D] over k, v [m, Hkv, D]; causal: the last query sees all keys, each one before it one less."""
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
    """A decoder layer whose rows are all the understanding expert's: (x, merged keys, merged values)."""
    D, n = len(e.q_norm), len(x)
    normed = rms_norm(x, e.input_norm, eps)
    q, k, v = (F.linear(normed, *weights).view(n, -1, D) for weights in (e.q, e.k, e.v))
    q, k = rotate(rms_norm(q, e.q_norm, eps), cos, sin), rotate(rms_norm(k, e.k_norm, eps), cos, sin)
    k, v = torch.cat([past_k, k]), torch.cat([past_v, v])
    x = x + F.linear(attend(q, k, v, causal).flatten(1), e.o)
    normed = rms_norm(x, e.post_norm, eps)
    return x + F.linear(F.silu(F.linear(normed, e.gate)) * F.linear(normed, e.up), e.down), k, v


def routed_layer(und: Expert, gen: Expert, x, und_rows, gen_rows, cos, sin, past_k, past_v, eps: float):
    """A decoder layer of an image's rows, which go to both experts by index: (x, merged keys, merged values)."""
    D, n = len(und.q_norm), len(x)
    routes = ((und, und_rows), (gen, gen_rows))
    normed = torch.zeros_like(x)
    for e, rows in routes:
        normed[rows] = rms_norm(x[rows], e.input_norm, eps)
    q, k, v = (x.new_zeros(n, len(weights[0])) for weights in (und.q, und.k, und.v))
    for e, rows in routes:
        own = normed[rows]
        q[rows], k[rows], v[rows] = F.linear(own, *e.q), F.linear(own, *e.k), F.linear(own, *e.v)
    q, k, v = (states.view(n, -1, D) for states in (q, k, v))
    wide_q, wide_k = q.float(), k.float()  # officially float32 from here to attention
    normed_q, normed_k = torch.zeros_like(wide_q), torch.zeros_like(wide_k)
    for e, rows in routes:
        normed_q[rows] = rms_norm(wide_q[rows], e.q_norm, eps)
        normed_k[rows] = rms_norm(wide_k[rows], e.k_norm, eps)
    q, k = rotate(normed_q, cos, sin).to(x.dtype), rotate(normed_k, cos, sin).to(x.dtype)
    k, v = torch.cat([past_k, k]), torch.cat([past_v, v])
    attended = attend(q, k, v, False).flatten(1)
    projected = torch.zeros_like(x)
    for e, rows in routes:
        projected[rows] = F.linear(attended[rows], e.o)
    x = x + projected
    fed = torch.zeros_like(x)
    for e, rows in routes:
        own = rms_norm(x[rows], e.post_norm, eps)
        fed[rows] = F.linear(F.silu(F.linear(own, e.gate)) * F.linear(own, e.up), e.down)
    return x + fed, k, v


def guide(cond, no_text, no_img, settings: ImageSettings) -> torch.Tensor:
    """The velocity that a guided step follows. ``no_img`` is None where image guidance is off."""

    def renormalise(v, dim):
        size = torch.norm(cond, dim=dim, keepdim=True) / (torch.norm(v, dim=dim, keepdim=True) + 1e-8)
        return v * size.clamp(min=settings.cfg_renorm_min, max=1.0)

    v = no_text + settings.cfg_text_scale * (cond - no_text)
    if settings.cfg_renorm_type == "text_channel":
        v = renormalise(v, -1)
    if no_img is not None:
        v = no_img + settings.cfg_img_scale * (v - no_img)
    if settings.cfg_renorm_type != "text_channel":
        v = renormalise(v, None if settings.cfg_renorm_type == "global" else -1)
    return v


@dataclass
class _Talk:
    """The three contexts of a request and the size of its picture, by the official rules."""

    gen: Context
    no_text: Context
    no_img: Context
    noise: Noise
    size: tuple[int, int] | None = None


class Official:
    """The official inferencer over the runtime's model. Methods, defaults and results are those of ``Bagel``."""

    def __init__(self, model: BagelModel, tokenizer: Tokenizer, compiler: Callable | None = None):
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self._experts = [tuple(_expert(layer, number, self.config.llm) for number in (0, 1))
                         for layer in model.weights.layers]  # fmt: skip
        wrap = compiler or (lambda function: function)
        self._und_layer, self._routed_layer = wrap(und_layer), wrap(routed_layer)

    @torch.inference_mode()
    def generate(self, prompt: str | Sequence[str], *, size, seed: int, think=False, progress=None, **hyperparameters):
        """Text to image; of a list of prompts one after another."""
        if not isinstance(prompt, str):
            options = {"size": size, "think": think, "progress": progress, **hyperparameters}
            return [self.generate(text, seed=seed + index, **options) for index, text in enumerate(prompt)]
        settings, text = resolve_settings("generate", hyperparameters)
        talk = self._talk(seed, THINK_BEFORE_IMAGE if think else None)
        talk.size = size
        self._say(talk, prompt)
        return self._draw(talk, seed, settings, text if think else None, progress)

    @torch.inference_mode()
    def edit(self, image: Image.Image, prompt: str, *, seed: int, think=False, progress=None, **hyperparameters):
        """Redraw an image."""
        settings, text = resolve_settings("edit", hyperparameters)
        talk = self._talk(seed, THINK_BEFORE_IMAGE if think else None)
        self._show(talk, image, generates=True)
        self._say(talk, prompt)
        return self._draw(talk, seed, settings, text if think else None, progress)

    @torch.inference_mode()
    def chat(self, prompt: str, images=(), *, think=False, progress=None, **hyperparameters) -> str:
        """Answer a question about images."""
        _, text = resolve_settings("chat", hyperparameters)
        talk = self._talk(0, THINK_BEFORE_ANSWER if think else None)
        for image in [images] if isinstance(images, Image.Image) else images:
            self._show(talk, image, generates=False)
        self.append_text(talk.gen, prompt)
        return self.write(talk.gen, text.max_think_token_n, progress)

    # Contexts

    def empty(self) -> Context:
        """A context of nothing."""
        llm, device = self.config.llm, self.model.device
        nothing = torch.empty(0, llm.num_kv_heads, llm.head_dim, dtype=self.model.dtype, device=device)
        return Context([nothing] * llm.num_layers, [nothing] * llm.num_layers)

    def append_text(self, context: Context, text: str) -> None:
        """A text in its frame: causal, a position each."""
        ids = frame_text(self.tokenizer, text).ids
        positions = context.position + torch.arange(len(ids))
        self.forward(context, self._embed(ids), positions, causal=True, keep=True)
        context.position += len(ids)

    def append_latents(self, context: Context, latents: torch.Tensor, rows: int, columns: int) -> None:
        """A clean image [rows * columns, features], whose time is 0."""
        hidden, routes = self._image_rows(latents, 0.0, rows, columns)
        positions = torch.full((len(hidden),), context.position)
        self.forward(context, hidden, positions, routes, keep=True)
        context.position += 1

    def append_patches(self, context: Context, patches: torch.Tensor, rows: int, columns: int) -> None:
        """ViT patches [rows * columns, features], through the tower and the connector."""
        seen = self._see(patches, rows, columns)
        markers = self._embed(self.model.markers)
        hidden = torch.cat([markers[:1], seen, markers[1:]])
        self.forward(context, hidden, torch.full((len(hidden),), context.position), keep=True)
        context.position += 1

    def _talk(self, seed: int, system: str | None) -> _Talk:
        talk = _Talk(self.empty(), self.empty(), self.empty(), Noise(seed))
        if system is not None:
            self.append_text(talk.gen, system)
            self.append_text(talk.no_img, system)
        return talk

    def _say(self, talk: _Talk, text: str) -> None:
        talk.no_text = talk.gen.copy()
        self.append_text(talk.gen, text)
        self.append_text(talk.no_img, text)

    def _show(self, talk: _Talk, image: Image.Image, generates: bool) -> None:
        resized = self.config.vae_transform.resize(to_rgb(image))
        if generates:
            clean = self.model.encode_latents(resized, talk.noise)
            self.append_latents(talk.gen, clean.latents, clean.grid_h, clean.grid_w)
        vit = self.model.encode_patches(self.config.vit_transform.resize(resized))
        self.append_patches(talk.gen, vit.patches.to(self.model.device, self.model.dtype), vit.grid_h, vit.grid_w)
        if generates:
            talk.no_text = talk.gen.copy()
        talk.size = (resized.height, resized.width)

    # Loops

    def write(self, context: Context, max_length: int, progress: Callable | None = None) -> str:
        """What follows a context, most likely tokens; the context itself is left as it is."""
        session, token, ids = context.copy(), self.tokenizer.bos, [self.tokenizer.bos]
        for index in range(max_length):
            hidden = self._embed([token])
            position = torch.tensor([session.position])
            hidden = self.forward(session, hidden, position, causal=True, keep=True)
            session.position += 1
            token = int(F.linear(hidden, self.model.weights.lm_head).argmax(-1))
            if token == self.tokenizer.eos or index == max_length - 1:
                break
            ids.append(token)
            if progress:
                progress(Progress("text", len(ids) - 1, max_length - 1))
        return self.tokenizer.answer(ids)

    def _draw(self, talk: _Talk, seed: int, settings: ImageSettings, text, progress) -> ImageResult:
        thought = None
        if text is not None:
            thought = self.write(talk.gen, text.max_think_token_n, progress)
            self.append_text(talk.gen, thought)
        rows, columns = (side // self.config.latent_stride for side in talk.size)
        x = talk.noise.draw(rows * columns, self.config.latent_features).to(self.model.device)
        points = schedule(settings.num_timesteps, settings.timestep_shift)
        low, high = torch.tensor(settings.cfg_interval)
        for index, (t, after) in enumerate(zip(points[:-1], points[1:], strict=True)):
            guided = bool(low < t <= high)
            x = x - self.velocity(talk, x, float(t), rows, columns, settings, guided) * float(t - after)
            if progress:
                progress(Progress("image", index + 1, len(points) - 1))
        latent = unpatchify(x, rows, columns, self.config.latent_patch_size)
        picture = tensor_to_image(self.model.vae.decode(latent[None])[0])
        parameters = asdict(settings) | {"height": talk.size[0], "width": talk.size[1]}
        return ImageResult(picture, seed, parameters, x, thought)

    def velocity(self, talk: _Talk, x, t: float, rows: int, columns: int, settings: ImageSettings, guided: bool):
        """Where the latents [rows * columns, features] of a step at time t go."""
        hidden, routes = self._image_rows(x, t, rows, columns)

        def branch(context):
            positions = torch.full((len(hidden),), context.position)
            last = self.forward(context, hidden, positions, routes)
            return F.linear(last[routes.gen], *self.model.weights.llm2vae)

        cond = branch(talk.gen)
        no_text = branch(talk.no_text) if guided and settings.cfg_text_scale > 1 else None
        no_img = branch(talk.no_img) if guided and settings.cfg_img_scale > 1 else None
        return cond if no_text is None else guide(cond, no_text, no_img, settings)

    # The network

    def forward(
        self,
        context: Context,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        routes: Rows | None = None,
        causal: bool = False,
        keep: bool = False,
    ) -> torch.Tensor:
        """Run a sequence [n, H] behind a context: all layers and the final norm. With ``keep`` the context grows."""
        eps, norm = self.config.llm.rms_norm_eps, self.model.weights.norm
        cos, sin = self.model.rope(positions)
        cos, sin = (torch.cat([table, table], -1).to(hidden.dtype) for table in (cos, sin))
        for index, (gen, und) in enumerate(self._experts):
            past = (context.keys[index], context.values[index])
            if routes is None:
                hidden, k, v = self._und_layer(und, hidden, cos, sin, *past, causal, eps)
            else:
                rows = (routes.und, routes.gen)
                hidden, k, v = self._routed_layer(und, gen, hidden, *rows, cos, sin, *past, eps)
            if keep:
                context.keys[index], context.values[index] = k, v
        if routes is None:
            return rms_norm(hidden, norm.und, eps)
        normed = torch.zeros_like(hidden)
        normed[routes.und] = rms_norm(hidden[routes.und], norm.und, eps)
        normed[routes.gen] = rms_norm(hidden[routes.gen], norm.gen, eps)
        return normed

    def _embed(self, ids) -> torch.Tensor:
        return F.embedding(torch.tensor(list(ids), device=self.model.device), self.model.weights.embed_tokens)

    def _image_rows(self, latents: torch.Tensor, t: float, rows: int, columns: int) -> tuple[torch.Tensor, Rows]:
        """Marker, latents, marker as hidden states [n + 2, H], and whose rows they are."""
        weights, device, n = self.model.weights, self.model.device, len(latents)
        places = position_ids(rows, columns, self.config.max_latent_size, self.config.interpolate_pos).to(device)
        time = time_embedding(weights.time_embedder, torch.full((n,), t, device=device))
        embedded = F.linear(latents.to(self.model.dtype), *weights.vae2llm) + time + weights.latent_positions[places]
        routes = Rows(torch.tensor([0, n + 1], device=device), torch.arange(1, n + 1, device=device))
        hidden = embedded.new_zeros(n + 2, embedded.shape[1])
        hidden[routes.und] = self._embed(self.model.markers)
        hidden[routes.gen] = embedded
        return hidden, routes

    def _see(self, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Patches [n, features] through the vision tower and the connector, [n, H]."""
        vit, config, weights = self.model.weights.vit, self.config.vit, self.model.weights
        side, V, eps = config.max_patches_per_side, config.hidden_size, config.layer_norm_eps
        places = position_ids(rows, columns, side, self.config.interpolate_pos).to(self.model.device)
        x = F.linear(patches, *vit.patch_embedding) + vit.position_embedding[places]
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
        return F.linear(F.gelu(F.linear(x, *first), approximate="tanh"), *second) + weights.vit_positions[places]


def _expert(layer, number: int, config) -> Expert:
    """The official modules' tensors of an expert (0 generation, 1 understanding) of a layer."""
    D, heads = config.head_dim, config.num_heads
    rows = [heads * D, config.num_kv_heads * D, config.num_kv_heads * D]
    projections = zip(layer.qkv[number].split(rows), layer.qkv_bias[number].split(rows), strict=True)
    gate, up = layer.gate_up[number].view(config.intermediate_size, 2, -1).unbind(1)
    qk_norm = layer.qk_norm[number]  # one row a head, all alike
    return Expert(
        layer.input_norm[number], *projections, qk_norm[0], qk_norm[heads],
        layer.o[number], layer.post_norm[number], gate, up, layer.down[number],
    )  # fmt: skip
