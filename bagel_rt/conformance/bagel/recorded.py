"""Conformance of the runtime: recorded requests replayed through the contexts, the decoder and the denoiser."""

import os
from dataclasses import fields
from pathlib import Path

import torch
from PIL import Image

from bagel_rt.conformance.compare import Comparison, agree, compare
from bagel_rt.kernels import guided_velocity
from bagel_rt.models.bagel.contents import NoisedImage
from bagel_rt.models.bagel.contexts import Noise, frame_text
from bagel_rt.models.bagel.embed import position_ids, unpatchify
from bagel_rt.models.bagel.guidance import BRANCHES
from bagel_rt.models.bagel.images import image_to_tensor, to_rgb
from bagel_rt.models.bagel.settings import ImageSettings
from bagel_rt.models.bagel.transformer import Transformer
from bagel_rt.models.bagel.vision import vision_tower
from bagel_rt.runtime.context import Context, Prefill
from bagel_rt.runtime.decode import generate_tokens
from bagel_rt.runtime.denoise import Denoiser, DenoisingTask


class _Recorder(Transformer):
    """The same layers, keeping what enters, each layer's attention output and each layer's output."""

    def __init__(self, observed: Transformer):
        super().__init__(observed.config, observed.layers, observed.norm)
        self.entering, self.layer_states = None, []

    def forward(self, hidden, batch, cache):
        self.entering, self.layer_states = hidden.clone(), []
        for index, layer in enumerate(self.layers):
            attended = self.attend(layer, hidden, batch, *cache.layer(index))
            self.layer_states.append((attended - hidden, self.feed_forward(layer, attended, batch.G)))
            hidden = self.layer_states[-1][1]
        return hidden


