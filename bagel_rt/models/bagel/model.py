"""BAGEL on one device: weights, transformer, vision tower and autoencoder behind the interface of a model."""

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from bagel_rt.checkpoint.find import find_weights
from bagel_rt.checkpoint.read import WeightSlot, check_weights, load_weights
from bagel_rt.errors import CheckpointError
from bagel_rt.kernels import decode_linear
from bagel_rt.models.bagel.autoencoder import AutoEncoder
from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.contents import Content, NoisedImage, Text, VAEImage, ViTImage, image_rows
from bagel_rt.models.bagel.contexts import GuidanceContexts, Noise, count_tokens, frame_text
from bagel_rt.models.bagel.embed import patchify, position_ids, time_embedding, unpatchify
from bagel_rt.models.bagel.guidance import FlowGuidance
from bagel_rt.models.bagel.images import image_to_tensor, tensor_to_image, to_rgb
from bagel_rt.models.bagel.memory import explain_requests
from bagel_rt.models.bagel.prompts import IMAGE_REQUEST
from bagel_rt.models.bagel.settings import ImageSettings
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.models.bagel.transformer import Transformer
from bagel_rt.models.bagel.vision import connect, vision_tower
from bagel_rt.models.bagel.weights import BagelWeights
from bagel_rt.runtime.batch import Rope
from bagel_rt.runtime.context import Prefill
from bagel_rt.runtime.decode import TokenMode
from bagel_rt.runtime.denoise import DenoisingTask
from bagel_rt.runtime.graphs import GraphCache
from bagel_rt.runtime.slots import KVCache

# Tensors that official-format files may contain but that are not used: buffers of rotary and position code, state of
# a trainer, the pooling head of the vision tower.
IGNORED_TENSORS = ("*.rotary_emb.inv_freq", "*.position_ids", "n_averaged", "vit_model.vision_model.head.*")


@dataclass(frozen=True, eq=False)
class _DecoderBuffers:
    """Input and output of the autoencoder's decoder: latent [1, z, h, w] and pixels [1, 3, H, W], float32."""

    latent: torch.Tensor
    pixels: torch.Tensor


