"""The inference entry points of the official module, with its arguments, on this runtime.

Official callers pack every call themselves: token ids, lengths, RoPE positions, and indexes into the sequence with and
without the cache. The runtime derives the indexes from the context, so index arguments are ignored. Position ids,
grids, start tokens and noise are read from the arguments, because callers may choose them.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import torch
from tqdm import tqdm

from bagel_rt.compat.arguments import (
    ContextBatch,
    check_latent_position_ids,
    extract_answer,
    first_position,
    grid_from_position_ids,
    reject_taylorseer,
)
from bagel_rt.compat.exclusive import entry_point, exclusive
from bagel_rt.compat.weight_sharing import WeightSync
from bagel_rt.models.bagel.contents import MARKERS, Content, NoisedImage, Text, VAEImage, ViTImage
from bagel_rt.models.bagel.embed import patchify
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.settings import ImageSettings
from bagel_rt.runtime.context import Context, Prefill
from bagel_rt.runtime.decode import MAX_TEXTS, Sampling, generate_tokens
from bagel_rt.runtime.denoise import Denoiser, DenoisingTask
from bagel_rt.runtime.graphs import GraphCache
from bagel_rt.validation import invalid


class EntryPoints:
    """The entry points of one model. Names, arguments in order, defaults and results are the official module's.

    Thread-safe: calls run one at a time.
    """

    def __init__(self, model: BagelModel, cache=None, graphs: GraphCache | None = None, visual_gen: bool = True):
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
        past_key_values,
        packed_text_ids,
        packed_text_position_ids,
        text_token_lens,
        packed_text_indexes,
        packed_key_value_indexes,
        key_values_lens,
    ) -> ContextBatch:
        """Append a text to each sample's context. The ids include the start and end token."""
        lengths = text_token_lens.tolist()
        texts = [Text(tuple(ids.tolist())) for ids in packed_text_ids.split(lengths)]
        positions = packed_text_position_ids.split(lengths)
        return self._append(past_key_values, key_values_lens, texts, positions, position_step=1)

    @entry_point
    def forward_cache_update_vit(
        self,
        past_key_values,
        packed_text_ids,
        packed_text_indexes,
        packed_vit_tokens,
        packed_vit_token_indexes,
        packed_vit_position_ids,
        vit_token_seqlens,
        packed_position_ids,
        packed_seqlens,
        packed_indexes,
        packed_key_value_indexes,
        key_values_lens,
    ) -> ContextBatch:
        """Append an image's ViT patches, [grid_h * grid_w, features], to each sample's context."""
        self._set_markers(packed_text_ids)
        lengths, images = vit_token_seqlens.tolist(), []
        table = (self.model.config.vit.max_patches_per_side, self.model.config.interpolate_pos)
        for patches, ids in zip(packed_vit_tokens.split(lengths), packed_vit_position_ids.split(lengths), strict=True):
            images.append(ViTImage(patches, *grid_from_position_ids("packed_vit_position_ids", ids, *table)))
        positions = packed_position_ids.split(packed_seqlens.tolist())
        return self._append(past_key_values, key_values_lens, images, positions, position_step=0)

    @entry_point
    def forward_cache_update_vae(
        self,
        vae_model,
        past_key_values,
        padded_images,
        patchified_vae_latent_shapes,
        packed_vae_position_ids,
        packed_timesteps,
        packed_vae_token_indexes,
        packed_text_ids,
        packed_text_indexes,
        packed_position_ids,
        packed_seqlens,
        packed_indexes,
        key_values_lens,
        packed_key_value_indexes,
    ) -> ContextBatch:
        """Append an image's clean latents to each sample's context; ``vae_model.encode`` computes them, on the device
        and in the dtype of ``vae_model``."""
        self.check_visual_gen()
        self._set_markers(packed_text_ids)
        if packed_timesteps.any():
            raise invalid("packed_timesteps", packed_timesteps.tolist(), "0, because images in a context are clean")
        config = self.model.config
        patch, images = config.latent_patch_size, []
        grids = [(int(grid_h), int(grid_w)) for grid_h, grid_w in patchified_vae_latent_shapes]
        lengths = [grid_h * grid_w for grid_h, grid_w in grids]
        for ids, grid in zip(packed_vae_position_ids.split(lengths), grids, strict=True):
            check_latent_position_ids(ids, grid, config.max_latent_size, config.interpolate_pos)
        if "encode" not in vars(vae_model):  # an accelerated autoencoder converts the pixels itself
            padded_images = padded_images.to(next(vae_model.parameters()))
        padded_latents = vae_model.encode(padded_images)
        for latent, (grid_h, grid_w) in zip(padded_latents, grids, strict=True):
            tokens = patchify(latent[:, : grid_h * patch, : grid_w * patch], patch)
            images.append(VAEImage(tokens, grid_h, grid_w))
        positions = packed_position_ids.split(packed_seqlens.tolist())
        return self._append(past_key_values, key_values_lens, images, positions, position_step=0)

    @entry_point
    def generate_image(
        self,
        packed_text_ids,
        packed_text_indexes,
        packed_init_noises,
        packed_vae_position_ids,
        packed_vae_token_indexes,
        packed_seqlens,
        packed_position_ids,
        packed_indexes,
        past_key_values,
        key_values_lens,
        packed_key_value_indexes,
        num_timesteps=24,
        timestep_shift=1.0,
        cfg_renorm_min=0.0,
        cfg_renorm_type="global",
        cfg_interval=(0, 1),
        cfg_text_scale=1.0,
        cfg_text_packed_query_indexes=None,
        cfg_text_packed_position_ids=None,
        cfg_text_past_key_values=None,
        cfg_text_key_values_lens=None,
        cfg_text_packed_key_value_indexes=None,
        cfg_img_scale=1.0,
        cfg_img_packed_query_indexes=None,
        cfg_img_packed_position_ids=None,
        cfg_img_past_key_values=None,
        cfg_img_key_values_lens=None,
        cfg_img_packed_key_value_indexes=None,
        cfg_type="parallel",
        enable_taylorseer=False,
    ) -> tuple[torch.Tensor, ...]:
        """Denoise an image for each sample.

        Unlike in the official code, the norm of ``cfg_renorm_type="global"`` is taken over each image, not over the
        batch. ``cfg_type`` has no effect, as in the official code.

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
            branch = (cfg_text_past_key_values, cfg_text_key_values_lens, cfg_text_packed_position_ids)
            no_text = self._clone_contexts(*branch, lengths)
            if settings.cfg_img_scale > 1:
                branch = (cfg_img_past_key_values, cfg_img_key_values_lens, cfg_img_packed_position_ids)
                no_img = self._clone_contexts(*branch, lengths)
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
        guidance = self.model.guidance(tasks, [settings] * len(tasks))
        with closing(Denoiser(self.model, self.cache, tasks, guidance, self.graphs)) as denoiser:
            for index in tqdm(range(len(denoiser))):
                denoiser.step(index)
            with torch.inference_mode(False):  # callers get ordinary tensors, which autograd accepts
                return [latents.to(device, copy=True) for latents in denoiser.images()]

    @entry_point
    def generate_text(
        self,
        past_key_values,
        packed_key_value_indexes,
        key_values_lens,
        packed_start_tokens,
        packed_query_position_ids,
        max_length,
        do_sample=False,
        temperature=1.0,
        end_token_id=None,
    ) -> torch.Tensor:
        """Generate a text after each sample's context. The contexts do not change.

        As in the official code, the batch ends when its first sample does. Here a sample that ends earlier is padded
        with the end token. Sampling is seeded from the torch generator of the model's device.

        Returns:
            Token ids, int64 [steps, samples], beginning with the start token.

        Raises:
            ValueError: more than 8 samples, or different start tokens.
        """
        starts = packed_start_tokens.tolist()
        if len(set(starts)) != 1 or len(starts) > MAX_TEXTS:
            raise invalid(
                "packed_start_tokens",
                starts,
                f"1 to {MAX_TEXTS} equal tokens, one per sample",
                "Split the batch over several calls",
            )
        contexts = self._clone_contexts(past_key_values, key_values_lens, packed_query_position_ids, [1] * len(starts))
        ids = self.generate_ids(contexts, starts[0], end_token_id, max_length, do_sample, temperature)
        with torch.inference_mode(False):  # as in denoise()
            return torch.tensor(ids, device=packed_start_tokens.device).T.contiguous()

    def generate_ids(
        self, contexts: Sequence[Context], start: int, end: int | None, max_length: int, do_sample, temperature
    ) -> list[list[int]]:
        """Token ids of a text after each context, ``start`` included, cut or padded to the length of the first."""
        sampling = [
            Sampling(temperature, seed=draw_sampling_seed(self.model)) if do_sample else Sampling() for _ in contexts
        ]
        end = -1 if end is None else end
        texts: list[list[int]] = [[start] for _ in contexts]
        decoding = generate_tokens(self.model, self.model.text, contexts, start, end, max_length, sampling, self.graphs)
        with closing(decoding) as tokens:
            for index, token in tokens:
                texts[index].append(token)
        length = len(texts[0])
        return [(text + [end] * length)[:length] for text in texts]

    @entry_point
    def chat(
        self, tokenizer, new_token_ids, image_transform, images, prompt, max_length, do_sample=False, temperature=1.0
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
        [ids] = self.generate_ids([context], start, end, max_length, do_sample, temperature)
        return extract_answer(tokenizer.decode(ids))

    def _set_markers(self, ids: torch.Tensor) -> None:
        """Set the model's image markers from (start, end) pairs; official modules only get them with each call."""
        pairs = [tuple(pair) for pair in ids.view(-1, 2).tolist()]
        markers = self.model.markers or pairs[0]
        if any(pair != markers for pair in pairs):
            raise invalid("packed_text_ids", pairs, f"{markers} for every image", "Use one pair of image markers")
        self.model.markers = markers

    def _get_contexts(self, past_key_values, key_values_lens) -> ContextBatch:
        """The contexts of the caller's cache, checked against its lengths; new ones if it is empty, official or not."""
        lengths = key_values_lens.tolist()
        if isinstance(past_key_values, ContextBatch):
            batch = past_key_values
        elif getattr(past_key_values, "seq_lens", None) == 0:
            batch = ContextBatch([])
        else:
            raise TypeError(
                "past_key_values must be empty or returned by the accelerated module, got a "
                f"{type(past_key_values).__name__} that is neither. Start with an empty cache after accelerate()."
            )
        if not batch.contexts:
            batch.contexts += [Context(self.cache) for _ in lengths]
        cached = [context.length for context in batch.contexts]
        if cached != lengths:
            raise invalid("key_values_lens", lengths, f"{cached}, the lengths of past_key_values")
        if any(context.cache is not self.cache for context in batch.contexts):
            raise ValueError("past_key_values must belong to this model. Start with an empty cache.")
        return batch

    def _clone_contexts(self, past_key_values, key_values_lens, position_ids, lengths: list[int]) -> list[Context]:
        """Clones of the caller's contexts, which must not change, at the RoPE positions that the caller passed."""
        if past_key_values is None:
            raise ValueError("the cache of a guidance branch must be set when guidance is on, got None.")
        contexts = self._get_contexts(past_key_values, key_values_lens).contexts
        clones = [context.clone() for context in contexts]
        for clone, positions in zip(clones, position_ids.split(lengths), strict=True):
            clone.position = first_position(positions, 0)
        return clones

    def _append(
        self,
        past_key_values,
        key_values_lens,
        contents: Sequence[Content],
        positions: Sequence[torch.Tensor],
        position_step: int,
    ) -> ContextBatch:
        """Append one content to each sample's context, at the RoPE positions that the caller passed."""
        batch = self._get_contexts(past_key_values, key_values_lens)
        prefill = Prefill(self.model, self.cache)
        for context, content, content_positions in zip(batch.contexts, contents, positions, strict=True):
            context.position = first_position(content_positions, position_step)
            prefill.append(context, content)
        prefill.run()
        return batch


def draw_sampling_seed(model: BagelModel) -> int:
    """A seed from the torch generator of the model's device, with which the official code samples tokens.

    On a GPU, latent noise comes from the CPU generator, so it is the same with and without sampled text.
    """
    return int(torch.randint(2**62, (), device=model.device))
