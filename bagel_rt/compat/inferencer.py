"""The official ``InterleaveInferencer`` over this runtime: a script changes the line that imports it."""

import torch
from PIL import Image

from bagel_rt.compat.adopt import adopt_config, adopt_model, adopt_tokenizer, generates
from bagel_rt.compat.arguments import Contexts, refuse_taylorseer
from bagel_rt.compat.entry_points import EntryPoints, draw_seed
from bagel_rt.compat.exclusive import guarded
from bagel_rt.models.bagel.contents import NoisedImage
from bagel_rt.models.bagel.contexts import Noise, frame_text, noise_shapes
from bagel_rt.models.bagel.images import to_rgb
from bagel_rt.models.bagel.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE
from bagel_rt.models.bagel.settings import ImageSettings, TextSettings
from bagel_rt.pipeline import Bagel
from bagel_rt.request import Request
from bagel_rt.runtime.context import Context, Prefill
from bagel_rt.runtime.denoise import DenoisingTask

VLM_THINK_SYSTEM_PROMPT, GEN_THINK_SYSTEM_PROMPT = THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE


class InterleaveInferencer:
    """The official class: its arguments, defaults, attributes and results.

    Whole requests run as this runtime's own: equal guidance branches once, steps as CUDA graphs. The methods on
    contexts (``init_gen_context``, ``update_context_text``, ...) are there for scripts that arrange them themselves.
    Noise is drawn from torch's generators, as officially, so ``torch.manual_seed`` decides the picture. Several threads
    may call it; one of them works at a time.
    """

    def __init__(
        self, model, vae_model=None, tokenizer=None, vae_transform=None, vit_transform=None, new_token_ids=None
    ):
        """
        Args:
            model: an official ``Bagel`` module, whose weights are taken over in place (see
                :func:`bagel_rt.compat.accelerate`); or a :class:`bagel_rt.Bagel`, and nothing else.
            vae_model: the official autoencoder; on another device, or of another dtype than float32, a copy is made of
                it. None for a module of ``visual_gen=False``.
            tokenizer: the Hugging Face tokenizer, with the special tokens added.
            vae_transform, vit_transform: the official ``ImageTransform`` of either.
            new_token_ids: ids of the markers, as ``add_special_tokens`` returns them.

        Raises:
            TypeError, ValueError: an object is another than the official scripts give; nothing was changed.
        """
        draws = True
        if not isinstance(model, Bagel):
            draws = generates(model)
            needed = [tokenizer, vae_transform, vit_transform, new_token_ids, *([vae_model] if draws else [])]
            if any(argument is None for argument in needed):
                raise TypeError("of an official module give all six arguments, as the official scripts do")
            own_tokenizer = adopt_tokenizer(tokenizer, new_token_ids)
            config = adopt_config(model, vae_transform, vit_transform)
            markers = (own_tokenizer.start_of_image, own_tokenizer.end_of_image)
            self.bagel = Bagel(adopt_model(model, vae_model, config, markers), own_tokenizer)
        else:
            self.bagel = model
        self.model, self.vae_model, self.tokenizer = model, vae_model, tokenizer
        self.vae_transform, self.vit_transform, self.new_token_ids = vae_transform, vit_transform, new_token_ids
        engine = self.bagel.engine
        self._entry_points = EntryPoints(engine.model, engine.cache, engine.graphs, draws)
        self.working = self._entry_points.working  # what the methods run under

    def __call__(self, image: Image.Image | None = None, text: str | None = None, **kargs) -> dict:
        """``{"image": ..., "text": ...}`` of a picture, a text, or both; options as :meth:`interleave_inference`."""
        output = {"image": None, "text": None}
        inputs = [part for part in (image, text) if part is not None]
        if not inputs:
            print("Please provide at least one input: either an image or text.")
            return output
        for part in self.interleave_inference(inputs, **kargs):
            output["text" if isinstance(part, str) else "image"] = part
        return output

    @guarded
    def interleave_inference(
        self,
        input_lists: list[str | Image.Image],
        think=False,
        understanding_output=False,
        max_think_token_n=1000,
        do_sample=False,
        text_temperature=0.3,
        cfg_text_scale=3.0,
        cfg_img_scale=1.5,
        cfg_interval=(0.4, 1.0),
        timestep_shift=3.0,
        num_timesteps=50,
        cfg_renorm_min=0.0,
        cfg_renorm_type="global",
        image_shapes=(1024, 1024),
        enable_taylorseer=False,
    ) -> list[str | Image.Image]:
        """Texts and pictures in; out a text (``understanding_output``), or a picture, after its thought if any.

        Raises:
            ValueError: a value out of range, a part that is neither text nor picture, or ``enable_taylorseer``.
        """
        refuse_taylorseer(enable_taylorseer)
        for part in input_lists:
            if not isinstance(part, (str, Image.Image)):
                raise ValueError(f"Unsupported input type: {type(part)}; give str and PIL images")
        image = None
        if not understanding_output:
            self._entry_points.check_generates()
            if not any(isinstance(part, Image.Image) for part in input_lists):
                self.bagel.check_size(tuple(image_shapes))
            image = ImageSettings(
                cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_min, cfg_renorm_type, timestep_shift,
                num_timesteps,
            )  # fmt: skip
        text = TextSettings(max_think_token_n, do_sample, text_temperature)
        system = (THINK_BEFORE_ANSWER if understanding_output else THINK_BEFORE_IMAGE) if think else None
        # Noise first: where one generator serves both, a picture's noise is the same with and without sampled texts.
        noise = None if understanding_output else self._draw(input_lists, image_shapes)
        seed = draw_seed(self.bagel.model) if do_sample else 0
        request = Request(list(input_lists), tuple(image_shapes), seed, image, text, noise, system)
        self.bagel.check(request)
        if understanding_output:
            return ["".join(self.bagel.engine.run_answer(request))]
        [result] = self.bagel.engine.run_images([request])
        return [result.image] if result.thought is None else [result.thought, result.image]

    def _draw(self, parts, size) -> list[torch.Tensor]:
        """The draws of a request from torch's generators: posteriors as the official autoencoder's, the latent on the
        host."""
        *posteriors, latent = noise_shapes(self.bagel.model.config, parts, size)
        return [*map(self._draw_posterior, posteriors), torch.randn(latent)]

    def _draw_posterior(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A draw from the generator of the device where the official autoencoder is."""
        device = self.bagel.model.device if self.vae_model is None else next(self.vae_model.parameters()).device
        return torch.randn(shape, device=device)

    # Contexts, for scripts that arrange them themselves

    def init_gen_context(self) -> dict:
        """An empty context."""
        return {"kv_lens": [0], "ropes": [0], "past_key_values": Contexts([Context(self.bagel.engine.cache)])}

    @guarded
    def update_context_text(self, text: str, gen_context: dict) -> dict:
        """Append a text; the context is changed and returned."""
        return self._append(gen_context, [frame_text(self.bagel.tokenizer, text)])

    @guarded
    def update_context_image(self, image: Image.Image, gen_context: dict, vae=True, vit=True) -> dict:
        """Append a picture, already resized by the autoencoder's rule: as clean latents, as ViT patches, or as both."""
        if not (vae or vit):
            raise ValueError("vae and vit are both False: a picture is seen by one of them at least")
        model, contents = self.bagel.model, []
        image = to_rgb(image)
        if vae:
            self._entry_points.check_generates()
            resized = model.config.vae_transform.resize(image)
            [shape] = noise_shapes(model.config, [resized], None)[:1]
            contents.append(model.encode_latents(resized, Noise(0, [self._draw_posterior(shape)])))
        if vit:
            contents.append(model.encode_patches(model.config.vit_transform.resize(image)))
        return self._append(gen_context, contents)

    def _append(self, gen_context: dict, contents) -> dict:
        [context] = gen_context["past_key_values"].contexts
        prefill = Prefill(self.bagel.model, context.cache)
        for content in contents:
            prefill.append(context, content)
        prefill.run()
        gen_context["kv_lens"], gen_context["ropes"] = [context.length], [context.position]
        return gen_context

    @guarded
    def gen_image(
        self,
        image_shape,
        gen_context,
        cfg_text_scale=4.0,
        cfg_img_scale=1.5,
        cfg_text_precontext=None,
        cfg_img_precontext=None,
        cfg_interval=(0.4, 1.0),
        cfg_renorm_min=0.0,
        cfg_renorm_type="global",
        num_timesteps=50,
        timestep_shift=3.0,
        enable_taylorseer=False,
    ) -> Image.Image:
        """Draw a picture of (height, width) from a context, guided away from two others."""
        refuse_taylorseer(enable_taylorseer)
        self._entry_points.check_generates()
        settings = ImageSettings(
            cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_min, cfg_renorm_type, timestep_shift, num_timesteps
        )
        model, size = self.bagel.model, self.bagel.check_size(tuple(image_shape))
        [shape] = noise_shapes(model.config, [], size)
        contexts = [gen_context, cfg_text_precontext or gen_context, cfg_img_precontext or gen_context]
        branches = tuple(context["past_key_values"].contexts[0] for context in contexts)
        task = DenoisingTask(NoisedImage(*model.config.latent_grid(size)), torch.randn(shape), branches)
        [latent] = self._entry_points.denoise([task], settings, model.device)
        return self.decode_image(latent, size)

    @guarded
    def decode_image(self, latent: torch.Tensor, image_shape) -> Image.Image:
        """Latent tokens [n, features], on any device -> the picture of (height, width) that they stand for."""
        model = self.bagel.model
        latent = latent.to(model.device, torch.float32)
        content = NoisedImage(*model.config.latent_grid(image_shape))
        return model.decode_image(latent, content, self.bagel.engine.graphs)

    @guarded
    def gen_text(self, gen_context, max_length: int = 500, do_sample: bool = True, temperature: float = 1.0) -> str:
        """Write a text behind a context, which is left as it is."""
        tokenizer, [context] = self.bagel.tokenizer, gen_context["past_key_values"].contexts
        [ids] = self._entry_points.write([context], tokenizer.bos, tokenizer.eos, max_length, do_sample, temperature)
        return tokenizer.answer(ids)
