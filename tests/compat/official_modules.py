"""Stand-ins for what the official repository loads: modules of its attribute names and keys, its tokenizer, its
transforms; its way of packing the arguments of an entry point; and what it was recorded to compute. Nothing here
computes a forward."""

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
from bagel_rt.conformance.bagel.requests import _draws
from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.embed import patchify, position_ids
from bagel_rt.models.bagel.images import ResizeRule, image_to_tensor, to_rgb
from bagel_rt.models.bagel.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE

GUIDANCE = ("cfg_text_scale", "cfg_img_scale", "cfg_interval", "cfg_renorm_min", "cfg_renorm_type")


def module_tree(state: dict[str, torch.Tensor], root: nn.Module | None = None) -> nn.Module:
    """Nested modules with these parameters."""
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
    """An official cache that nothing was put into."""

    seq_lens = 0


class OfficialBagel(nn.Module):
    """The official module: its attributes, its keys, and entry points that must not be called."""

    def generate_image(self, **_):
        raise AssertionError("the official forward ran")

    forward_cache_update_text = forward_cache_update_vit = forward_cache_update_vae = generate_image
    generate_text = chat = generate_image


class OfficialAutoEncoder(nn.Module):
    """The official autoencoder: its keys, and methods that must not be called."""

    def encode(self, _):
        raise AssertionError("the official autoencoder ran")

    decode = encode


def load_official(folder: Path, dtype=torch.float32, visual_gen=True) -> SimpleNamespace:
    """The six arguments of the official inferencer, and ``ours``, our reading of the configuration.

    With ``visual_gen=False`` as the official evaluation of understanding loads it: no autoencoder, no parts that draw.
    """
    config = BagelConfig.from_folder(folder)
    drawing = () if visual_gen else ("vae2llm", "llm2vae", "time_embedder", "latent_pos_embed")
    stored = load_file(folder / "ema.safetensors")
    state = {name: tensor.to(dtype) for name, tensor in stored.items() if name.split(".")[0] not in drawing}
    model = module_tree(state, OfficialBagel())
    llm, vit, vae = config.llm, config.vit, config.vae
    model.config = SimpleNamespace(
        visual_gen=visual_gen,
        visual_und=True,
        llm_config=SimpleNamespace(
            hidden_size=llm.hidden_size,
            num_hidden_layers=llm.num_layers,
            num_attention_heads=llm.num_heads,
            num_key_value_heads=llm.num_kv_heads,
            intermediate_size=llm.intermediate_size,
            vocab_size=llm.vocab_size,
            rope_theta=llm.rope_theta,
            rms_norm_eps=llm.rms_norm_eps,
            max_position_embeddings=llm.max_position_embeddings,
            layer_module="Qwen2MoTDecoderLayer",
            qk_norm=True,
            hidden_act="silu",
            rope_scaling=None,
        ),
        vit_config=SimpleNamespace(
            hidden_size=vit.hidden_size,
            num_hidden_layers=vit.num_layers,
            num_attention_heads=vit.num_heads,
            intermediate_size=vit.intermediate_size,
            patch_size=vit.patch_size,
            layer_norm_eps=vit.layer_norm_eps,
            hidden_act="gelu_pytorch_tanh",
            rope=False,
        ),
        vae_config=None
        if not visual_gen
        else SimpleNamespace(
            ch=vae.ch,
            ch_mult=list(vae.ch_mult),
            num_res_blocks=vae.num_res_blocks,
            z_channels=vae.z_channels,
            scale_factor=vae.scale_factor,
            shift_factor=vae.shift_factor,
        ),
        connector_act="gelu_pytorch_tanh",
        vit_max_num_patch_per_side=vit.max_patches_per_side,
        latent_patch_size=config.latent_patch_size,
        max_latent_size=config.max_latent_size if visual_gen else 2,
        interpolate_pos=config.interpolate_pos,
    )
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


class FastTokenizer:
    """As Hugging Face wraps ``tokenizers``."""

    def __init__(self, folder: Path):
        self.backend_tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        return self.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        return self.backend_tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)


class SlowTokenizer:
    """As Hugging Face writes a BPE in Python."""

    def __init__(self, folder: Path):
        self.encoder = json.loads((folder / "vocab.json").read_text())
        merges = [line.split(" ") for line in (folder / "merges.txt").read_text().splitlines() if line[:1] != "#"]
        self.bpe_ranks = {tuple(merge): rank for rank, merge in enumerate(merges)}
        added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        self.added_tokens_decoder = {int(token): entry["content"] for token, entry in added.items()}


class ImageTransform:
    """The official transform: resize, to a tensor, to [-1, 1]."""

    def __init__(self, rule: ResizeRule):
        self.rule, self.stride = rule, rule.stride
        names = ("max_size", "min_size", "stride", "max_pixels")
        self.resize_transform = SimpleNamespace(**{name: getattr(rule, name) for name in names})

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return image_to_tensor(self.rule.resize(image))