class BagelModel:
    """The network of one checkpoint.

    Attributes:
        image_request: the text by which an interleaved answer requests an image.
        config: the checkpoint's configuration.
        weights: every tensor of ``ema.safetensors``, fused and paired.
        transformer: the decoder stack over packed rows.
        rope: the rotary tables.
        markers: token ids of the start and end of an image; None until they are known.
        lock: held by the thread that runs the model; models that share weights may share it.
    """

    image_request = IMAGE_REQUEST

    def __init__(
        self, config: BagelConfig, weights: BagelWeights, vae: AutoEncoder | None, markers: tuple[int, int] | None
    ) -> None:
        """``vae`` is None if this model neither encodes nor decodes images."""
        self.config = config
        self.weights = weights
        self.transformer = Transformer(config.llm, weights.layers, weights.norm)
        self._vae = vae
        self.markers = markers
        self.lock = threading.RLock()
        self.device = weights.embed_tokens.device
        self.dtype = weights.embed_tokens.dtype
        self.rope = Rope(config.llm.head_dim, config.llm.rope_theta, config.llm.max_position_embeddings, self.device)

    @classmethod
    def allocate(
        cls, config: BagelConfig, markers: tuple[int, int], device: torch.device | str, dtype: torch.dtype
    ) -> "BagelModel":
        """A model with uninitialized weights."""
        with torch.device("meta"):
            vae = AutoEncoder(config.vae)
        vae = vae.to_empty(device=device).requires_grad_(False)  # always float32, as in the official code
        return cls(config, BagelWeights.allocate(config, device, dtype), vae, markers)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        config: BagelConfig,
        markers: tuple[int, int],
        device: torch.device | str,
        dtype: torch.dtype,
        progress: bool = False,
        weights: str | None = None,
    ) -> "BagelModel":
        """Read ``ema.safetensors`` and ``ae.safetensors`` (or their shards) of an official checkpoint folder.

        ``weights`` names another file than ``ema.safetensors``; see :func:`~bagel_rt.checkpoint.find.find_weights`.

        Raises:
            CheckpointError: a file or tensor is missing, unexpected, corrupt or of the wrong shape.
        """
        files, problems = {}, []
        for stem, slots in cls.allocate(config, markers, "meta", dtype).weight_slots().items():
            try:  # check all files before allocating the model
                files[stem] = find_weights(folder, stem, weights if stem == "ema" else None)
                check_weights(files[stem], slots, IGNORED_TENSORS)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError("\n".join(problems))
        model = cls.allocate(config, markers, device, dtype)
        for stem, slots in model.weight_slots().items():
            load_weights(files[stem], slots, IGNORED_TENSORS, progress)
        return model

    def with_weights(self, weights: BagelWeights) -> "BagelModel":
        """The same model with other weights, sharing the autoencoder."""
        return BagelModel(self.config, weights, self._vae, self.markers)

    @property
    def vae(self) -> AutoEncoder:
        """The FLUX autoencoder, in float32 as published. RuntimeError if the model has none."""
        if self._vae is None:
            raise RuntimeError("the model must have an autoencoder to encode or decode images, got none.")
        return self._vae

    def weight_slots(self) -> dict[str, dict[str, WeightSlot]]:
        """File stem ("ema", "ae") -> official tensor name -> where it is stored."""
        autoencoder = {name: WeightSlot(p.data, tuple(p.shape)) for name, p in self.vae.named_parameters()}
        return {"ema": self.weights.weight_slots(self.config), "ae": autoencoder}

    def make_cache(self, slots: int = 0) -> KVCache:
        """An empty KV cache of this model's shape."""
        llm = self.config.llm
        return KVCache(llm.num_layers, llm.num_kv_heads, llm.head_dim, self.dtype, self.device, slots)

    # Inputs

    def embed(self, contents: Sequence[Content]) -> torch.Tensor:
        """Hidden states of contents in order, [T, H]. All ViT images are encoded in one packed batch; the rows of
        latents being denoised are zero."""
        texts = [content for content in contents if isinstance(content, Text)]
        if len(texts) == len(contents):
            return self.embed_tokens(torch.tensor([id for text in texts for id in text.ids], device=self.device))
        images = [content for content in contents if isinstance(content, ViTImage)]
        patches = iter(self.embed_patches(images)) if images else iter(())
        start, end = self.embed_markers().split(1)
        parts = []
        for content in contents:
            if isinstance(content, Text):
                parts.append(self.embed_tokens(torch.tensor(content.ids, device=self.device)))
                continue
            if isinstance(content, ViTImage):
                tokens = next(patches)
            elif isinstance(content, VAEImage):
                clean = self.time_embedding(torch.zeros(1, device=self.device))
                positions = self.latent_positions(content.grid_h, content.grid_w) + clean
                tokens = self.embed_latents(content.latents.to(self.device), positions)
            else:
                tokens = start.new_zeros(content.grid_h * content.grid_w, start.shape[1])
            parts += [start, tokens, end]
        return torch.cat(parts)

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [n] -> [n, H]."""
        return F.embedding(ids, self.weights.embed_tokens)

    def embed_markers(self) -> torch.Tensor:
        """The start-of-image and end-of-image rows, [2, H]."""
        return self.embed_tokens(torch.tensor(self.markers, device=self.device))

    def embed_patches(self, images: Sequence[ViTImage]) -> tuple[torch.Tensor, ...]:
        """The ViT tokens [n, H] of each image."""
        side, interpolate = self.config.vit.max_patches_per_side, self.config.interpolate_pos
        ids = torch.cat([position_ids(one.grid_h, one.grid_w, side, interpolate) for one in images]).to(self.device)
        patches = torch.cat([one.patches for one in images]).to(self.device, self.dtype)
        lengths = [one.grid_h * one.grid_w for one in images]
        tokens = vision_tower(self.weights.vit, self.config.vit, patches, ids, lengths)
        return (connect(self.weights.connector, tokens) + self.weights.vit_positions[ids]).split(lengths)

    def encode_patches(self, image: Image.Image) -> ViTImage:
        """An RGB image resized for the ViT, as patches."""
        patch = self.config.vit.patch_size
        return ViTImage(patchify(image_to_tensor(image), patch), image.height // patch, image.width // patch)

    def encode_latents(self, image: Image.Image, noise: Noise) -> VAEImage:
        """An RGB image resized for the autoencoder, as clean latent tokens.

        As in the official model, the latents are sampled from the posterior.
        """
        config = self.config
        pixels = image_to_tensor(image)[None].to(self.device)
        height, width = pixels.shape[2:]
        eps = noise.draw(1, config.vae.z_channels, height // config.vae.downsample, width // config.vae.downsample)
        latent = self.vae.encode(pixels, eps.to(self.device))
        return VAEImage(patchify(latent[0], config.latent_patch_size), *config.latent_grid((height, width)))

    def open_contexts(
        self,
        prefill: Prefill,
        tokenizer: Tokenizer,
        inputs: Sequence[str | Image.Image],
        *,
        system: str | None = None,
        seed: int = 0,
        noise: Sequence[torch.Tensor] | torch.Tensor | None = None,
        size: tuple[int, int] | None = None,
        draws: bool = True,
        written: int = 0,
    ) -> GuidanceContexts:
        """The contexts of a request, with its system prompt and its inputs appended.

        Args:
            prefill: runs the contents.
            inputs: texts and images in order.
            seed: of the noise.
            noise: draws to use instead of the seed's (see :class:`~bagel_rt.models.bagel.contexts.Noise`).
            size: (height, width) of the image to generate, if no input is an image.
            draws: whether images will be generated.
            written: number of generated tokens to reserve slots for.
        """
        config = self.config
        parts = [*inputs, *([system] if system is not None else [])]
        texts, images, last_size = count_tokens(config, tokenizer, parts, draws)
        drawn = image_rows(*config.latent_grid(last_size or size or (0, 0))) if draws else 0
        room = (texts + images + written + drawn, texts + drawn)
        draws_of = Noise(seed, noise)

        def encode_image(image: Image.Image, generates: bool) -> tuple[list[Content], tuple[int, int]]:
            # The input of the ViT is the image resized by the autoencoder's rule: the official code resizes twice.
            resized = config.vae_transform.resize(to_rgb(image))
            contents: list[Content] = [self.encode_latents(resized, draws_of)] if generates else []
            contents.append(self.encode_patches(config.vit_transform.resize(resized)))
            return contents, (resized.height, resized.width)

        encode_text = functools.partial(frame_text, tokenizer)
        contexts = GuidanceContexts(
            prefill, encode_text, encode_image, draws_of, draws, room, expects_images=images > 0
        )
        if system is not None:
            contexts.add_system(system)
        for part in inputs:
            if isinstance(part, str):
                contexts.add_text(part)
            else:
                contexts.add_image(part)
        return contexts

    # Denoising

    def denoising_task(self, contexts: GuidanceContexts, size: tuple[int, int]) -> DenoisingTask[NoisedImage]:
        """The task of denoising a request's next image of (height, width) pixels; draws its noise."""
        grid_h, grid_w = self.config.latent_grid(size)
        noise = contexts.noise.draw(grid_h * grid_w, self.config.latent_features)
        return DenoisingTask(NoisedImage(grid_h, grid_w), noise, contexts.branches)

    def guidance(self, tasks: Sequence[DenoisingTask[NoisedImage]], settings: Sequence[ImageSettings]) -> FlowGuidance:
        """Schedule, guidance and update rule of one denoising."""
        return FlowGuidance(self, [task.content for task in tasks], settings)

    def latent_positions(self, grid_h: int, grid_w: int) -> torch.Tensor:
        """The constant part of a latent grid's embedding, position plus projection bias, [grid_h * grid_w, H]."""
        ids = position_ids(grid_h, grid_w, self.config.max_latent_size, self.config.interpolate_pos)
        return self.weights.latent_positions[ids.to(self.device)] + self.weights.vae2llm.bias

    def time_embedding(self, t: torch.Tensor) -> torch.Tensor:
        """Timesteps float32 [n] in [0, 1] -> [n, H]."""
        return time_embedding(self.weights.time_embedder, t)

    def embed_latents(self, latents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Latent tokens [n, features] -> [n, H]; ``positions`` [n, H] are :meth:`latent_positions` plus the time's."""
        return torch.addmm(positions, latents.to(self.dtype), self.weights.vae2llm.weight.t())

    def velocity(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states of generation rows [n, H] (before the final norm) -> velocity [n, features]."""
        return F.linear(self.transformer.final_norm(hidden, hidden.shape[0]), *self.weights.llm2vae)

    # Outputs

    @property
    def text(self) -> TokenMode:
        """Embedding and output head for decoding text."""
        return TokenMode("text", self.embed_tokens, self.logits)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states of understanding rows [n, H] (before the final norm) -> logits [n, vocab]."""
        norm = self.weights.norm.und
        return decode_linear(hidden, self.weights.lm_head, norm=norm, eps=self.config.llm.rms_norm_eps)

    def explain_memory(self, tokenizer: Tokenizer, requests: Sequence[Any], available: int | None, graphs: bool) -> str:
        """The expected memory of requests, and changes that would reduce it.

        Args:
            requests: :class:`~bagel_rt.request.Request` of one batch, estimated as if all were like the largest.
            available: bytes of the whole device; None if it has no memory of its own.
            graphs: whether steps are captured.
        """
        return explain_requests(self.config, self.dtype, tokenizer, requests, available, graphs)

    @torch.inference_mode()
    def decode_image(self, latents: torch.Tensor, content: NoisedImage, graphs: GraphCache) -> Image.Image:
        """Clean latent tokens [grid_h * grid_w, features] -> the image, through a captured decoder."""
        config, grid_h, grid_w = self.config, content.grid_h, content.grid_w
        latent = unpatchify(latents, grid_h, grid_w, config.latent_patch_size)[None]

        def allocate() -> _DecoderBuffers:
            sides = (grid_h * config.latent_stride, grid_w * config.latent_stride)
            return _DecoderBuffers(torch.empty_like(latent), latent.new_empty(1, config.vae.out_channels, *sides))

        key = ("image", grid_h, grid_w, torch.backends.cudnn.allow_tf32)
        with graphs.borrow(key, allocate) as static:
            buffers = static.buffers
            buffers.latent.copy_(latent)
            graphs.run(static, "decode", lambda: buffers.pixels.copy_(self.vae.decode(buffers.latent)))
            return tensor_to_image(buffers.pixels[0])