class Replay:
    """One recorded case, replayed update by update; every comparison is appended to ``results``."""

    def __init__(self, bagel, pack: Path, case: Path, meta: dict, golden: dict):
        self.bagel, self.model, self.pack, self.case = bagel, bagel.model, pack, case
        self.meta, self.golden = meta, golden
        self.results: list[Comparison] = []
        self.contexts: dict[str, list[Context]] = {}  # "gen" and "no_img": one context per sample of a batch
        self.snapshots: dict[str, list[list[Context]]] = {"gen": [], "no_img": []}  # after every update
        self._images = iter(self._pictures())

    def run(self) -> list[Comparison]:
        """Replay everything that the case recorded."""
        for update in self.meta["updates"]:
            self._update(update)
        for text in self.meta.get("text_generations", ()):
            self._text(text)
        for image in self.meta.get("image_generations", ()):
            self._image(image)
        return self.results

    def _pictures(self):
        """The pictures in the order in which they enter a context: the inputs, then the generated ones fed back."""
        inputs = self.meta["inputs"]
        named = inputs.get("interleave_inputs", [inputs["image"]] if "image" in inputs else [])
        yield from (self.pack / name for name in named if os.path.isfile(self.pack / name))
        yield from (self.case / output["image"] for output in self.meta["outputs"] if "image" in output)

    def _compare(self, name: str, got: torch.Tensor, rows=None) -> None:
        if name in self.golden:
            self.results.append(compare(name, got if rows is None else got[rows], self.golden[name]))

    def _agree(self, name: str, got, want) -> None:
        self.results.append(agree(name, got, want))

    def _update(self, update: dict) -> None:
        """One context update: its tokens, its bookkeeping, its hidden states, keys and values."""
        name = f"u{update['index']:02d}_{update['kind']}"
        count = len(update["kv_len_before"])
        contexts = self.contexts.setdefault(update["context"], [Context(self.bagel.cache) for _ in range(count)])
        before = [(context.length, context.position) for context in contexts]
        self._agree(f"{name}.before", before, list(zip(update["kv_len_before"], update["rope_before"], strict=True)))
        contents = self._contents(update, name)
        recorder = _Recorder(self.model.transformer)
        prefill = Prefill(self.model, self.bagel.cache)
        for context, content in zip(contexts, contents, strict=True):
            prefill.append(context, content)
        plain, self.model.transformer = self.model.transformer, recorder
        try:
            hidden, plan = prefill.run()
        finally:
            self.model.transformer = plain
        after = [(context.length, context.position) for context in contexts]
        self._agree(f"{name}.after", after, list(zip(update["kv_len_after"], update["rope_after"], strict=True)))
        self.snapshots[update["context"]].append([context.clone() for context in contexts])

        # The tensors of an update that equals an earlier one are recorded under that one's name.
        name = update.get("bitwise_same_as", name)
        rows = self.meta["updates"][int(name[1:3])].get("rows_stored")
        order = torch.from_numpy(plan.order).to(self.model.device)

        def in_sequence(packed):
            return torch.empty_like(packed).index_copy_(0, order, packed)

        self._compare(f"{name}.input", in_sequence(recorder.entering), rows)
        self._compare(f"{name}.hidden", in_sequence(self.model.transformer.final_norm(hidden, plan.G)), rows)
        for index, (attended, out) in enumerate(recorder.layer_states):
            self._compare(f"{name}.layer{index:02d}.attn_out", in_sequence(attended), rows)
            self._compare(f"{name}.layer{index:02d}.out", in_sequence(out), rows)
        slots = torch.cat([torch.arange(b[0], c.length) + c.key_start for c, b in zip(contexts, before, strict=True)])
        for letter, buffer in (("k", self.bagel.cache.k), ("v", self.bagel.cache.v)):
            appended = buffer[:, slots]
            self._compare(f"{name}.{letter}", appended)
            self._compare(f"{name}.{letter}_last", appended[-1], rows)
        if update is self.meta["updates"][-1] and update["kind"] == "text":
            self._compare("lm_head_logits_last_update", in_sequence(self.model.logits(hidden)))

    def _contents(self, update: dict, name: str) -> list:
        """The contents of an update, one per sample, made as a request makes them."""
        config, tokenizer = self.model.config, self.bagel.tokenizer
        if update["kind"] == "text":
            texts = update["text"] if isinstance(update["text"], list) else [update["text"]]
            contents = [frame_text(tokenizer, text) for text in texts]
            self._agree(f"{name}.token_ids", [i for content in contents for i in content.ids], update["token_ids"])
            return contents
        self._agree(f"{name}.markers", [tokenizer.start_of_image, tokenizer.end_of_image], update["token_ids_special"])
        earlier = self.meta["updates"][update["index"] - 1]["kind"] if update["index"] else None
        if update["kind"] == "vae" or earlier != "vae":
            self._resized = config.vae_transform.resize(to_rgb(Image.open(next(self._images))))
        content = self._latents(name) if update["kind"] == "vae" else self._patches(name)
        if update["kind"] == "vae":
            self._agree(f"{name}.grid", [[content.grid_h, content.grid_w]], update["latent_grid_hw"])
        else:
            self._agree(f"{name}.patch count", content.grid_h * content.grid_w, update["num_patches"])
        return [content]

    def _latents(self, name: str):
        """The clean latents of the current picture, with the recorded sampling noise."""
        config, pixels = self.model.config, image_to_tensor(self._resized)[None]
        content = self.model.encode_latents(self._resized, Noise(0, [self.golden[f"{name}.eps"]]))
        mean, logvar = self.model.vae.moments(pixels.to(self.model.device))
        latent = unpatchify(content.latents, content.grid_h, content.grid_w, config.latent_patch_size)[None]
        ids = position_ids(content.grid_h, content.grid_w, config.max_latent_size, config.interpolate_pos)
        found = {"pixels": pixels, "mean": mean, "logvar": logvar, "latent": latent, "pos_ids": ids}
        for part, tensor in found.items():
            self._compare(f"{name}.{part}", tensor)
        return content

    def _patches(self, name: str):
        """The ViT patches of the current picture."""
        config = self.model.config
        content = self.model.encode_patches(config.vit_transform.resize(self._resized))
        ids = position_ids(content.grid_h, content.grid_w, config.vit.max_patches_per_side, config.interpolate_pos)
        patches = content.patches.to(self.model.device, self.model.dtype)
        out = vision_tower(self.model.weights.vit, config.vit, patches, ids.to(self.model.device), [len(ids)])
        for part, tensor in {"patches": content.patches, "pos_ids": ids, "vit_out": out}.items():
            self._compare(f"{name}.{part}", tensor)
        return content

    def _snapshot(self, name: str, lengths: list[int]) -> list[Context]:
        """The contexts as they were when they had these lengths; one empty one per sample for zeros."""
        if not any(lengths):
            return [Context(self.bagel.cache) for _ in self.snapshots["gen"][-1]]
        return next(s for s in reversed(self.snapshots[name]) if [context.length for context in s] == lengths)

    def _text(self, text: dict) -> None:
        """One greedy decoding: ids, and the logits of its first and last forward."""
        name = f"g{text['index']:02d}"
        [context] = self._snapshot("gen", text["start_kv_len"])
        self._agree(f"{name}.start_rope", [context.position], text["start_rope"])
        model, tokenizer, logits = self.model, self.bagel.tokenizer, []
        plain = model.logits
        model.logits = lambda hidden: logits.append(plain(hidden)) or logits[-1]
        try:
            tokens = generate_tokens(model, model.text, [context], tokenizer.bos, tokenizer.eos, text["max_length"])
            ids = [token for _, token in tokens]
        finally:
            del model.logits
        self._agree(f"{name}.ids", [tokenizer.bos, *ids], text["returned_ids_including_start"])
        self._agree(f"{name}.argmax", [int(row.argmax()) for row in logits], text["argmax_each_step"])
        self._agree(f"{name}.forward passes", len(logits), text["forward_passes"])
        self._compare(f"{name}.first_logits", logits[0][0])
        self._compare(f"{name}.last_logits", logits[-1][0])

    def _image(self, image: dict) -> None:
        """One image generation: schedule, every branch's velocity at every step, the picture."""
        name, config = f"i{image['index']:02d}", self.model.config
        contexts = self._guidance_contexts(image, name)
        settings = ImageSettings(**{field.name: image[field.name] for field in fields(ImageSettings)})
        grids = [config.latent_grid(size) for size in image["image_sizes_hw"]]
        noises = self.golden[f"{name}.init_noise"].split([rows * columns for rows, columns in grids])
        tasks = [
            DenoisingTask(NoisedImage(*grid), noise, branches)
            for grid, noise, branches in zip(grids, noises, zip(*contexts, strict=True), strict=True)
        ]
        guidance = self.model.guidance(tasks, [settings] * len(tasks))
        denoiser = Denoiser(self.model, self.bagel.cache, tasks, guidance)
        self._compare(f"{name}.timesteps", guidance.timesteps[:, 0])
        self._compare(f"{name}.dts", guidance.dts[:, 0])
        guided = [scales[0] > 1 for scales in image["effective_scales_per_step"]]
        self._agree(f"{name}.guided steps", guidance.guided, guided)
        for index in range(len(denoiser)):
            self._step(denoiser, index, name)
        self._compare(f"{name}.final_latent", denoiser.state)
        if len(tasks) == 1:
            [(rows, columns)] = grids
            latent = unpatchify(denoiser.state, rows, columns, config.latent_patch_size)[None]
            self._compare(f"{name}.decoder_input", latent)
            self._compare(f"{name}.image_float", self.model.vae.decode(latent))
            self._compare(
                f"{name}.pos_ids", position_ids(rows, columns, config.max_latent_size, config.interpolate_pos)
            )

    def _guidance_contexts(self, image: dict, name: str) -> list[list[Context]]:
        """(cond, no_text, no_img) contexts of an image generation, one of each per sample."""
        recorded = image["contexts"]
        cond = self._snapshot("gen", recorded["gen"]["kv_len"])
        no_text = self._snapshot("gen", recorded["no_text"]["kv_len"]) if recorded["no_text"] else cond
        no_img = self._snapshot("no_img", recorded["no_img"]["kv_len"]) if recorded["no_img"] else cond
        for kind, contexts in (("gen", cond), ("no_text", no_text), ("no_img", no_img)):
            if recorded[kind]:
                positions, ropes = [context.position for context in contexts], recorded[kind]["rope"]
                # the batch script gives one rope for contexts that are all empty
                self._agree(f"{name}.{kind} rope", positions, ropes * (len(positions) // len(ropes)))
        return [cond, no_text, no_img]

    def _step(self, denoiser: Denoiser, index: int, name: str) -> None:
        """One denoising step: branch velocities, guided velocity; leaves the denoiser at the next timestep."""
        name, guidance = f"{name}.step{index:03d}", denoiser.guidance
        settings = guidance.settings[0]
        self._compare(f"{name}.x_t", denoiser.state)
        branches = list(zip(*denoiser.branch_outputs(index), strict=True))
        for kind, velocities in zip(BRANCHES, branches, strict=True):
            if f"{name}.v_{kind}" in self.golden:
                if velocities[0] is None:  # the official code evaluates this branch and drops the result
                    number = BRANCHES.index(kind)
                    contexts = [task.branches[number] for task in denoiser.tasks]
                    velocities = denoiser.outputs_of(contexts, index)
                self._compare(f"{name}.v_{kind}", torch.cat(velocities))
        scales = (settings.cfg_text_scale, settings.cfg_img_scale) if guidance.guided[index] else (1.0, 1.0)
        renorm = (settings.cfg_renorm_type, settings.cfg_renorm_min)
        whole = [None if parts[0] is None else torch.cat(parts) for parts in branches]
        if len(denoiser.tasks) > 1 and settings.cfg_renorm_type == "global":
            # The official norm spans the whole batch; ours each image. Follow the official one here.
            v = guided_velocity(*whole, *scales, *renorm)
            self._compare(f"{name}.v", v)
            denoiser.state.sub_(v * guidance.dts[index, 0])
            return
        if f"{name}.v" in self.golden:
            parts = [guided_velocity(*velocities, *scales, *renorm) for velocities in zip(*branches, strict=True)]
            self._compare(f"{name}.v", torch.cat(parts))
        denoiser.step(index)
