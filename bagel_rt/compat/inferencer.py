"""The official ``InterleaveInferencer`` on this runtime: a script only changes its import."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypedDict

import torch
from PIL import Image
from torch import nn

from bagel_rt.compat.arguments import floor_size, reject_taylorseer
from bagel_rt.compat.caches import ContextCache, OfficialCache, read_contexts, write_contexts
from bagel_rt.compat.convert import convert_config, convert_tokenizer, has_visual_gen
from bagel_rt.compat.entry_points import EntryPoints
from bagel_rt.compat.exclusive import entry_point
from bagel_rt.compat.noise import draw_posterior_noise, draw_sampling_seed, noise_dtype
from bagel_rt.compat.weight_sharing import build_shared_model
from bagel_rt.models.bagel.contents import Content, NoisedImage
from bagel_rt.models.bagel.contexts import Noise, frame_text, noise_shapes
from bagel_rt.models.bagel.images import official_rgb
from bagel_rt.models.bagel.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE
from bagel_rt.models.bagel.settings import ImageSettings, RenormType, TextSettings
from bagel_rt.pipeline import Bagel
from bagel_rt.request import ImageRequest, Request
from bagel_rt.runtime.context import Context, Prefill
from bagel_rt.runtime.denoise import DenoisingTask

VLM_THINK_SYSTEM_PROMPT, GEN_THINK_SYSTEM_PROMPT = THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE


class GenContext(TypedDict):
    """The official state of one sample: its length, its next RoPE position and its cache."""

    kv_lens: list[int]
    ropes: list[int]
    past_key_values: OfficialCache | None


class InterleaveInferencer:
    """The official class, with its arguments, defaults, attributes and results.

    Requests run through this runtime's engine: equal guidance branches are computed once, and steps replay CUDA graphs.
    Scripts that build contexts themselves can use ``init_gen_context``, ``update_context_text`` and so on. A subclass
    can override these methods: its requests then run through them, step by step, as in the official code.
    Noise comes from torch's global generators, as in the official code, so ``torch.manual_seed`` determines the image.
    Thread-safe: calls run one at a time.
    """

    def __init__(
        self,
        model: nn.Module | Bagel,
        vae_model: nn.Module | None = None,
        tokenizer: Any = None,
        vae_transform: Any = None,
        vit_transform: Any = None,
        new_token_ids: Mapping[str, int] | None = None,
    ):
        """
        Args:
            model: an official ``Bagel`` module, whose weights are shared (see :func:`bagel_rt.compat.accelerate`); or a
                :class:`bagel_rt.Bagel`, without further arguments.
            vae_model: the official autoencoder, copied if it is on another device than the model or not float32. None
                for a module with ``visual_gen=False``.
            tokenizer: the Hugging Face tokenizer, with the special tokens added.
            vae_transform, vit_transform: the official ``ImageTransform`` objects.
            new_token_ids: token ids of the markers, as ``add_special_tokens`` returns them.

        Raises:
            TypeError, ValueError: an argument is missing or not the official object; nothing was changed.
        """
        visual_gen = True
        if isinstance(model, Bagel):
            self.bagel = model
        else:
            visual_gen = has_visual_gen(model)
            required: dict[str, object] = {
                "tokenizer": tokenizer,
                "vae_transform": vae_transform,
                "vit_transform": vit_transform,
                "new_token_ids": new_token_ids,
            }
            if visual_gen:
                required["vae_model"] = vae_model
            missing = [name for name, argument in required.items() if argument is None]
            if missing:
                raise TypeError(
                    f"{', '.join(missing)} must be given with an official module, got None. Pass all six arguments of "
                    "the official inferencer."
                )
            own_tokenizer = convert_tokenizer(tokenizer, new_token_ids or {})
            config = convert_config(model, vae_transform, vit_transform)
            markers = (own_tokenizer.start_of_image, own_tokenizer.end_of_image)
            self.bagel = Bagel(build_shared_model(model, vae_model, config, markers), own_tokenizer)
        self.model, self.vae_model, self.tokenizer = model, vae_model, tokenizer
        self.vae_transform, self.vit_transform, self.new_token_ids = vae_transform, vit_transform, new_token_ids
        engine = self.bagel.engine
        self._entry_points = EntryPoints(self.bagel.model, engine.cache, engine.graphs, visual_gen)

    def __call__(
        self, image: Image.Image | None = None, text: str | None = None, **kargs: Any
    ) -> dict[str, str | Image.Image | None]:
        """Run a request of an image, a text, or both; keyword arguments as for :meth:`interleave_inference`.

        Returns:
            ``{"image": ..., "text": ...}``, None for what was not generated.
        """
        output: dict[str, str | Image.Image | None] = {"image": None, "text": None}
        inputs = [part for part in (image, text) if part is not None]
        if not inputs:
            print("Please provide at least one input: either an image or text.")
            return output
        for part in self.interleave_inference(inputs, **kargs):
            output["text" if isinstance(part, str) else "image"] = part
        return output

    def interleave_inference(
        self,
        input_lists: Sequence[str | Image.Image],
        think: bool = False,
        understanding_output: bool = False,
        max_think_token_n: int = 1000,
        do_sample: bool = False,
        text_temperature: float = 0.3,
        cfg_text_scale: float = 3.0,
        cfg_img_scale: float = 1.5,
        cfg_interval: tuple[float, float] = (0.4, 1.0),
        timestep_shift: float = 3.0,
        num_timesteps: int = 50,
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: RenormType = "global",
        image_shapes: tuple[int, int] = (1024, 1024),
        enable_taylorseer: bool = False,
    ) -> list[str | Image.Image]:
        """Run a request of texts and images.

        Returns:
            [text] with ``understanding_output``; else [image], or [thought, image] with ``think``.

        Raises:
            ValueError: a value is out of range, a part is neither text nor image, or ``enable_taylorseer`` is set.
        """
        parts = [self._check_part(part) for part in input_lists]
        system = (THINK_BEFORE_ANSWER if understanding_output else THINK_BEFORE_IMAGE) if think else None
        gen_text = {"max_length": max_think_token_n, "do_sample": do_sample, "temperature": text_temperature}
        gen_image: dict[str, Any] = {
            "cfg_text_scale": cfg_text_scale,
            "cfg_img_scale": cfg_img_scale,
            "cfg_interval": cfg_interval,
            "timestep_shift": timestep_shift,
            "num_timesteps": num_timesteps,
            "cfg_renorm_min": cfg_renorm_min,
            "cfg_renorm_type": cfg_renorm_type,
        }
        with self._official_autocast():
            if _has_overridden_steps(self):
                gen_image["enable_taylorseer"] = enable_taylorseer
                settings = None if understanding_output else gen_image
                return self._run_steps(parts, system, settings, gen_text, image_shapes)
            reject_taylorseer(enable_taylorseer)
            image = None if understanding_output else ImageSettings(**gen_image)
            text = TextSettings(max_think_token_n)
            if do_sample:  # otherwise the temperature has no effect, whatever it is
                text = TextSettings(max_think_token_n, True, text_temperature)
            return self._run_request(parts, system, image, text, image_shapes)

    def _run_request(
        self,
        parts: list[str | Image.Image],
        system: str | None,
        image: ImageSettings | None,
        text: TextSettings,
        image_shapes: tuple[int, int],
    ) -> list[str | Image.Image]:
        """Run a request through the engine; ``image`` is None for an answer in text."""
        dtype = None if self.vae_model is None else noise_dtype(self.vae_model)
        with self.inference_scope():
            if image is None:
                seed = draw_sampling_seed(self.bagel.model) if text.do_sample else 0
                question = Request(inputs=parts, seed=seed, text=text, system=system)
                self.bagel.check_request(question)
                return ["".join(self.bagel.engine.run_answer(question))]
            config = self.bagel.model.config
            self._entry_points.check_visual_gen()
            edits = any(isinstance(part, Image.Image) for part in parts)
            size = self.bagel.check_size(None if edits else floor_size(config, image_shapes))
            # Noise before the sampling seed: on a CPU one generator serves both, and sampling must not change the
            # noise. The official order: posterior noise for each encoded image, then the initial latent.
            *posteriors, latent = noise_shapes(config, parts, size)
            noise = [self._draw_posterior_noise(shape, dtype) for shape in posteriors] + [torch.randn(latent)]
            request = ImageRequest(
                inputs=parts,
                seed=draw_sampling_seed(self.bagel.model) if text.do_sample else 0,
                text=text,
                system=system,
                size=size,
                image=image,
                noise=noise,
            )
            self.bagel.check_request(request)
            [result] = self.bagel.engine.run_images([request])
            return [result.image] if result.thought is None else [result.thought, result.image]

    def _run_steps(
        self,
        parts: list[str | Image.Image],
        system: str | None,
        gen_image: dict[str, Any] | None,
        gen_text: dict[str, Any],
        image_shape: tuple[int, int],
    ) -> list[str | Image.Image]:
        """Run a request through the methods that a subclass may override, in the official order.

        Args:
            gen_image: keyword arguments of that method; None for an answer in text.
            gen_text: keyword arguments of that method.
        """
        gen = self.init_gen_context()
        no_text, no_img = copy.deepcopy(gen), copy.deepcopy(gen)
        if system is not None:
            gen, no_img = self.update_context_text(system, gen), self.update_context_text(system, no_img)
        for part in parts:
            if isinstance(part, str):
                no_text = copy.deepcopy(gen)
                gen, no_img = self.update_context_text(part, gen), self.update_context_text(part, no_img)
            else:
                resized = self.bagel.model.config.vae_transform.resize(part)
                gen = self.update_context_image(resized, gen, vae=gen_image is not None)
                image_shape, no_text = (resized.height, resized.width), copy.deepcopy(gen)
        outputs: list[str | Image.Image] = []
        if gen_image is None or system is not None:
            text = self.gen_text(gen, **gen_text)
            outputs.append(text)
        if gen_image is None:
            return outputs
        if system is not None:
            gen = self.update_context_text(text, gen)
        gen_image = {"cfg_text_precontext": no_text, "cfg_img_precontext": no_img, **gen_image}
        return [*outputs, self.gen_image(image_shape, gen, **gen_image)]

    def inference_scope(self) -> AbstractContextManager[None]:
        """Exclusive use of the model in inference mode."""
        return self._entry_points.inference_scope()

    def _check_part(self, part: object) -> str | Image.Image:
        if isinstance(part, Image.Image):
            return official_rgb(part)
        if not isinstance(part, str):
            raise ValueError(f"input_lists must hold str and PIL images only, got {type(part).__name__}.")
        return part

    def _official_autocast(self) -> AbstractContextManager[object]:
        """The autocast of the official inferencer; it decides the dtype of the noise of an autoencoder on a GPU."""
        modules = [module for module in (self.model, self.vae_model) if isinstance(module, nn.Module)]
        if any(next(module.parameters()).is_cuda for module in modules):
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def _draw_posterior_noise(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
        """Draw what the official autoencoder would draw; without one, float32 on the model's device."""
        if self.vae_model is None or dtype is None:
            return torch.randn(shape, device=self.bagel.model.device)
        return draw_posterior_noise(self.vae_model, shape, dtype)

    # For scripts that build contexts themselves

    def init_gen_context(self) -> GenContext:
        """An empty context."""
        layers = self.bagel.model.config.llm.num_layers
        return {"kv_lens": [0], "ropes": [0], "past_key_values": ContextCache(layers)}

    @entry_point
    def update_context_text(self, text: str, gen_context: GenContext) -> GenContext:
        """Append a text to ``gen_context``, in place, and return it."""
        return self._append(gen_context, [frame_text(self.bagel.tokenizer, text)])

    def update_context_image(
        self, image: Image.Image, gen_context: GenContext, vae: bool = True, vit: bool = True
    ) -> GenContext:
        """Append an image to ``gen_context``, in place, and return it.

        Args:
            image: already resized by the autoencoder's rule.
            gen_context: the context to extend.
            vae, vit: whether to append its clean latents and its ViT patches; at least one must be True.
        """
        if not (vae or vit):
            raise ValueError("vae or vit must be True, got False for both.")
        model, image = self.bagel.model, official_rgb(image)
        contents: list[Content] = []
        dtype = None if self.vae_model is None else noise_dtype(self.vae_model)
        with self.inference_scope():
            if vae:
                self._entry_points.check_visual_gen()
                resized = model.config.vae_transform.resize(image)
                shape = noise_shapes(model.config, [resized], (resized.height, resized.width))[0]
                contents.append(model.encode_latents(resized, Noise(0, [self._draw_posterior_noise(shape, dtype)])))
            if vit:
                contents.append(model.encode_patches(model.config.vit_transform.resize(image)))
            return self._append(gen_context, contents)

    @entry_point
    def gen_image(
        self,
        image_shape: tuple[int, int],
        gen_context: GenContext,
        cfg_text_scale: float = 4.0,
        cfg_img_scale: float = 1.5,
        cfg_text_precontext: GenContext | None = None,
        cfg_img_precontext: GenContext | None = None,
        cfg_interval: tuple[float, float] = (0.4, 1.0),
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: RenormType = "global",
        num_timesteps: int = 50,
        timestep_shift: float = 3.0,
        enable_taylorseer: bool = False,
    ) -> Image.Image:
        """Generate an image of (height, width) pixels from a context.

        ``cfg_text_precontext`` and ``cfg_img_precontext`` are the contexts of the two guidance branches; None disables
        the guidance of a branch, because its context then equals ``gen_context``.
        """
        reject_taylorseer(enable_taylorseer)
        self._entry_points.check_visual_gen()
        settings = ImageSettings(
            cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_min, cfg_renorm_type, timestep_shift, num_timesteps
        )
        config = self.bagel.model.config
        size = self.bagel.check_size(floor_size(config, image_shape))
        [shape] = noise_shapes(config, [], size)
        precontexts = (gen_context, cfg_text_precontext or gen_context, cfg_img_precontext or gen_context)
        branches = tuple(self._read_context(context).clone() for context in precontexts)
        for branch, context in zip(branches, precontexts, strict=True):
            [branch.position] = context["ropes"]
        noise = torch.randn(shape)
        task = DenoisingTask(NoisedImage(*config.latent_grid(size)), noise, branches)
        # On the device of the noise, as officially: an overridden decode_image may run the official autoencoder.
        [latent] = self._entry_points.denoise([task], settings, noise.device)
        return self.decode_image(latent, image_shape)

    @entry_point
    def decode_image(self, latent: torch.Tensor, image_shape: tuple[int, int]) -> Image.Image:
        """Decode latent tokens [n, features], on any device, to an image of (height, width) pixels."""
        model = self.bagel.model
        latent = latent.to(model.device, torch.float32)
        content = NoisedImage(*model.config.latent_grid(image_shape))
        return model.decode_image(latent, content, self.bagel.engine.graphs)

    @entry_point
    def gen_text(
        self, gen_context: GenContext, max_length: int = 500, do_sample: bool = True, temperature: float = 1.0
    ) -> str:
        """Generate a text after a context, which does not change."""
        tokenizer, context = self.bagel.tokenizer, self._read_context(gen_context).clone()
        [context.position] = gen_context["ropes"]
        [ids] = self._entry_points.generate_ids(
            [context], [tokenizer.bos], tokenizer.eos, max_length, do_sample, temperature
        )
        return tokenizer.answer(ids)

    def _read_context(self, gen_context: GenContext) -> Context:
        [context] = read_contexts(gen_context["past_key_values"], gen_context["kv_lens"], self.bagel.cache)
        return context

    def _append(self, gen_context: GenContext, contents: Sequence[Content]) -> GenContext:
        cache = gen_context["past_key_values"]
        if cache is None:
            raise TypeError("past_key_values must be a NaiveCache, got None. Start with init_gen_context().")
        context = self._read_context(gen_context)
        [context.position] = gen_context["ropes"]
        prefill = Prefill(self.bagel.model, context.cache)
        for content in contents:
            prefill.append(context, content)
        prefill.run()
        write_contexts(cache, [context], context.cache)
        gen_context["kv_lens"], gen_context["ropes"] = [context.length], [context.position]
        return gen_context


_STEPS = {
    name: vars(InterleaveInferencer)[name]
    for name in (
        "init_gen_context", "update_context_text", "update_context_image", "gen_text", "gen_image", "decode_image",
    )
}  # fmt: skip


def _has_overridden_steps(inferencer: InterleaveInferencer) -> bool:
    """Whether a subclass, an attribute of the instance, or a patch of the class replaces a step of a request."""
    steps = {name: getattr(getattr(inferencer, name), "__func__", None) for name in _STEPS}
    return steps != _STEPS
