"""Stand-ins for the objects of the official repository, and recorded requests to run through them.

The modules have the official attributes and parameter names but no forward; the tokenizers and transforms are minimal.
:class:`OfficialScript` packs the arguments of the entry points as the official code does.
"""

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tokenizers
import torch
from conftest import PACK
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from bagel_rt.compat import InterleaveInferencer
from bagel_rt.compat.arguments import extract_answer
from bagel_rt.compat.convert import VISUAL_GEN_MODULES
from bagel_rt.conformance.bagel.end_to_end import load_inputs, recorded_noise
from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.embed import patchify, position_ids
from bagel_rt.models.bagel.images import ResizeRule, image_to_tensor, to_rgb
from bagel_rt.models.bagel.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE

GUIDANCE = ("cfg_text_scale", "cfg_img_scale", "cfg_interval", "cfg_renorm_min", "cfg_renorm_type")


def module_tree(state: dict[str, torch.Tensor], root: nn.Module | None = None) -> nn.Module:
    """Nested modules with the parameters of a state dict."""
    root = nn.Module() if root is None else root
    for name, tensor in state.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]
        node.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=False))
    return root


class NaiveCache:
    """An empty official cache."""

    def __init__(self, num_layers: int = 3):
        self.key_cache = dict.fromkeys(range(num_layers))
        self.value_cache = dict.fromkeys(range(num_layers))

    @property
    def num_layers(self) -> int:
        return len(self.key_cache)

    @property
    def seq_lens(self) -> int:
        return 0 if self.key_cache[0] is None else self.key_cache[0].shape[0]


class OfficialBagel(nn.Module):
    """The official module, whose own entry points must not be called."""

    def generate_image(self, **_):
        raise AssertionError("the official entry point was called")

    forward_cache_update_text = forward_cache_update_vit = forward_cache_update_vae = generate_image
    generate_text = chat = generate_image


class OfficialAutoEncoder(nn.Module):
    """The official autoencoder, whose own methods must not be called."""

    def encode(self, _):
        raise AssertionError("the official autoencoder was called")

    decode = encode


def load_official(folder: Path, dtype=torch.float32, visual_gen=True) -> SimpleNamespace:
    """The six arguments of the official inferencer, and ``ours``, the checkpoint's :class:`BagelConfig`.

    With ``visual_gen=False``, as in the official understanding evaluation, there are no autoencoder and no generation
    weights.
    """
    config = BagelConfig.from_folder(folder)
    stored = load_file(folder / "ema.safetensors")
    left_out = () if visual_gen else VISUAL_GEN_MODULES
    state = {name: tensor.to(dtype) for name, tensor in stored.items() if name.split(".")[0] not in left_out}
    model = module_tree(state, OfficialBagel())
    model.config = load_official_config(folder, visual_gen)
    tokenizer = FastTokenizer(folder)
    ids = {"bos_token_id": "<|im_start|>", "eos_token_id": "<|im_end|>"}
    ids |= {"start_of_image": "<|vision_start|>", "end_of_image": "<|vision_end|>"}
    return SimpleNamespace(
        model=model,
        vae_model=module_tree(load_file(folder / "ae.safetensors"), OfficialAutoEncoder()) if visual_gen else None,
        tokenizer=tokenizer,
        vae_transform=ImageTransform(config.vae_transform),
        vit_transform=ImageTransform(config.vit_transform),
        new_token_ids={name: tokenizer.backend_tokenizer.token_to_id(text) for name, text in ids.items()},
        ours=config,
    )


def load_official_config(folder: Path, visual_gen: bool) -> SimpleNamespace:
    """The configuration as the official scripts assemble it from the JSON files and constants."""
    main, llm, vit = (
        json.loads((folder / name).read_text()) for name in ("config.json", "llm_config.json", "vit_config.json")
    )
    main |= {"visual_gen": visual_gen, "visual_und": True}
    main["llm_config"] = SimpleNamespace(**llm, rope_scaling=None)
    main["vit_config"] = SimpleNamespace(**vit | {"rope": False, "num_hidden_layers": vit["num_hidden_layers"] - 1})
    main["vae_config"] = SimpleNamespace(**main["vae_config"]) if visual_gen else None
    if not visual_gen:
        main["max_latent_size"] = 2  # has no effect, because the module has no latent position table
    return SimpleNamespace(**main)


class FastTokenizer:
    """Like the fast tokenizers of transformers, a wrapper of ``tokenizers``."""

    def __init__(self, folder: Path):
        self.backend_tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        return self.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        return self.backend_tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)


class SlowTokenizer:
    """Like the slow tokenizers of transformers, a BPE in Python."""

    def __init__(self, folder: Path):
        self.encoder = json.loads((folder / "vocab.json").read_text())
        merges = [line.split(" ") for line in (folder / "merges.txt").read_text().splitlines() if line[:1] != "#"]
        self.bpe_ranks = {tuple(merge): rank for rank, merge in enumerate(merges)}
        added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        self.added_tokens_decoder = {int(token): entry["content"] for token, entry in added.items()}


