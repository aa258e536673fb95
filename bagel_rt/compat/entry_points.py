"""The official module's inference entry points, with its own arguments, over this runtime.

The official code packs every call itself: token ids, indexes into the sequence with and without the cache, lengths,
positions. Here these follow from what a context is. What a caller could have chosen otherwise (positions, grids, start
tokens, noise) is taken from the arguments; the indexes, which can only be what they are, are not looked at.
"""

import functools
from collections.abc import Sequence
from contextlib import closing

import torch
from tqdm import tqdm

from bagel_rt.context import Context, Prefill, Text, VAEImage, ViTImage
from bagel_rt.decode import Sampling, generate_tokens
from bagel_rt.denoise import Denoiser, ImageTask
from bagel_rt.graphs import Graphs
from bagel_rt.models.bagel.embed import patchify, position_ids
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.settings import ImageSettings


class Contexts:
    """What the official code keeps in its ``NaiveCache``: here contexts, one for each sample of a batch.

    ``copy.deepcopy`` of it costs nothing: copies share their slots until one of them goes another way.
    """

    def __init__(self, contexts: Sequence[Context]):
        self.contexts = list(contexts)

    def __deepcopy__(self, memo) -> "Contexts":
        return Contexts([context.clone() for context in self.contexts])

    @property
    def seq_lens(self) -> int:
        """Tokens of all samples together."""
        return sum(context.length for context in self.contexts)


def _entry_point(call):
    """Without gradients, and in the model's own precision, whatever autocast the caller is in."""

    @functools.wraps(call)
    def wrapped(self, *arguments, **named):
        with torch.inference_mode(), torch.autocast(self.model.device.type, enabled=False):
            return call(self, *arguments, **named)

    return wrapped


