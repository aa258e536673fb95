"""The official module's inference entry points, with its own arguments, over this runtime.

The official code packs every call itself: token ids, indexes into the sequence with and without the cache, lengths,
positions. Here these follow from what a context is. What a caller could have chosen otherwise (positions, grids, start
tokens, noise) is taken from the arguments; the indexes, which can only be what they are, are not looked at.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import torch
from tqdm import tqdm

from bagel_rt.compat.arguments import (
    Contexts,
    answer_of,
    check_grid,
    check_positions,
    grid_of,
    refuse_taylorseer,
)
from bagel_rt.compat.exclusive import WeightSync, exclusive, guarded
from bagel_rt.models.bagel.contents import MARKERS, NoisedImage, Text, VAEImage, ViTImage
from bagel_rt.models.bagel.embed import patchify
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.settings import ImageSettings
from bagel_rt.runtime.context import Context, Prefill
from bagel_rt.runtime.decode import MAX_TEXTS, Sampling, generate_tokens
from bagel_rt.runtime.denoise import Denoiser, DenoisingTask
from bagel_rt.runtime.graphs import GraphCache


class EntryPoints:
    """The entry points of one model. Names, arguments in their order, defaults and results are the official module's.

    They may be called from several threads: one of them works at a time.
    """

    def __init__(self, model: BagelModel, cache=None, graphs: GraphCache | None = None, generates: bool = True):
        """
        Args:
            model: the network.
            cache, graphs: of an engine that they are shared with; by default own ones.
            generates: False if the weights that draw are missing.
        """
        self.model, self.generates = model, generates
        self.cache = model.make_cache() if cache is None else cache
        self.graphs = graphs or GraphCache.for_device(model.device)
        if graphs is None:
            self.cache.moved.append(self.graphs.invalidate)
        self._weights, self._depth = WeightSync(model, self.graphs), 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """What a computation runs under, without gradients too. The outermost one looks whether weights have changed:
        what runs inside it need not."""
        with exclusive(self.model), torch.inference_mode():
            if not self._depth:
                self._weights.sync()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def check_generates(self) -> None:
        """ValueError if the module cannot draw."""
        if not self.generates:
            raise ValueError(
                "the module was loaded with visual_gen=False: it answers, but neither draws nor encodes pictures for "
                "drawing; load it with visual_gen=True"
            )

    @guarded
    def forward_cache_update_text(
        self,
        past_key_values,
        packed_text_ids,
        packed_text_position_ids,
        text_token_lens,
        packed_text_indexes,
        packed_key_value_indexes,
        key_values_lens,
    ) -> Contexts:
        """Append a text to each sample's context. Ids come framed; positions must go up by one a token."""
        lengths = text_token_lens.tolist()
        found = self._open(past_key_values, key_values_lens)
        prefill = Prefill(self.model, self.cache)
        parts = zip(
            found.contexts, packed_text_ids.split(lengths), packed_text_position_ids.split(lengths), strict=True
        )
        for context, ids, positions in parts:
            first = int(positions[0])
            check_positions(positions, torch.arange(first, first + len(ids)))
            context.position = first
            prefill.append(context, Text(tuple(ids.tolist())))
        prefill.run()
        return found

    @guarded
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
    ) -> Contexts:
        """Append a picture's ViT patches, [rows * columns, features], to each sample's context."""
        self._take_markers(packed_text_ids)
        config, lengths = self.model.config, vit_token_seqlens.tolist()
        sides = (config.vit.max_patches_per_side, config.interpolate_pos)
        grids = [grid_of(ids, *sides) for ids in packed_vit_position_ids.split(lengths)]
        images = [ViTImage(p, *grid) for p, grid in zip(packed_vit_tokens.split(lengths), grids, strict=True)]
        found = self._open(past_key_values, key_values_lens)
        self._append_images(found.contexts, images, packed_position_ids, packed_seqlens)
        return found

    @guarded
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
    ) -> Contexts:
        """Append a picture's clean latents to each sample's context; ``vae_model.encode`` makes them where it is."""
        self.check_generates()
        self._take_markers(packed_text_ids)
        if packed_timesteps.any():
            raise ValueError(f"packed_timesteps is {packed_timesteps.tolist()}: pictures in a context are clean, at 0")
        config = self.model.config
        grids = [(int(rows), int(columns)) for rows, columns in patchified_vae_latent_shapes]
        ids = packed_vae_position_ids.split([rows * columns for rows, columns in grids])
        for of_image, grid in zip(ids, grids, strict=True):
            check_grid(of_image, grid, config.max_latent_size, config.interpolate_pos)
        patch, images = config.latent_patch_size, []
        if "encode" not in vars(vae_model):  # one that is accelerated takes pixels as they are
            padded_images = padded_images.to(next(vae_model.parameters()))
        padded = vae_model.encode(padded_images)
        for latent, (rows, columns) in zip(padded, grids, strict=True):
            tokens = patchify(latent[:, : rows * patch, : columns * patch], patch)
            images.append(VAEImage(tokens, rows, columns))
        found = self._open(past_key_values, key_values_lens)
        self._append_images(found.contexts, images, packed_position_ids, packed_seqlens)
        return found

    @guarded
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
        """Denoise a picture for each sample: latents [rows * columns, features] of each, on the noise's device.

        Unlike officially, the norm of ``cfg_renorm_type="global"`` is each picture's own. ``cfg_type`` plays no part,
        as officially.
        """
        refuse_taylorseer(enable_taylorseer)
        self.check_generates()
        self._take_markers(packed_text_ids)
        settings = ImageSettings(
            cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_min, cfg_renorm_type, timestep_shift, num_timesteps
        )
        lengths = packed_seqlens.tolist()
        contexts = self._at(past_key_values, key_values_lens, packed_position_ids, lengths)
        guided = settings.cfg_text_scale > 1
        no_text = no_img = contexts
        if guided:
            no_text = self._at(
                cfg_text_past_key_values, cfg_text_key_values_lens, cfg_text_packed_position_ids, lengths
            )
        if guided and settings.cfg_img_scale > 1:
            branch = (cfg_img_past_key_values, cfg_img_key_values_lens, cfg_img_packed_position_ids)
            no_img = self._at(*branch, lengths)
        tokens, config = [length - MARKERS for length in lengths], self.model.config
        sides = (config.max_latent_size, config.interpolate_pos)
        grids = [grid_of(ids, *sides) for ids in packed_vae_position_ids.split(tokens)]
        noises = packed_init_noises.split(tokens)
        tasks = [
            DenoisingTask(NoisedImage(*grid), noise, tuple(branches))
            for grid, noise, *branches in zip(grids, noises, contexts, no_text, no_img, strict=True)
        ]
        return tuple(self.denoise(tasks, settings, packed_init_noises.device))

    @guarded
    def denoise(
        self, tasks: Sequence[DenoisingTask], settings: ImageSettings, device: torch.device
    ) -> list[torch.Tensor]:
        """The latents [tokens, features] of each image, on a device, with a progress bar as officially."""
        guidance = self.model.guidance(tasks, [settings] * len(tasks))
        with closing(Denoiser(self.model, self.cache, tasks, guidance, self.graphs)) as denoiser:
            for index in tqdm(range(len(denoiser))):
                denoiser.step(index)
            with torch.inference_mode(False):  # the caller's tensors are ordinary ones
                return [latents.to(device, copy=True) for latents in denoiser.images()]

    @guarded
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
        """Write a text behind each sample's context: ids int64 [steps, samples], the start token first.

        As officially, the first sample's end ends all; a sample that has ended before is filled with the end token.
        The contexts are left as they are. Sampling is seeded from torch's generator of the model's device.

        Raises:
            ValueError: more than 8 samples, or start tokens that differ.
        """
        starts = packed_start_tokens.tolist()
        if len(set(starts)) != 1 or len(starts) > MAX_TEXTS:
            raise ValueError(
                f"packed_start_tokens is {starts}: one call writes 1 to {MAX_TEXTS} samples, which begin with the same "
                "token; make several calls"
            )
        contexts = self._at(past_key_values, key_values_lens, packed_query_position_ids, [1] * len(starts))
        ids = self.write(contexts, starts[0], end_token_id, max_length, do_sample, temperature)
        with torch.inference_mode(False):  # the caller's tensor is an ordinary one
            return torch.tensor(ids, device=packed_start_tokens.device).T.contiguous()

    @guarded
    def write(
        self, contexts: Sequence[Context], start: int, end: int | None, max_length: int, do_sample, temperature
    ) -> list[list[int]]:
        """The ids of a text behind each context, equally many: as many as the first has, with the start token."""
        sampling = [Sampling(temperature, seed=draw_seed(self.model)) if do_sample else Sampling() for _ in contexts]
        end = -1 if end is None else end
        texts: list[list[int]] = [[start] for _ in contexts]
        run = generate_tokens(self.model, self.model.text, contexts, start, end, max_length, sampling, self.graphs)
        with closing(run) as tokens:
            for number, token in tokens:
                texts[number].append(token)
        length = len(texts[0])
        return [(text + [end] * length)[:length] for text in texts]

    @guarded
    def chat(
        self, tokenizer, new_token_ids, image_transform, images, prompt, max_length, do_sample=False, temperature=1.0
    ) -> str:
        """Answer a question about pictures, with the official module's tokenizer and transform."""
        marks = {name: int(token) for name, token in new_token_ids.items()}
        self._take_markers(torch.tensor([marks["start_of_image"], marks["end_of_image"]]))
        context, prefill = Context(self.cache), Prefill(self.model, self.cache)
        for image in images:
            prefill.append(context, self._patches(image_transform(image)))
        prefill.append(context, Text((marks["bos_token_id"], *tokenizer.encode(prompt), marks["eos_token_id"])))
        prefill.run()
        [ids] = self.write([context], marks["bos_token_id"], marks["eos_token_id"], max_length, do_sample, temperature)
        return answer_of(tokenizer.decode(ids))

    def _patches(self, pixels: torch.Tensor) -> ViTImage:
        """A transformed picture [3, height, width] as ViT patches."""
        patch = self.model.config.vit.patch_size
        return ViTImage(patchify(pixels, patch), pixels.shape[1] // patch, pixels.shape[2] // patch)

    def _take_markers(self, ids: torch.Tensor) -> None:
        """The ids of a picture's start and end, which an official module is only told at each call."""
        found = [tuple(pair) for pair in ids.view(-1, 2).tolist()]
        markers = self.model.markers or found[0]
        if any(pair != markers for pair in found):
            raise ValueError(
                f"packed_text_ids frames pictures by {found}, before by {markers}: use one pair of markers"
            )
        self.model.markers = markers

    def _open(self, past_key_values, key_values_lens) -> Contexts:
        """The caller's contexts, to be appended to; new ones for an empty official cache."""
        lengths = key_values_lens.tolist()
        if isinstance(past_key_values, Contexts):
            found = past_key_values
            if not found.contexts:
                found.contexts += [Context(self.cache) for _ in lengths]
        elif getattr(past_key_values, "seq_lens", None) == 0:
            found = Contexts([Context(self.cache) for _ in lengths])
        else:
            raise TypeError(
                f"past_key_values is a {type(past_key_values).__name__} with keys in it: begin with an empty cache "
                "after the module was accelerated"
            )
        have = [context.length for context in found.contexts]
        if have != lengths:
            raise ValueError(f"key_values_lens is {lengths}, but the contexts hold {have} tokens")
        if any(context.cache is not self.cache for context in found.contexts):
            raise ValueError("past_key_values belongs to another model")
        return found

    def _at(self, past_key_values, key_values_lens, position_ids, lengths: list[int]) -> list[Context]:
        """Clones of the caller's contexts, at the positions that follow by the caller's count."""
        if past_key_values is None:
            raise ValueError("guidance is on, but the cache of its branch is None")
        clones = []
        for context, positions in zip(
            self._open(past_key_values, key_values_lens).contexts, position_ids.split(lengths), strict=True
        ):
            clones.append(context.clone())
            clones[-1].position = int(positions[0])
            check_positions(positions, positions[:1].expand_as(positions))
        return clones

    def _append_images(self, contexts, images, packed_position_ids, packed_seqlens) -> None:
        prefill = Prefill(self.model, self.cache)
        parts = zip(contexts, images, packed_position_ids.split(packed_seqlens.tolist()), strict=True)
        for context, image, positions in parts:
            context.position = int(positions[0])
            check_positions(positions, positions[:1].expand_as(positions))
            prefill.append(context, image)
        prefill.run()


def draw_seed(model: BagelModel) -> int:
    """Of a sampler, from the generator of the model's device, which the official code samples with: on a GPU the
    latents' noise, which the host's generator draws, is the same with and without sampled texts."""
    return int(torch.randint(2**62, (), device=model.device))
