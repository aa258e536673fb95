"""The official ``InterleaveInferencer`` over this runtime: a script changes the line that imports it."""

from copy import deepcopy

import torch
from PIL import Image

from bagel_rt.compat.adopt import adopt_config, adopt_model, adopt_tokenizer
from bagel_rt.compat.entry_points import Contexts, EntryPoints, refuse_taylorseer
from bagel_rt.context import Context, Prefill
from bagel_rt.conversation import Noise, encode_latents, encode_patches, frame_text, noise_shapes
from bagel_rt.denoise import ImageTask
from bagel_rt.images import to_rgb
from bagel_rt.picture import decode_picture
from bagel_rt.pipeline import Bagel
from bagel_rt.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE
from bagel_rt.request import Request
from bagel_rt.settings import ImageSettings, TextSettings

VLM_THINK_SYSTEM_PROMPT, GEN_THINK_SYSTEM_PROMPT = THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE


class InterleaveInferencer:
    """The official class: its arguments, defaults, attributes and results.

    Whole requests run as this runtime's own: equal guidance branches once, steps as CUDA graphs. The methods on
    contexts (``init_gen_context``, ``update_context_text``, ...) are there for scripts that arrange them themselves.
    Noise is drawn from torch's generators, as officially, so ``torch.manual_seed`` decides the picture.
    """

    def __init__(
        self, model, vae_model=None, tokenizer=None, vae_transform=None, vit_transform=None, new_token_ids=None
    ):
        """
        Args:
            model: an official ``Bagel`` module, whose weights are taken over in place (see
                :func:`bagel_rt.compat.accelerate`); or a :class:`bagel_rt.Bagel`, and nothing else.
            vae_model: the official autoencoder.
            tokenizer: the Hugging Face tokenizer, with the special tokens added.
            vae_transform, vit_transform: the official ``ImageTransform`` of either.
            new_token_ids: ids of the markers, as ``add_special_tokens`` returns them.

        Raises:
            TypeError, ValueError: an object is another than the official scripts give; nothing was changed.
        """
        if not isinstance(model, Bagel):
            official = (vae_model, tokenizer, vae_transform, vit_transform, new_token_ids)
            if any(argument is None for argument in official):
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
        self._entry_points = EntryPoints(engine.model, engine.cache, engine.graphs)

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
            if not any(isinstance(part, Image.Image) for part in input_lists):
                self.bagel.check_size(tuple(image_shapes))
            image = ImageSettings(
                cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_min, cfg_renorm_type, timestep_shift,
                num_timesteps,
            )  # fmt: skip
        text = TextSettings(max_think_token_n, do_sample, text_temperature)
        system = (THINK_BEFORE_ANSWER if understanding_output else THINK_BEFORE_IMAGE) if think else None
        seed = int(torch.randint(2**62, ())) if do_sample else 0
        noise = None if understanding_output else self._draw(input_lists, image_shapes)
        request = Request(list(input_lists), tuple(image_shapes), seed, image, text, noise, system)
        self.bagel.check(request)
        if understanding_output:
            return ["".join(self.bagel.engine.run_answer(request))]
        [result] = self.bagel.engine.run_images([request])
        return [result.image] if result.thought is None else [result.thought, result.image]

    def _draw(self, parts, size) -> list[torch.Tensor]:
        """The draws of a request from torch's generators: posteriors on the device, the latent on the host."""
        *posteriors, latent = noise_shapes(self.bagel.model.config, parts, size)
        device = self.bagel.model.device
        return [*(torch.randn(shape, device=device) for shape in posteriors), torch.randn(latent)]

    # Contexts, for scripts that arrange them themselves

    def init_gen_context(self) -> dict:
        """An empty context."""
        return {"kv_lens": [0], "ropes": [0], "past_key_values": Contexts([Context(self.bagel.engine.cache)])}

    @torch.inference_mode()
    def update_context_text(self, text: str, gen_context: dict) -> dict:
        """Append a text; the context is changed and returned."""
        return self._append(gen_context, [frame_text(self.bagel.tokenizer, text)])

    @torch.inference_mode()
    def update_context_image(self, image: Image.Image, gen_context: dict, vae=True, vit=True) -> dict:
        """Append a picture, already resized by the autoencoder's rule: as clean latents, as ViT patches, or as both."""
        if not (vae or vit):
            raise ValueError("vae and vit are both False: a picture is seen by one of them at least")
        model, contents = self.bagel.model, []
        image = to_rgb(image)
        if vae:
            resized = model.config.vae_transform.resize(image)
            [shape] = noise_shapes(model.config, [resized], None)[:1]
            contents.append(encode_latents(model, resized, Noise(0, [torch.randn(shape, device=model.device)])))
        if vit:
            contents.append(encode_patches(model.config, model.config.vit_transform.resize(image)))
        return self._append(gen_context, contents)

    def _append(self, gen_context: dict, contents) -> dict:
        [context] = gen_context["past_key_values"].contexts
        prefill = Prefill(self.bagel.model, context.cache)
        for content in contents:
            prefill.append(context, content)
        prefill.run()
        gen_context["kv_lens"], gen_context["ropes"] = [context.length], [context.position]
        return gen_context

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
        settings = ImageSettings(
            cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_min, cfg_renorm_type, timestep_shift, num_timesteps
        )
        config, size = self.bagel.model.config, self.bagel.check_size(tuple(image_shape))
        [shape] = noise_shapes(config, [], size)
        contexts = [gen_context, cfg_text_precontext or gen_context, cfg_img_precontext or gen_context]
        branches = [context["past_key_values"].contexts[0] for context in contexts]
        rows, columns = (side // config.latent_stride for side in size)
        [latent] = self._entry_points.denoise([ImageTask(rows, columns, torch.randn(shape), *branches, settings)])
        return self.decode_image(latent, size)

    def decode_image(self, latent: torch.Tensor, image_shape) -> Image.Image:
        """Latent tokens [n, features] -> the picture of (height, width) that they stand for."""
        rows, columns = (side // self.bagel.model.config.latent_stride for side in image_shape)
        return decode_picture(self.bagel.model, latent, rows, columns, self.bagel.engine.graphs)

    def gen_text(self, gen_context, max_length: int = 500, do_sample: bool = True, temperature: float = 1.0) -> str:
        """Write a text behind a context, which is left as it is."""
        tokenizer, [context] = self.bagel.tokenizer, deepcopy(gen_context["past_key_values"]).contexts
        written = self._entry_points.generate_text(
            Contexts([context]), torch.tensor([tokenizer.bos]), torch.tensor([context.position]),
            torch.tensor([context.length]), max_length, do_sample, temperature, tokenizer.eos,
        )  # fmt: skip
        return tokenizer.answer(written[:, 0].tolist())