class OfficialScript:
    """How an official script talks to the module: contexts as dictionaries, arguments packed by hand."""

    def __init__(self, official: SimpleNamespace):
        self.official, self.model, self.config = official, official.model, official.ours

    def context(self) -> dict:
        return {"kv_lens": [0], "ropes": [0], "past_key_values": NaiveCache()}

    def add_text(self, context: dict, text: str) -> None:
        marks = self.official.new_token_ids
        ids = [marks["bos_token_id"], *self.official.tokenizer.encode(text), marks["eos_token_id"]]
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
            **self._image(context, len(patches)),
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
            **self._image(context, tokens),
        ))  # fmt: skip

    def draw(self, size, noise, context, no_text, no_img, **settings) -> torch.Tensor:
        grid = tuple(side // self.config.latent_stride for side in size)
        tokens = grid[0] * grid[1]
        packed = self._image(context, tokens)
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

    def write(self, context: dict, max_length: int, **options) -> str:
        marks = self.official.new_token_ids
        ids = self.model.generate_text(
            past_key_values=context["past_key_values"],
            packed_start_tokens=torch.tensor([marks["bos_token_id"]]),
            packed_query_position_ids=torch.tensor(context["ropes"]),
            key_values_lens=torch.tensor(context["kv_lens"], dtype=torch.int),
            packed_key_value_indexes=torch.arange(context["kv_lens"][0]),
            max_length=max_length,
            end_token_id=marks["eos_token_id"],
            **options,
        )
        text = self.official.tokenizer.decode(ids[:, 0])
        return text.split("<|im_end|>")[0].split("<|im_start|>")[1]

    def _image(self, context: dict, tokens: int) -> dict:
        [length], marks = context["kv_lens"], self.official.new_token_ids
        return dict(
            packed_text_ids=torch.tensor([marks["start_of_image"], marks["end_of_image"]]),
            packed_text_indexes=torch.tensor([0, tokens + 1]),
            packed_position_ids=torch.tensor(context["ropes"] * (tokens + 2)),
            packed_seqlens=torch.tensor([tokens + 2], dtype=torch.int),
            packed_indexes=torch.arange(length, length + tokens + 2),
        )

    def _update(self, context: dict, slots: int, steps: int, call, arguments: dict) -> None:
        [length], [position] = context["kv_lens"], context["ropes"]
        context["past_key_values"] = call(
            past_key_values=context["past_key_values"],
            key_values_lens=torch.tensor([length], dtype=torch.int),
            packed_key_value_indexes=torch.arange(length),
            **arguments,
        )
        context["kv_lens"], context["ropes"] = [length + slots], [position + steps]


class Case:
    """A recorded request: inputs, hyper-parameters, outputs and draws."""

    def __init__(self, name: str):
        self.folder = PACK / "cases" / name
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.hyper = self.meta["inputs"]["hyper"]
        self.settings = {name: self.hyper[name] for name in (*GUIDANCE, "num_timesteps", "timestep_shift")}
        self.parts = open_parts(PACK, self.meta["inputs"]["interleave_inputs"])
        golden = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            golden |= load_file(file)
        self.golden = golden
        self.draws = [] if self.hyper["understanding_output"] else _draws(self.meta, golden)

    @property
    def system(self) -> str | None:
        """The system prompt, if the model thinks."""
        prompt = THINK_BEFORE_ANSWER if self.hyper["understanding_output"] else THINK_BEFORE_IMAGE
        return prompt if self.hyper["think"] else None

    def feed(self, monkeypatch) -> None:
        """Let torch.randn give the recorded draws, in order, and nothing after them."""
        draws = iter(self.draws)

        def randn(*shape, **_):
            drawn = next(draws)
            assert tuple(drawn.shape) in (shape, *shape)
            return drawn.clone()

        monkeypatch.setattr(torch, "randn", randn)

    def check(self, outputs: list) -> None:
        """Whether these are the recorded outputs."""
        assert len(outputs) == len(self.meta["outputs"])
        for output, wanted in zip(outputs, self.meta["outputs"], strict=True):
            if isinstance(output, str):
                assert output == wanted["text"]
            else:
                assert levels_apart(output, Image.open(self.folder / wanted["image"])) <= 1


def load_inferencer(official: SimpleNamespace) -> InterleaveInferencer:
    """Ours, of the six official arguments."""
    return InterleaveInferencer(
        official.model, official.vae_model, official.tokenizer, official.vae_transform, official.vit_transform,
        official.new_token_ids,
    )  # fmt: skip


def run_script(case: Case, official: SimpleNamespace, vae_model) -> tuple[list[str], torch.Tensor | None]:
    """What the official inferencer does for a request, in its own calls: texts, and the final latent."""
    script, hyper, texts = OfficialScript(official), case.hyper, []
    gen, no_img, size = script.context(), script.context(), tuple(hyper["image_shapes"])
    no_text = script.context()
    if case.system:
        script.add_text(gen, case.system)
        script.add_text(no_img, case.system)
    for part in case.parts:
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
    if hyper["understanding_output"] or case.system:
        texts.append(script.write(gen, hyper["max_think_token_n"]))
    if hyper["understanding_output"]:
        return texts, None
    if case.system:
        script.add_text(gen, texts[0])
    return texts, script.draw(size, case.draws[-1], gen, no_text, no_img, **case.settings)


def open_parts(pack: Path, parts: list[str]) -> list:
    """The recorded inputs of a case: names of pictures become pictures."""
    return [Image.open(pack / part) if (pack / part).is_file() else part for part in parts]


def levels_apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures, in levels."""
    return int(np.abs(np.asarray(one.convert("RGB"), int) - np.asarray(other.convert("RGB"), int)).max())