class EntryPoints:
    """The entry points of one model. Names, arguments and results are the official module's."""

    def __init__(self, model: BagelModel, cache=None, graphs: Graphs | None = None):
        """
        Args:
            model: the network.
            cache, graphs: of an engine that they are shared with; by default own ones.
        """
        self.model = model
        self.cache = model.make_cache() if cache is None else cache
        self.graphs = graphs or Graphs.on(model.device)
        if graphs is None:
            self.cache.moved.append(self.graphs.forget)

    @_entry_point
    def forward_cache_update_text(
        self, past_key_values, packed_text_ids, packed_text_position_ids, text_token_lens, **indexes
    ) -> Contexts:
        """Append a text to each sample's context. Ids come framed; positions must go up by one a token."""
        lengths = text_token_lens.tolist()
        found = self._open(past_key_values, indexes["key_values_lens"])
        prefill = Prefill(self.model, self.cache)
        parts = zip(
            found.contexts, packed_text_ids.split(lengths), packed_text_position_ids.split(lengths), strict=True
        )
        for context, ids, positions in parts:
            first = int(positions[0])
            _check_positions(positions, torch.arange(first, first + len(ids)))
            context.position = first
            prefill.append(context, Text(tuple(ids.tolist())))
        prefill.run()
        return found

    @_entry_point
    def forward_cache_update_vit(
        self,
        past_key_values,
        packed_text_ids,
        packed_vit_tokens,
        packed_vit_position_ids,
        vit_token_seqlens,
        packed_position_ids,
        packed_seqlens,
        **indexes,
    ) -> Contexts:
        """Append a picture's ViT patches, [rows * columns, features], to each sample's context."""
        self._take_markers(packed_text_ids)
        config, lengths = self.model.config, vit_token_seqlens.tolist()
        sides = (config.vit.max_patches_per_side, config.interpolate_pos)
        grids = [grid_of(ids, *sides) for ids in packed_vit_position_ids.split(lengths)]
        images = [ViTImage(p, *grid) for p, grid in zip(packed_vit_tokens.split(lengths), grids, strict=True)]
        found = self._open(past_key_values, indexes["key_values_lens"])
        self._append_images(found.contexts, images, packed_position_ids, packed_seqlens)
        return found

    @_entry_point
    def forward_cache_update_vae(
        self,
        vae_model,
        past_key_values,
        padded_images,
        patchified_vae_latent_shapes,
        packed_timesteps,
        packed_text_ids,
        packed_position_ids,
        packed_seqlens,
        **indexes,
    ) -> Contexts:
        """Append a picture's clean latents to each sample's context; ``vae_model.encode`` makes them."""
        self._take_markers(packed_text_ids)
        if packed_timesteps.any():
            raise ValueError(f"packed_timesteps is {packed_timesteps.tolist()}: pictures in a context are clean, at 0")
        patch, images = self.model.config.latent_patch_size, []
        padded = vae_model.encode(padded_images.to(self.model.device))
        for latent, (rows, columns) in zip(padded, patchified_vae_latent_shapes, strict=True):
            tokens = patchify(latent[:, : rows * patch, : columns * patch], patch)
            images.append(VAEImage(tokens, rows, columns))
        found = self._open(past_key_values, indexes["key_values_lens"])
        self._append_images(found.contexts, images, packed_position_ids, packed_seqlens)
        return found

    @_entry_point
    def generate_image(
        self,
        packed_text_ids,
        packed_init_noises,
        packed_vae_position_ids,
        packed_seqlens,
        packed_position_ids,
        past_key_values,
        key_values_lens,
        num_timesteps=24,
        timestep_shift=1.0,
        cfg_renorm_min=0.0,
        cfg_renorm_type="global",
        cfg_interval=(0, 1),
        cfg_text_scale=1.0,
        cfg_text_packed_position_ids=None,
        cfg_text_past_key_values=None,
        cfg_text_key_values_lens=None,
        cfg_img_scale=1.0,
        cfg_img_packed_position_ids=None,
        cfg_img_past_key_values=None,
        cfg_img_key_values_lens=None,
        enable_taylorseer=False,
        **indexes,
    ) -> tuple[torch.Tensor, ...]:
        """Denoise a picture for each sample: latents [rows * columns, features] of each, on the noise's device.

        Unlike officially, the norm of ``cfg_renorm_type="global"`` is each picture's own.
        """
        refuse_taylorseer(enable_taylorseer)
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
        tokens, config = [length - 2 for length in lengths], self.model.config
        sides = (config.max_latent_size, config.interpolate_pos)
        grids = [grid_of(ids, *sides) for ids in packed_vae_position_ids.split(tokens)]
        noises = packed_init_noises.split(tokens)
        tasks = [
            ImageTask(*grid, noise, *branches, settings)
            for grid, noise, *branches in zip(grids, noises, contexts, no_text, no_img, strict=True)
        ]
        return tuple(latents.to(packed_init_noises.device) for latents in self.denoise(tasks))

    @_entry_point
    def denoise(self, tasks: Sequence[ImageTask]) -> list[torch.Tensor]:
        """The latents [rows * columns, features] of each picture, on the model's device, with a bar as officially."""
        with closing(Denoiser(self.model, self.cache, tasks, self.graphs)) as denoiser:
            for index in tqdm(range(len(denoiser))):
                denoiser.step(index)
            with torch.inference_mode(False):  # the caller's tensors are ordinary ones
                return [latents.clone() for latents in denoiser.images()]

    @_entry_point
    def generate_text(
        self,
        past_key_values,
        packed_start_tokens,
        packed_query_position_ids,
        key_values_lens,
        max_length,
        do_sample=False,
        temperature=1.0,
        end_token_id=None,
        **indexes,
    ) -> torch.Tensor:
        """Write a text behind each sample's context: ids int64 [steps, samples], the start token first.

        As officially, the first sample's end ends all; a sample that has ended before is filled with the end token.
        The contexts are left as they are. Sampling is seeded from torch's generator.
        """
        [start] = set(packed_start_tokens.tolist())
        contexts = self._at(past_key_values, key_values_lens, packed_query_position_ids, [1] * len(key_values_lens))
        sampling = [
            Sampling(temperature if do_sample else 0.0, seed=int(torch.randint(2**62, ())) if do_sample else 0)
            for _ in contexts
        ]
        end = -1 if end_token_id is None else end_token_id
        texts: list[list[int]] = [[start] for _ in contexts]
        run = generate_tokens(self.model, contexts, start, end, max_length, sampling, self.graphs)
        with closing(run) as tokens:
            for number, token in tokens:
                texts[number].append(token)
        length = len(texts[0])
        columns = [(text + [end] * length)[:length] for text in texts]
        return torch.tensor(columns, device=packed_start_tokens.device).T.contiguous()

    @_entry_point
    def chat(
        self, tokenizer, new_token_ids, image_transform, images, prompt, max_length, do_sample=False, temperature=1.0
    ) -> str:
        """Answer a question about pictures, with the official module's tokenizer and transform."""
        self._take_markers(torch.tensor([new_token_ids["start_of_image"], new_token_ids["end_of_image"]]))
        context, prefill = Context(self.cache), Prefill(self.model, self.cache)
        for image in images:
            prefill.append(context, self.patches(image_transform(image)))
        prefill.append(
            context, Text((new_token_ids["bos_token_id"], *tokenizer.encode(prompt), new_token_ids["eos_token_id"]))
        )
        prefill.run()
        written = self.generate_text(
            Contexts([context]),
            torch.tensor([new_token_ids["bos_token_id"]]),
            torch.tensor([context.position]),
            torch.tensor([context.length]),
            max_length,
            do_sample,
            temperature,
            new_token_ids["eos_token_id"],
        )
        return answer_of(tokenizer.decode(written[:, 0]))

    def patches(self, pixels: torch.Tensor) -> ViTImage:
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
            _check_positions(positions, positions[:1].expand_as(positions))
        return clones

    def _append_images(self, contexts, images, packed_position_ids, packed_seqlens) -> None:
        prefill = Prefill(self.model, self.cache)
        parts = zip(contexts, images, packed_position_ids.split(packed_seqlens.tolist()), strict=True)
        for context, image, positions in parts:
            context.position = int(positions[0])
            _check_positions(positions, positions[:1].expand_as(positions))
            prefill.append(context, image)
        prefill.run()


def grid_of(ids: torch.Tensor, side: int, interpolate: bool) -> tuple[int, int]:
    """(rows, columns) of the grid whose flattened position ids these are.

    Raises:
        ValueError: there is none.
    """
    count, ids = len(ids), ids.cpu()
    for rows in range(1, count + 1):
        if count % rows == 0 and (interpolate or max(rows, count // rows) <= side):
            if torch.equal(position_ids(rows, count // rows, side, interpolate), ids):
                return rows, count // rows
    raise ValueError(f"{count} position ids that are no grid of a table of {side} x {side}: {ids[:8].tolist()}, ...")


def answer_of(text: str) -> str:
    """What stands between the first frame's markers, by the official rule."""
    return text.split("<|im_end|>")[0].split("<|im_start|>")[1]


def refuse_taylorseer(enabled: bool) -> None:
    """ValueError if it is asked for."""
    if enabled:
        raise ValueError("enable_taylorseer is True: step caching is not supported, and changes pictures; leave it off")


def _check_positions(found: torch.Tensor, wanted: torch.Tensor) -> None:
    if not torch.equal(found.cpu(), wanted.cpu()):
        raise ValueError(f"position ids {found[:4].tolist()}, ... are not those of one content behind another")