class ImageTransform:
    """The official transform: resize, convert to a tensor, normalize to [-1, 1]."""

    def __init__(self, rule: ResizeRule):
        self.rule, self.stride = rule, rule.stride
        names = ("max_size", "min_size", "stride", "max_pixels")
        self.resize_transform = SimpleNamespace(**{name: getattr(rule, name) for name in names})

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return image_to_tensor(self.rule.resize(image))


class OfficialScript:
    """Calls the entry points as official scripts do: with contexts as dictionaries and packed arguments."""

    def __init__(self, official: SimpleNamespace):
        self.official, self.model, self.config = official, official.model, official.ours

    def context(self) -> dict:
        return {"kv_lens": [0], "ropes": [0], "past_key_values": NaiveCache()}

    def add_text(self, context: dict, text: str) -> None:
        marker_ids = self.official.new_token_ids
        ids = [marker_ids["bos_token_id"], *self.official.tokenizer.encode(text), marker_ids["eos_token_id"]]
        [start], [length] = context["ropes"], context["kv_lens"]
        self._update(context, len(ids), len(ids), self.model.forward_cache_update_text, dict(
            packed_text_ids=torch.tensor(ids),
            packed_text_position_ids=torch.arange(start, start + len(ids)),
            text_token_lens=torch.tensor([len(ids)], dtype=torch.int),
            packed_text_indexes=torch.arange(length, length + len(ids)),
        ))  # fmt: skip

    def add_vit(self, context: dict, image: Image.Image) -> None:
        pixels, patch = self.official.vit_transform(image), self.config.vit.patch_size
        patches = patchify(pixels, patch)
        side = self.config.vit.max_patches_per_side
        self._update(context, len(patches) + 2, 1, self.model.forward_cache_update_vit, dict(
            packed_vit_tokens=patches,
            packed_vit_position_ids=position_ids(pixels.shape[1] // patch, pixels.shape[2] // patch, side),
            vit_token_seqlens=torch.tensor([len(patches)], dtype=torch.int),
            packed_vit_token_indexes=torch.arange(1, len(patches) + 1),
            **self._pack_image(context, len(patches)),
        ))  # fmt: skip

    def add_vae(self, context: dict, image: Image.Image, vae_model) -> None:
        pixels, stride = self.official.vae_transform(image), self.config.latent_stride
        grid = (pixels.shape[1] // stride, pixels.shape[2] // stride)
        tokens = grid[0] * grid[1]
        self._update(context, tokens + 2, 1, self.model.forward_cache_update_vae, dict(
            vae_model=vae_model,
            padded_images=pixels[None],
            patchified_vae_latent_shapes=[grid],
            packed_vae_position_ids=position_ids(*grid, self.config.max_latent_size),
            packed_timesteps=torch.tensor([0]),
            packed_vae_token_indexes=torch.arange(1, tokens + 1),
            **self._pack_image(context, tokens),
        ))  # fmt: skip

    def generate_image(self, size, noise, context, no_text, no_img, **settings) -> torch.Tensor:
        grid = tuple(side // self.config.latent_stride for side in size)
        tokens = grid[0] * grid[1]
        packed = self._pack_image(context, tokens)
        for name, branch in (("cfg_text", no_text), ("cfg_img", no_img)):
            settings |= {
                f"{name}_past_key_values": branch["past_key_values"],
                f"{name}_key_values_lens": torch.tensor(branch["kv_lens"], dtype=torch.int),
                f"{name}_packed_position_ids": torch.tensor(branch["ropes"] * (tokens + 2)),
                f"{name}_packed_query_indexes": torch.arange(tokens + 2) + branch["kv_lens"][0],
                f"{name}_packed_key_value_indexes": torch.arange(branch["kv_lens"][0]),
            }
        [latent] = self.model.generate_image(
            packed_init_noises=noise,
            packed_vae_position_ids=position_ids(*grid, self.config.max_latent_size),
            packed_vae_token_indexes=torch.arange(1, tokens + 1),
            past_key_values=context["past_key_values"],
            key_values_lens=torch.tensor(context["kv_lens"], dtype=torch.int),
            packed_key_value_indexes=torch.arange(context["kv_lens"][0]),
            **packed,
            **settings,
        )
        return latent

    def generate_text(self, context: dict, max_length: int, **options) -> str:
        """On a copy of the cache, because the entry point fills it."""
        marker_ids = self.official.new_token_ids
        ids = self.model.generate_text(
            past_key_values=deepcopy(context["past_key_values"]),
            packed_start_tokens=torch.tensor([marker_ids["bos_token_id"]]),
            packed_query_position_ids=torch.tensor(context["ropes"]),
            key_values_lens=torch.tensor(context["kv_lens"], dtype=torch.int),
            packed_key_value_indexes=torch.arange(context["kv_lens"][0]),
            max_length=max_length,
            end_token_id=marker_ids["eos_token_id"],
            **options,
        )
        return extract_answer(self.official.tokenizer.decode(ids[:, 0]))

    def _pack_image(self, context: dict, tokens: int) -> dict:
        [length], marker_ids = context["kv_lens"], self.official.new_token_ids
        return dict(
            packed_text_ids=torch.tensor([marker_ids["start_of_image"], marker_ids["end_of_image"]]),
            packed_text_indexes=torch.tensor([0, tokens + 1]),
            packed_position_ids=torch.tensor(context["ropes"] * (tokens + 2)),
            packed_seqlens=torch.tensor([tokens + 2], dtype=torch.int),
            packed_indexes=torch.arange(length, length + tokens + 2),
        )

    def _update(self, context: dict, tokens: int, positions: int, entry_point, arguments: dict) -> None:
        [length], [position] = context["kv_lens"], context["ropes"]
        context["past_key_values"] = entry_point(
            past_key_values=context["past_key_values"],
            key_values_lens=torch.tensor([length], dtype=torch.int),
            packed_key_value_indexes=torch.arange(length),
            **arguments,
        )
        context["kv_lens"], context["ropes"] = [length + tokens], [position + positions]


class RecordedRequest:
    """A conformance case that is a request: inputs, hyper-parameters, outputs and noise."""

    def __init__(self, name: str):
        self.folder = PACK / "cases" / name
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.hyper = self.meta["inputs"]["hyper"]
        self.settings = {name: self.hyper[name] for name in (*GUIDANCE, "num_timesteps", "timestep_shift")}
        self.inputs = load_inputs(PACK, self.meta)
        self.golden = load_file(self.folder / "tensors.safetensors")
        self.noise = [] if self.hyper["understanding_output"] else recorded_noise(self.meta, self.golden)

    @property
    def system(self) -> str | None:
        """The system prompt, if the request has ``think``."""
        prompt = THINK_BEFORE_ANSWER if self.hyper["understanding_output"] else THINK_BEFORE_IMAGE
        return prompt if self.hyper["think"] else None

    def patch_randn(self, monkeypatch) -> None:
        """Make torch.randn return the recorded noise, in order."""
        noise = iter(self.noise)

        def randn(*shape, **_):
            tensor = next(noise)
            assert tuple(tensor.shape) in (shape, *shape)
            return tensor.clone()

        monkeypatch.setattr(torch, "randn", randn)

    def check_outputs(self, outputs: list) -> None:
        """Assert that these are the recorded outputs: equal texts, images within one level."""
        assert len(outputs) == len(self.meta["outputs"])
        for output, recorded in zip(outputs, self.meta["outputs"], strict=True):
            if isinstance(output, str):
                assert output == recorded["text"]
            else:
                assert max_difference(output, Image.open(self.folder / recorded["image"])) <= 1


def make_inferencer(official: SimpleNamespace) -> InterleaveInferencer:
    """Our inferencer for the six official arguments."""
    return InterleaveInferencer(
        official.model, official.vae_model, official.tokenizer, official.vae_transform, official.vit_transform,
        official.new_token_ids,
    )  # fmt: skip


def run_script(request: RecordedRequest, official: SimpleNamespace, vae_model) -> tuple[list[str], torch.Tensor | None]:
    """Run a request through the entry points, as the official inferencer does: its texts and its final latent."""
    script, hyper, texts = OfficialScript(official), request.hyper, []
    gen, no_img, size = script.context(), script.context(), tuple(hyper["image_shapes"])
    no_text = script.context()
    if request.system:
        script.add_text(gen, request.system)
        script.add_text(no_img, request.system)
    for part in request.inputs:
        if isinstance(part, str):
            no_text = deepcopy(gen)
            script.add_text(gen, part)
            script.add_text(no_img, part)
        else:
            resized = official.ours.vae_transform.resize(to_rgb(part))
            if not hyper["understanding_output"]:
                script.add_vae(gen, resized, vae_model)
            script.add_vit(gen, resized)
            no_text, size = deepcopy(gen), resized.size[::-1]
    if hyper["understanding_output"] or request.system:
        texts.append(script.generate_text(gen, hyper["max_think_token_n"]))
    if hyper["understanding_output"]:
        return texts, None
    if request.system:
        script.add_text(gen, texts[0])
    return texts, script.generate_image(size, request.noise[-1], gen, no_text, no_img, **request.settings)


def max_difference(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two images, in levels of 256."""
    return int(np.abs(np.asarray(one.convert("RGB"), int) - np.asarray(other.convert("RGB"), int)).max())
