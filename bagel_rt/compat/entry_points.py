"""The inference entry points of the official module, with its arguments, on this runtime.

Official callers pack every call themselves: token ids, lengths, RoPE positions, and indexes into the sequence with and
without the cache. The runtime derives the indexes from the context, so index arguments are ignored. Position ids,
grids, start tokens and noise are read from the arguments, because callers may choose them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from tqdm import tqdm

from bagel_rt.compat.arguments import (
    check_latent_position_ids,
    extract_answer,
    first_position,
    grid_from_position_ids,
    reject_taylorseer,
)
from bagel_rt.compat.batch_guidance import BatchGuidance, official_guidance
from bagel_rt.compat.caches import OfficialCache, read_contexts, write_contexts
from bagel_rt.compat.exclusive import entry_point, exclusive
from bagel_rt.compat.noise import draw_sampling_seed
from bagel_rt.compat.weight_sharing import WeightSync
from bagel_rt.models.bagel.contents import MARKERS, Content, NoisedImage, Text, VAEImage, ViTImage
from bagel_rt.models.bagel.embed import patchify
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.settings import ImageSettings, RenormType
from bagel_rt.runtime.context import Context, Prefill
from bagel_rt.runtime.decode import Sampling, generate_tokens
from bagel_rt.runtime.denoise import Denoiser, DenoisingTask
from bagel_rt.runtime.graphs import GraphCache
from bagel_rt.runtime.slots import KVCache
from bagel_rt.validation import check, integer, invalid


class EntryPoints:
    """The entry points of one model. Names, arguments in order, defaults and results are the official module's.

    Thread-safe: calls run one at a time.
    """

    def __init__(
        self,
        model: BagelModel,
        cache: KVCache | None = None,
        graphs: GraphCache | None = None,
        visual_gen: bool = True,
    ):
        """
        Args:
            model: the network.
            cache, graphs: to share them with an engine; None for new ones.
            visual_gen: False if the model has no generation weights.
        """
        self.model, self.visual_gen = model, visual_gen
        self.cache = model.make_cache() if cache is None else cache
        self.graphs = graphs or GraphCache.for_device(model.device)
        if graphs is None:
            self.cache.moved.append(self.graphs.invalidate)
        self._weights, self._depth = WeightSync(model, self.graphs), 0

    @contextmanager
    def inference_scope(self) -> Iterator[None]:
        """Exclusive use of the model in inference mode, with derived weights up to date. May be nested; only the
        outermost scope checks the weights."""
        with exclusive(self.model), torch.inference_mode():
            if not self._depth:
                self._weights.sync()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def check_visual_gen(self) -> None:
        """Raise ValueError if the model has no generation weights."""
        if not self.visual_gen:
            raise invalid(
                "visual_gen",
                False,
                "True to generate images or to encode them with the autoencoder",
                "Load the module with visual_gen=True",
            )

    @entry_point
    def forward_cache_update_text(
        self,
        past_key_values: OfficialCache,
        packed_text_ids: torch.Tensor,
        packed_text_position_ids: torch.Tensor,
        text_token_lens: torch.Tensor,
        packed_text_indexes: torch.Tensor,
        packed_key_value_indexes: torch.Tensor,
        key_values_lens: torch.Tensor,
    ) -> OfficialCache:
        """Append a text to each sample's context. The ids include the start and end token."""
        lengths = text_token_lens.tolist()
        texts = [Text(tuple(ids.tolist())) for ids in packed_text_ids.split(lengths)]
        positions = packed_text_position_ids.split(lengths)
        return self._append(past_key_values, key_values_lens, texts, positions, position_step=1)

    @entry_point
    def forward_cache_update_vit(
        self,
        past_key_values: OfficialCache,
        packed_text_ids: torch.Tensor,
        packed_text_indexes: torch.Tensor,
        packed_vit_tokens: torch.Tensor,
        packed_vit_token_indexes: torch.Tensor,
        packed_vit_position_ids: torch.Tensor,
        vit_token_seqlens: torch.Tensor,
        packed_position_ids: torch.Tensor,
        packed_seqlens: torch.Tensor,
        packed_indexes: torch.Tensor,
        packed_key_value_indexes: torch.Tensor,
        key_values_lens: torch.Tensor,
    ) -> OfficialCache:
        """Append an image's ViT patches, [grid_h * grid_w, features], to each sample's context."""
        self._set_markers(packed_text_ids)
        lengths, images = vit_token_seqlens.tolist(), []
        table = (self.model.config.vit.max_patches_per_side, self.model.config.interpolate_pos)
        for patches, ids in zip(packed_vit_tokens.split(lengths), packed_vit_position_ids.split(lengths), strict=True):
            images.append(ViTImage(patches, *grid_from_position_ids("packed_vit_position_ids", ids, *table)))
        positions = packed_position_ids.split(packed_seqlens.tolist())
        return self._append(past_key_values, key_values_lens, images, positions, position_step=0)

    @torch.no_grad()
    def forward_cache_update_vae(
        self,
        vae_model: Any,
        past_key_values: OfficialCache,
        padded_images: torch.Tensor,
        patchified_vae_latent_shapes: Sequence[tuple[int, int]],
        packed_vae_position_ids: torch.Tensor,
        packed_timesteps: torch.Tensor,
        packed_vae_token_indexes: torch.Tensor,
        packed_text_ids: torch.Tensor,
        packed_text_indexes: torch.Tensor,
        packed_position_ids: torch.Tensor,
        packed_seqlens: torch.Tensor,
        packed_indexes: torch.Tensor,
        key_values_lens: torch.Tensor,
        packed_key_value_indexes: torch.Tensor,
    ) -> OfficialCache:
        """Append an image's clean latents to each sample's context; ``vae_model.encode`` computes them, on the device
        and in the dtype of ``vae_model``."""
        self.check_visual_gen()
        if packed_timesteps.any():
            raise invalid("packed_timesteps", packed_timesteps.tolist(), "0, because images in a context are clean")
        config = self.model.config
        patch = config.latent_patch_size
        images: list[VAEImage] = []
        grids = [(int(grid_h), int(grid_w)) for grid_h, grid_w in patchified_vae_latent_shapes]
        lengths = [grid_h * grid_w for grid_h, grid_w in grids]
        for ids, grid in zip(packed_vae_position_ids.split(lengths), grids, strict=True):
            check_latent_position_ids(ids, grid, config.max_latent_size, config.interpolate_pos)
        if "encode" not in vars(vae_model):  # an accelerated autoencoder converts the pixels itself
            padded_images = padded_images.to(next(vae_model.parameters()))
        # Outside the inference scope, which disables autocast: the official autoencoder runs as its caller wants it.
        padded_latents = vae_model.encode(padded_images)
        with self.inference_scope():
            self._set_markers(packed_text_ids)
            for latent, (grid_h, grid_w) in zip(padded_latents, grids, strict=True):
                tokens = patchify(latent[:, : grid_h * patch, : grid_w * patch], patch)
                images.append(VAEImage(tokens, grid_h, grid_w))
            positions = packed_position_ids.split(packed_seqlens.tolist())
            return self._append(past_key_values, key_values_lens, images, positions, position_step=0)

    @entry_point
    def generate_image(
        self,
        packed_text_ids: torch.Tensor,
        packed_text_indexes: torch.Tensor,
        packed_init_noises: torch.Tensor,
        packed_vae_position_ids: torch.Tensor,
        packed_vae_token_indexes: torch.Tensor,
        packed_seqlens: torch.Tensor,
        packed_position_ids: torch.Tensor,
        packed_indexes: torch.Tensor,
        past_key_values: OfficialCache,
        key_values_lens: torch.Tensor,
        packed_key_value_indexes: torch.Tensor,
        num_timesteps: int = 24,
        timestep_shift: float = 1.0,
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: RenormType = "global",
        cfg_interval: tuple[float, float] = (0, 1),
        cfg_text_scale: float = 1.0,
        cfg_text_packed_query_indexes: torch.Tensor | None = None,
        cfg_text_packed_position_ids: torch.Tensor | None = None,
        cfg_text_past_key_values: OfficialCache | None = None,
        cfg_text_key_values_lens: torch.Tensor | None = None,
        cfg_text_packed_key_value_indexes: torch.Tensor | None = None,
        cfg_img_scale: float = 1.0,
        cfg_img_packed_query_indexes: torch.Tensor | None = None,
        cfg_img_packed_position_ids: torch.Tensor | None = None,
        cfg_img_past_key_values: OfficialCache | None = None,
        cfg_img_key_values_lens: torch.Tensor | None = None,
        cfg_img_packed_key_value_indexes: torch.Tensor | None = None,
        cfg_type: str = "parallel",
        enable_taylorseer: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Denoise an image for each sample.

        As in the official code, the norm of ``cfg_renorm_type="global"`` is taken over all images, and ``cfg_type`` has
        no effect.

        Returns:
            Latents [grid_h * grid_w, features] of each image, on the device of the noise.
        """
        reject_taylorseer(enable_taylorseer)
        self.check_visual_gen()
        self._set_markers(packed_text_ids)
        settings = ImageSettings(
            cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_min, cfg_renorm_type, timestep_shift, num_timesteps
        )
        lengths = packed_seqlens.tolist()
        cond = self._clone_contexts(past_key_values, key_values_lens, packed_position_ids, lengths)
        no_text = no_img = cond
        # Without text guidance the official code drops image guidance too.
        if settings.cfg_text_scale > 1:
            no_text = self._clone_contexts(
                cfg_text_past_key_values, cfg_text_key_values_lens, cfg_text_packed_position_ids, lengths
            )
            if settings.cfg_img_scale > 1:
                no_img = self._clone_contexts(
                    cfg_img_past_key_values, cfg_img_key_values_lens, cfg_img_packed_position_ids, lengths
                )
        tokens, config = [length - MARKERS for length in lengths], self.model.config
        table = (config.max_latent_size, config.interpolate_pos)
        grids = [
            grid_from_position_ids("packed_vae_position_ids", ids, *table)
            for ids in packed_vae_position_ids.split(tokens)
        ]
        noises = packed_init_noises.split(tokens)
        tasks = [
            DenoisingTask(NoisedImage(*grid), noise, tuple(branches))
            for grid, noise, *branches in zip(grids, noises, cond, no_text, no_img, strict=True)
        ]
        return tuple(self.denoise(tasks, settings, packed_init_noises.device))

    def denoise(
        self, tasks: Sequence[DenoisingTask], settings: ImageSettings, device: torch.device
    ) -> list[torch.Tensor]:
        """Denoise with a progress bar, like the official code; return each image's latents [tokens, features].

        The latents are on ``device``.
        """
        guidance = official_guidance(self.model, tasks, settings)
        deduplicate = not isinstance(guidance, BatchGuidance)
        with closing(Denoiser(self.model, self.cache, tasks, guidance, self.graphs, deduplicate)) as denoiser:
            for index in tqdm(range(len(denoiser))):
                denoiser.step(index)
            with torch.inference_mode(False):  # callers get ordinary tensors, which autograd accepts
                return [latents.to(device, copy=True) for latents in denoiser.images()]

    @entry_point
    def generate_text(
        self,
        past_key_values: OfficialCache,
        packed_key_value_indexes: torch.Tensor,
        key_values_lens: torch.Tensor,
        packed_start_tokens: torch.Tensor,
        packed_query_position_ids: torch.Tensor,
        max_length: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        end_token_id: int | None = None,
    ) -> torch.Tensor:
        """Generate a text after each sample's context, and append the tokens that were fed to the contexts.

        As in the official code, all texts end where the first sample does. Sampling is seeded from the torch generator
        of the model's device.

        Returns:
            Token ids, int64 [steps, samples], beginning with the start token.
        """
        starts = packed_start_tokens.tolist()
        contexts = self._read_contexts(past_key_values, key_values_lens)
        for context, positions in zip(contexts, packed_query_position_ids.split([1] * len(starts)), strict=True):
            context.position = first_position(positions, 0)
        ids = self.generate_ids(contexts, starts, end_token_id, max_length, do_sample, temperature, keep=True)
        write_contexts(past_key_values, contexts, self.cache)
        with torch.inference_mode(False):  # as in denoise()
            return torch.tensor(ids, device=packed_start_tokens.device).T.contiguous()

    def generate_ids(
        self,
        contexts: Sequence[Context],
        starts: Sequence[int],
        end: int | None,
        max_length: int,
        do_sample: bool,
        temperature: float,
        keep: bool = False,
    ) -> list[list[int]]:
        """Token ids of a text after each context, beginning with its start token.

        All texts are as long as the first, which ends before ``end`` or after ``max_length`` tokens. With ``keep`` the
        ids are appended to the contexts.
        """
        check("max_length", max_length, integer(1))
        sampling = [
            Sampling(temperature, seed=draw_sampling_seed(self.model)) if do_sample else Sampling() for _ in contexts
        ]
        texts = [[start] for start in starts]
        decoding = generate_tokens(
            self.model, self.model.text, contexts, starts, None, max_length, sampling, self.graphs, keep=keep
        )
        with closing(decoding) as tokens:
            for index, token in tokens:
                if index == 0 and token == end:
                    break
                texts[index].append(token)
        return [text[:max_length] for text in texts]

    @entry_point
    def chat(
        self,
        tokenizer: Any,
        new_token_ids: Mapping[str, int | torch.Tensor],
        image_transform: Callable[[Any], torch.Tensor],
        images: Sequence[Any],
        prompt: str,
        max_length: int,
        do_sample: bool = False,
        temperature: float = 1.0,
    ) -> str:
        """Answer a prompt about images, with the official tokenizer and transform."""
        marker_ids = {name: int(token) for name, token in new_token_ids.items()}
        start, end = marker_ids["bos_token_id"], marker_ids["eos_token_id"]
        self._set_markers(torch.tensor([marker_ids["start_of_image"], marker_ids["end_of_image"]]))
        context, prefill, patch = Context(self.cache), Prefill(self.model, self.cache), self.model.config.vit.patch_size
        for image in images:
            pixels = image_transform(image)
            grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
            prefill.append(context, ViTImage(patchify(pixels, patch), *grid))
        prefill.append(context, Text((start, *tokenizer.encode(prompt), end)))
        prefill.run()
        [ids] = self.generate_ids([context], [start], end, max_length, do_sample, temperature)
        return extract_answer(tokenizer.decode(ids))

    def _set_markers(self, ids: torch.Tensor) -> None:
        """Set the model's image markers from (start, end) pairs; official modules only get them with each call."""
        pairs = [tuple(pair) for pair in ids.view(-1, 2).tolist()]
        markers = self.model.markers or pairs[0]
        if any(pair != markers for pair in pairs):
            raise invalid("packed_text_ids", pairs, f"{markers} for every image", "Use one pair of image markers")
        self.model.markers = markers

    def _read_contexts(self, past_key_values: OfficialCache, key_values_lens: torch.Tensor) -> list[Context]:
        """The contexts of a cache that the call fills."""
        if past_key_values is None:
            raise TypeError("past_key_values must be a NaiveCache, got None. Pass an empty one to start a context.")
        return read_contexts(past_key_values, key_values_lens.tolist(), self.cache)

    def _clone_contexts(
        self,
        past_key_values: OfficialCache | None,
        key_values_lens: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        lengths: Sequence[int],
    ) -> list[Context]:
        """Clones of the caller's contexts, which must not change, at the RoPE positions that the caller passed.

        Args:
            past_key_values: may be None for empty contexts, as in the official code.
            lengths: number of position ids of each sample, which are equal.
        """
        if key_values_lens is None or position_ids is None:
            raise TypeError("a guidance branch must have key_values_lens and packed_position_ids, got None.")
        contexts = read_contexts(past_key_values, key_values_lens.tolist(), self.cache)
        clones = [context.clone() for context in contexts]
        for clone, positions in zip(clones, position_ids.split(list(lengths)), strict=True):
            clone.position = first_position(positions, 0)
        return clones

    def _append(
        self,
        past_key_values: OfficialCache,
        key_values_lens: torch.Tensor,
        contents: Sequence[Content],
        positions: Sequence[torch.Tensor],
        position_step: int,
    ) -> OfficialCache:
        """Append one content to each sample's context, at the RoPE positions that the caller passed; fill the cache."""
        contexts = self._read_contexts(past_key_values, key_values_lens)
        prefill = Prefill(self.model, self.cache)
        for context, content, content_positions in zip(contexts, contents, positions, strict=True):
            context.position = first_position(content_positions, position_step)
            prefill.append(context, content)
        prefill.run()
        write_contexts(past_key_values, contexts, self.cache)
        return past_key_values
