"""Cases of the runtime: recorded requests run step by step through contexts, decoder and denoiser."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from PIL import Image

from bagel_rt.conformance.compare import Comparison, Meta, Tensors, compare_tensors, compare_values
from bagel_rt.kernels import guided_velocity
from bagel_rt.models.bagel.contents import Content, NoisedImage, VAEImage, ViTImage
from bagel_rt.models.bagel.contexts import Noise, frame_text
from bagel_rt.models.bagel.embed import position_ids, unpatchify
from bagel_rt.models.bagel.guidance import BRANCHES, FlowGuidance
from bagel_rt.models.bagel.images import image_to_tensor, official_rgb
from bagel_rt.models.bagel.settings import ImageSettings
from bagel_rt.models.bagel.transformer import Transformer
from bagel_rt.models.bagel.vision import vision_tower
from bagel_rt.pipeline import Bagel
from bagel_rt.runtime.batch import DecodeBatch, ForwardBatch
from bagel_rt.runtime.context import Context, Prefill
from bagel_rt.runtime.decode import generate_tokens
from bagel_rt.runtime.denoise import Denoiser, DenoisingTask
from bagel_rt.runtime.slots import KVCache


class _RecordingTransformer(Transformer):
    """A transformer that records its input, and each layer's attention output (before the residual) and output."""

    def __init__(self, transformer: Transformer):
        super().__init__(transformer.config, transformer.layers, transformer.norm)
        self.input = torch.empty(0)
        self.layer_outputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(
        self, hidden: torch.Tensor, batch: ForwardBatch | DecodeBatch, cache: KVCache, *_: object
    ) -> torch.Tensor:
        if isinstance(batch, DecodeBatch):
            raise TypeError("only packed forwards are recorded, got a decoding step")
        self.input, self.layer_outputs = hidden.clone(), []
        for index, layer in enumerate(self.layers):
            attended = self.attend(layer, hidden, batch, *cache.layer(index))
            self.layer_outputs.append((attended - hidden, self.feed_forward(layer, attended, batch.G)))
            hidden = self.layer_outputs[-1][1]
        return hidden


