"""The official ``InterleaveInferencer`` on this runtime: a script only changes its import."""

import torch
from PIL import Image

from bagel_rt.compat.arguments import ContextBatch, reject_taylorseer
from bagel_rt.compat.convert import convert_config, convert_tokenizer, has_visual_gen
from bagel_rt.compat.entry_points import EntryPoints, draw_sampling_seed
from bagel_rt.compat.exclusive import entry_point
from bagel_rt.compat.weight_sharing import build_shared_model
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
    """The official class, with its arguments, defaults, attributes and results.

    Requests run through this runtime's engine: equal guidance branches are computed once, and steps replay CUDA graphs.
    Scripts that build contexts themselves can use ``init_gen_context``, ``update_context_text`` and so on.
    Noise comes from torch's global generators, as in the official code, so ``torch.manual_seed`` determines the image.
    Thread-safe: calls run one at a time.
    """

    def __init__(
        self, model, vae_model=None, tokenizer=None, vae_transform=None, vit_transform=None, new_token_ids=None
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
            required = {
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
            own_tokenizer = convert_tokenizer(tokenizer, new_token_ids)
            config = convert_config(model, vae_transform, vit_transform)
            markers = (own_tokenizer.start_of_image, own_tokenizer.end_of_image)
            self.bagel = Bagel(build_shared_model(model, vae_model, config, markers), own_tokenizer)
        self.model, self.vae_model, self.tokenizer = model, vae_model, tokenizer
        self.vae_transform, self.vit_transform, self.new_token_ids = vae_transform, vit_transform, new_token_ids
        engine = self.bagel.engine
        self._entry_points = EntryPoints(engine.model, engine.cache, engine.graphs, visual_gen)
        self.inference_scope = self._entry_points.inference_scope  # for @entry_point

    def __call__(self, image: Image.Image | None = None, text: str | None = None, **kargs) -> dict:
        """Run a request of an image, a text, or both; keyword arguments as for :meth:`interleave_inference`.

        Returns:
            ``{"image": ..., "text": ...}``, None for what was not generated.
        """
        output = {"image": None, "text": None}
        inputs = [part for part in (image, text) if part is not None]
        if not inputs:
            print("Please provide at least one input: either an image or text.")
            return output
        for part in self.interleave_inference(inputs, **kargs):
            output["text" if isinstance(part, str) else "image"] = part
        return output

    @entry_point
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
        """Run a request of texts and images.

        Returns:
            [text] with ``understanding_output``; else [image], or [thought, image] with ``think``.

        Raises:
            ValueError: a value is out of range, a part is neither text nor image, or ``enable_taylorseer`` is set.
        """
        reject_taylorseer(enable_taylorseer)
        for part in input_lists:
            if not isinstance(part, (str, Image.Image)):
                raise ValueError(f"input_lists must hold str and PIL images only, got {type(part).__name__}.")
        image = None
        if not understanding_output:
            self._entry_points.check_visual_gen()
            if not any(isinstance(part, Image.Image) for part in input_lists):
                self.bagel.check_size(tuple(image_shapes))
            image = ImageSettings(
                cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_min, cfg_renorm_type, timestep_shift,
                num_timesteps,
            )  # fmt: skip
        text = TextSettings(max_think_token_n, do_sample, text_temperature)
        system = (THINK_BEFORE_ANSWER if understanding_output else THINK_BEFORE_IMAGE) if think else None
        # Noise before the sampling seed: on a CPU one generator serves both, and sampling must not change the noise.
        noise = None if understanding_output else self._draw_noise(input_lists, image_shapes)
        seed = draw_sampling_seed(self.bagel.model) if do_sample else 0
        request = Request(list(input_lists), tuple(image_shapes), seed, image, text, noise, system)
        self.bagel.check_request(request)
        if understanding_output:
            return ["".join(self.bagel.engine.run_answer(request))]
        [result] = self.bagel.engine.run_images([request])
        return [result.image] if result.thought is None else [result.thought, result.image]

    def _draw_noise(self, parts, size) -> list[torch.Tensor]:
        """The noise of a request from torch's generators, in the official order: posterior noise for each encoded
        image, then the initial latent, which the official code draws on the CPU."""
        *posteriors, latent = noise_shapes(self.bagel.model.config, parts, size)
        return [*map(self._draw_posterior_noise, posteriors), torch.randn(latent)]

    def _draw_posterior_noise(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Draw from the generator of the official autoencoder's device, as the official code does."""
        device = self.bagel.model.device if self.vae_model is None else next(self.vae_model.parameters()).device
        return torch.randn(shape, device=device)

    # For scripts that build contexts themselves

    def init_gen_context(self) -> dict:
        """An empty context."""
        return {"kv_lens": [0], "ropes": [0], "past_key_values": ContextBatch([Context(self.bagel.engine.cache)])}

    @entry_point
    def update_context_text(self, text: str, gen_context: dict) -> dict:
        """Append a text to ``gen_context``, in place, and return it."""
        return self._append(gen_context, [frame_text(self.bagel.tokenizer, text)])

    @entry_point
    def update_context_image(self, image: Image.Image, gen_context: dict, vae=True, vit=True) -> dict:
        """Append an image to ``gen_context``, in place, and return it.

        Args:
            image: already resized by the autoencoder's rule.
            gen_context: the context to extend.
            vae, vit: whether to append its clean latents and its ViT patches; at least one must be True.
        """
        if not (vae or vit):
            raise ValueError("vae or vit must be True, got False for both.")
        model, contents = self.bagel.model, []
        image = to_rgb(image)
        if vae:
            self._entry_points.check_visual_gen()
            resized = model.config.vae_transform.resize(image)
            [shape] = noise_shapes(model.config, [resized], None)[:1]
            contents.append(model.encode_latents(resized, Noise(0, [self._draw_posterior_noise(shape)])))
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

    @entry_point
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
        """Generate an image of (height, width) pixels from a context.

        ``cfg_text_precontext`` and ``cfg_img_precontext`` are the contexts of the two guidance branches; None disables
        the guidance of a branch, because its context then equals ``gen_context``.
        """
        reject_taylorseer(enable_taylorseer)
        self._entry_points.check_visual_gen()
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

    @entry_point
    def decode_image(self, latent: torch.Tensor, image_shape) -> Image.Image:
        """Decode latent tokens [n, features], on any device, to an image of (height, width) pixels."""
        model = self.bagel.model
        latent = latent.to(model.device, torch.float32)
        content = NoisedImage(*model.config.latent_grid(image_shape))
        return model.decode_image(latent, content, self.bagel.engine.graphs)

    @entry_point
    def gen_text(self, gen_context, max_length: int = 500, do_sample: bool = True, temperature: float = 1.0) -> str:
        """Generate a text after a context, which does not change."""
        tokenizer, [context] = self.bagel.tokenizer, gen_context["past_key_values"].contexts
        [ids] = self._entry_points.generate_ids(
            [context], tokenizer.bos, tokenizer.eos, max_length, do_sample, temperature
        )
        return tokenizer.answer(ids)