class CaseRunner:
    """Runs one recorded case, context update by context update, and compares every recorded tensor."""

    def __init__(self, bagel: Bagel, pack: Path, case: Path, meta: Meta, golden: Tensors):
        self.bagel, self.model, self.pack, self.case = bagel, bagel.model, pack, case
        self.meta, self.golden = meta, golden
        self.comparisons: list[Comparison] = []
        self.contexts: dict[str, list[Context]] = {}  # "gen" and "no_img" -> one context per sample
        self.snapshots: dict[str, list[list[Context]]] = {"gen": [], "no_img": []}  # the contexts after every update
        self._image_files = self._list_image_files()
        self._resized = Image.new("RGB", (1, 1))  # the current image, resized for the autoencoder

    def run(self) -> list[Comparison]:
        """Run the recorded updates and generations."""
        for update in self.meta["updates"]:
            self._run_update(update)
        for text in self.meta.get("text_generations", ()):
            self._run_text_generation(text)
        for image in self.meta.get("image_generations", ()):
            self._run_image_generation(image)
        return self.comparisons

    def _list_image_files(self) -> Iterator[Path]:
        """Image files in the order in which they enter a context: inputs, then generated images that are fed back."""
        inputs = self.meta["inputs"]
        names = inputs.get("interleave_inputs", [inputs["image"]] if "image" in inputs else [])
        yield from (self.pack / name for name in names if os.path.isfile(self.pack / name))
        yield from (self.case / output["image"] for output in self.meta["outputs"] if "image" in output)

    def _compare_tensor(self, name: str, actual: torch.Tensor, rows: list[int] | None = None) -> None:
        """Compare with the recording, if there is one; ``rows`` are the ones that it holds, None for all."""
        if name in self.golden:
            self.comparisons.append(compare_tensors(name, actual if rows is None else actual[rows], self.golden[name]))

    def _compare_value(self, name: str, actual: object, recorded: object) -> None:
        self.comparisons.append(compare_values(name, actual, recorded))

    def _run_update(self, update: Meta) -> None:
        """Extend a context; compare token ids, lengths, positions, hidden states, keys and values."""
        name = f"u{update['index']:02d}_{update['kind']}"
        count = len(update["kv_len_before"])
        contexts = self.contexts.setdefault(update["context"], [Context(self.bagel.cache) for _ in range(count)])
        before = [(context.length, context.position) for context in contexts]
        self._compare_value(
            f"{name}.before", before, list(zip(update["kv_len_before"], update["rope_before"], strict=True))
        )
        contents = self._make_contents(update, name)
        prefill = Prefill(self.model, self.bagel.cache)
        for context, content in zip(contexts, contents, strict=True):
            prefill.append(context, content)
        transformer = self.model.transformer
        self.model.transformer = recording = _RecordingTransformer(transformer)
        try:
            computed = prefill.run()
        finally:
            self.model.transformer = transformer
        assert computed is not None  # an update has at least one row
        hidden, plan = computed
        after = [(context.length, context.position) for context in contexts]
        self._compare_value(
            f"{name}.after", after, list(zip(update["kv_len_after"], update["rope_after"], strict=True))
        )
        self.snapshots[update["context"]].append([context.clone() for context in contexts])

        # The pack stores equal updates once: a repeated one refers to the tensors of the first.
        name = update.get("bitwise_same_as", name)
        rows = self.meta["updates"][int(name[1:3])].get("rows_stored")
        order = torch.from_numpy(plan.order).to(self.model.device)

        def unpack(packed: torch.Tensor) -> torch.Tensor:
            """Rows in expert-major order -> rows in sequence order, as recorded."""
            return torch.empty_like(packed).index_copy_(0, order, packed)

        self._compare_tensor(f"{name}.input", unpack(recording.input), rows)
        self._compare_tensor(f"{name}.hidden", unpack(self.model.transformer.final_norm(hidden, plan.G)), rows)
        for index, (attention_output, output) in enumerate(recording.layer_outputs):
            self._compare_tensor(f"{name}.layer{index:02d}.attn_out", unpack(attention_output), rows)
            self._compare_tensor(f"{name}.layer{index:02d}.out", unpack(output), rows)
        slots = torch.cat(
            [
                torch.arange(length, context.length) + context.key_start
                for context, (length, _) in zip(contexts, before, strict=True)
            ]
        )
        for letter, buffer in (("k", self.bagel.cache.k), ("v", self.bagel.cache.v)):
            appended = buffer[:, slots]
            self._compare_tensor(f"{name}.{letter}", appended)
            self._compare_tensor(f"{name}.{letter}_last", appended[-1], rows)
        if update is self.meta["updates"][-1] and update["kind"] == "text":
            self._compare_tensor("lm_head_logits_last_update", unpack(self.model.logits(hidden)))

    def _make_contents(self, update: Meta, name: str) -> Sequence[Content]:
        """The contents of an update, one per sample, made as for a request."""
        config, tokenizer = self.model.config, self.bagel.tokenizer
        if update["kind"] == "text":
            texts = update["text"] if isinstance(update["text"], list) else [update["text"]]
            contents = [frame_text(tokenizer, text) for text in texts]
            self._compare_value(
                f"{name}.token_ids", [token for content in contents for token in content.ids], update["token_ids"]
            )
            return contents
        self._compare_value(
            f"{name}.markers", [tokenizer.start_of_image, tokenizer.end_of_image], update["token_ids_special"]
        )
        # An image enters as latents, patches or both in this order: patches after latents are of the same image.
        previous = self.meta["updates"][update["index"] - 1]["kind"] if update["index"] else None
        if update["kind"] == "vae" or previous != "vae":
            self._resized = config.vae_transform.resize(official_rgb(Image.open(next(self._image_files))))
        if update["kind"] == "vae":
            latents = self._encode_latents(name)
            self._compare_value(f"{name}.grid", [[latents.grid_h, latents.grid_w]], update["latent_grid_hw"])
            return [latents]
        patches = self._encode_patches(name)
        self._compare_value(f"{name}.patch count", patches.grid_h * patches.grid_w, update["num_patches"])
        return [patches]

    def _encode_latents(self, name: str) -> VAEImage:
        """The clean latents of the current image, with the recorded sampling noise."""
        config, pixels = self.model.config, image_to_tensor(self._resized)[None]
        content = self.model.encode_latents(self._resized, Noise(0, [self.golden[f"{name}.eps"]]))
        mean, logvar = self.model.vae.moments(pixels.to(self.model.device))
        latent = unpatchify(content.latents, content.grid_h, content.grid_w, config.latent_patch_size)[None]
        ids = position_ids(content.grid_h, content.grid_w, config.max_latent_size, config.interpolate_pos)
        tensors = {"pixels": pixels, "mean": mean, "logvar": logvar, "latent": latent, "pos_ids": ids}
        for part, tensor in tensors.items():
            self._compare_tensor(f"{name}.{part}", tensor)
        return content

    def _encode_patches(self, name: str) -> ViTImage:
        """The ViT patches of the current image."""
        config = self.model.config
        content = self.model.encode_patches(config.vit_transform.resize(self._resized))
        ids = position_ids(content.grid_h, content.grid_w, config.vit.max_patches_per_side, config.interpolate_pos)
        patches = content.patches.to(self.model.device, self.model.dtype)
        output = vision_tower(self.model.weights.vit, config.vit, patches, ids.to(self.model.device), [len(ids)])
        for part, tensor in {"patches": content.patches, "pos_ids": ids, "vit_out": output}.items():
            self._compare_tensor(f"{name}.{part}", tensor)
        return content

    def _contexts_at(self, name: str, lengths: list[int]) -> list[Context]:
        """The contexts when they had these lengths; for lengths of zero, empty contexts."""
        if not any(lengths):
            return [Context(self.bagel.cache) for _ in lengths]
        return next(
            contexts
            for contexts in reversed(self.snapshots[name])
            if [context.length for context in contexts] == lengths
        )

    def _run_text_generation(self, text: Meta) -> None:
        """Decode greedily; compare token ids, and the logits of the first and the last forward."""
        name = f"g{text['index']:02d}"
        [context] = self._contexts_at("gen", text["start_kv_len"])
        self._compare_value(f"{name}.start_rope", [context.position], text["start_rope"])
        model, tokenizer = self.model, self.bagel.tokenizer
        logits: list[torch.Tensor] = []

        def record_logits(hidden: torch.Tensor) -> torch.Tensor:
            logits.append(model.logits(hidden))
            return logits[-1]

        mode = replace(model.text, logits=record_logits)
        tokens = generate_tokens(model, mode, [context], tokenizer.bos, tokenizer.eos, text["max_length"])
        ids = [token for _, token in tokens]
        self._compare_value(f"{name}.ids", [tokenizer.bos, *ids], text["returned_ids_including_start"])
        self._compare_value(f"{name}.argmax", [int(row.argmax()) for row in logits], text["argmax_each_step"])
        self._compare_value(f"{name}.forward passes", len(logits), text["forward_passes"])
        self._compare_tensor(f"{name}.first_logits", logits[0][0])
        self._compare_tensor(f"{name}.last_logits", logits[-1][0])

    def _run_image_generation(self, image: Meta) -> None:
        """Denoise; compare the schedule, every branch's velocity at every step, and the image."""
        name, config = f"i{image['index']:02d}", self.model.config
        contexts = self._guidance_contexts(image, name)
        settings = ImageSettings(**{field.name: image[field.name] for field in fields(ImageSettings)})
        grids = [config.latent_grid(size) for size in image["image_sizes_hw"]]
        noises = self.golden[f"{name}.init_noise"].split([grid_h * grid_w for grid_h, grid_w in grids])
        tasks = [
            DenoisingTask(NoisedImage(*grid), noise, branches)
            for grid, noise, branches in zip(grids, noises, zip(*contexts, strict=True), strict=True)
        ]
        guidance = self.model.guidance(tasks, [settings] * len(tasks))
        denoiser = Denoiser(self.model, self.bagel.cache, tasks, guidance)
        self._compare_tensor(f"{name}.timesteps", guidance.timesteps[:, 0])
        self._compare_tensor(f"{name}.dts", guidance.dts[:, 0])
        guided = [scales[0] > 1 for scales in image["effective_scales_per_step"]]
        self._compare_value(f"{name}.guided steps", guidance.guided, guided)
        for index in range(len(denoiser)):
            self._run_step(denoiser, guidance, index, name)
        self._compare_tensor(f"{name}.final_latent", denoiser.state)
        if len(tasks) == 1:
            [(grid_h, grid_w)] = grids
            latent = unpatchify(denoiser.state, grid_h, grid_w, config.latent_patch_size)[None]
            self._compare_tensor(f"{name}.decoder_input", latent)
            self._compare_tensor(f"{name}.image_float", self.model.vae.decode(latent))
            self._compare_tensor(
                f"{name}.pos_ids", position_ids(grid_h, grid_w, config.max_latent_size, config.interpolate_pos)
            )

    def _guidance_contexts(self, image: Meta, name: str) -> list[list[Context]]:
        """The cond, no_text and no_img contexts of an image generation, for each branch one per sample."""
        recorded = image["contexts"]
        cond = self._contexts_at("gen", recorded["gen"]["kv_len"])
        no_text = self._contexts_at("gen", recorded["no_text"]["kv_len"]) if recorded["no_text"] else cond
        no_img = self._contexts_at("no_img", recorded["no_img"]["kv_len"]) if recorded["no_img"] else cond
        for branch, contexts in (("gen", cond), ("no_text", no_text), ("no_img", no_img)):
            if recorded[branch]:
                positions, ropes = [context.position for context in contexts], recorded[branch]["rope"]
                # The recorded batch has a single position for contexts that are all empty.
                self._compare_value(f"{name}.{branch} rope", positions, ropes * (len(positions) // len(ropes)))
        return [cond, no_text, no_img]

    def _run_step(self, denoiser: Denoiser, guidance: FlowGuidance, index: int, name: str) -> None:
        """Run one denoising step; compare the velocity of every branch and the guided velocity."""
        name, settings = f"{name}.step{index:03d}", guidance.settings[0]
        self._compare_tensor(f"{name}.x_t", denoiser.state)
        outputs = denoiser.branch_outputs(index)  # for each image, one per branch
        for number, branch in enumerate(BRANCHES):
            if f"{name}.v_{branch}" in self.golden:
                velocities = [output for of_image in outputs if (output := of_image[number]) is not None]
                if not velocities:  # the official code evaluates this branch and ignores the result
                    contexts = [task.branches[number] for task in denoiser.tasks]
                    velocities = denoiser.outputs_of(contexts, index)
                self._compare_tensor(f"{name}.v_{branch}", torch.cat(velocities))
        scales = (settings.cfg_text_scale, settings.cfg_img_scale) if guidance.guided[index] else (1.0, 1.0)

        def guide(velocities: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
            cond, no_text, no_img = velocities
            assert cond is not None
            return guided_velocity(cond, no_text, no_img, *scales, settings.cfg_renorm_type, settings.cfg_renorm_min)

        if len(denoiser.tasks) > 1 and settings.cfg_renorm_type == "global":
            # The official norm is taken over the batch, ours over each image. Take this step as the official code does.
            batched = [[v for v in of_branch if v is not None] for of_branch in zip(*outputs, strict=True)]
            v = guide(tuple(torch.cat(velocities) if velocities else None for velocities in batched))
            self._compare_tensor(f"{name}.v", v)
            denoiser.state.sub_(v * guidance.dts[index, 0])
            return
        if f"{name}.v" in self.golden:
            self._compare_tensor(f"{name}.v", torch.cat([guide(of_image) for of_image in outputs]))
        denoiser.step(index)
