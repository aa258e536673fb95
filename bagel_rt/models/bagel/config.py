"""The model's configuration, read from the JSON files of its folder and checked before any allocation.

The official code reads ``llm_config.json`` and ``vit_config.json`` and hard-codes everything else: QK-norm on, untied
output head, no rotary positions in the vision tower, one vision layer fewer than in the file, the shape of the
autoencoder, the sizes of the position tables and of the input images. Here ``config.json`` can set these sizes; the
official values are the defaults. Unknown keys are ignored; a value that requires unsupported computation is an error.
"""

import json
import os
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from bagel_rt.checkpoint.files import REMEDY, read_json
from bagel_rt.checkpoint.find import describe_missing_folder
from bagel_rt.errors import CheckpointError
from bagel_rt.models.bagel.images import ResizeRule
from bagel_rt.validation import BOOLEAN, Spec, check_fields, checked, integer, invalid, number

_GROUP_NORM_GROUPS = 32
_ACTIVATION = "gelu_pytorch_tanh"
# Values equivalent to plain RoPE, in rope_scaling and rope_parameters; any other key must be null.
_PLAIN_ROPE = {
    "rope_type": "default",
    "type": "default",
    "factor": 1.0,
    "attention_factor": 1.0,
    "partial_rotary_factor": 1.0,
}
_Config = TypeVar("_Config", "TransformerConfig", "ViTConfig", "VAEConfig", "BagelConfig")


def _are_levels(value: Any) -> bool:
    return isinstance(value, tuple) and 1 <= len(value) <= 6 and all(map(integer(1, 16).accepts, value))


@dataclass(frozen=True)
class TransformerConfig:
    """The Mixture-of-Transformers decoder; both experts have these shapes. ValueError if a value is out of range."""

    hidden_size: int = checked(integer(1, 1 << 15))
    num_layers: int = checked(integer(1, 512), key="num_hidden_layers")
    num_heads: int = checked(integer(1, 512), key="num_attention_heads")  # query heads
    num_kv_heads: int = checked(integer(1, 512), key="num_key_value_heads")
    head_dim: int = checked(integer(2, 1024))
    intermediate_size: int = checked(integer(1, 1 << 18))
    vocab_size: int = checked(integer(1, 1 << 21))
    rope_theta: float = checked(number(1, 1e12))
    rms_norm_eps: float = checked(number(1e-12, 0.1))
    max_position_embeddings: int = checked(integer(1, 1 << 24))

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_heads % self.num_kv_heads:
            raise invalid(
                "num_attention_heads", self.num_heads, f"a multiple of num_key_value_heads, {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise invalid("head_dim", self.head_dim, "an even number, because RoPE rotates pairs")


@dataclass(frozen=True)
class ViTConfig:
    """The SigLIP vision tower. ValueError if a value is out of range."""

    hidden_size: int = checked(integer(1, 1 << 14))
    num_layers: int = checked(integer(1, 256, "The official loader drops the last layer"), key="num_hidden_layers")
    num_heads: int = checked(integer(1, 256), key="num_attention_heads")
    intermediate_size: int = checked(integer(1, 1 << 17))
    patch_size: int = checked(integer(1, 64))  # pixels
    num_channels: int = checked(integer(3, 3), 3)
    layer_norm_eps: float = checked(number(1e-12, 0.1), 1e-6)
    max_patches_per_side: int = checked(integer(1, 1024), 70, key="vit_max_num_patch_per_side")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hidden_size % self.num_heads:
            raise _uneven_heads(self.hidden_size, self.num_heads)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class VAEConfig:
    """The FLUX autoencoder; the defaults are the published one. ValueError if a value is out of range."""

    in_channels: int = checked(integer(3, 3), 3)
    out_channels: int = checked(integer(3, 3), 3, key="out_ch")
    ch: int = checked(integer(_GROUP_NORM_GROUPS, 1024), 128)  # channels at full resolution
    # Channels per level, in units of ch.
    ch_mult: tuple[int, ...] = checked(Spec(_are_levels, "1 to 6 integers from 1 to 16"), (1, 2, 4, 4))
    num_res_blocks: int = checked(integer(1, 16), 2)
    z_channels: int = checked(integer(1, 256), 16)
    scale_factor: float = checked(number(1e-3, 1e3), 0.3611)
    shift_factor: float = checked(number(-1e3, 1e3), 0.1159)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.ch % _GROUP_NORM_GROUPS:
            raise invalid("ch", self.ch, f"a multiple of {_GROUP_NORM_GROUPS}, the groups of GroupNorm")

    @property
    def downsample(self) -> int:
        """Pixels per latent cell and side."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class BagelConfig:
    """The whole model; the defaults are the values that the official code hard-codes. ValueError if values conflict."""

    llm: TransformerConfig
    vit: ViTConfig
    vae: VAEConfig = VAEConfig()
    latent_patch_size: int = checked(integer(1, 16), 2)  # latent cells per token and side
    max_latent_size: int = checked(integer(1, 1024), 64)  # latent tokens per side in the position table
    vae_transform: ResizeRule = ResizeRule(1024, 512, 16)
    vit_transform: ResizeRule = ResizeRule(980, 224, 14)
    interpolate_pos: bool = checked(BOOLEAN, False)  # spread position ids over the whole table

    def __post_init__(self) -> None:
        check_fields(self)
        for name, rule, unit in (
            ("vae", self.vae_transform, self.latent_stride),
            ("vit", self.vit_transform, self.vit.patch_size),
        ):
            if rule.stride % unit:
                raise invalid(f"image_transforms.{name}: stride", rule.stride, f"a multiple of {unit}")

    @property
    def latent_stride(self) -> int:
        """Pixels per latent token and side."""
        return self.vae.downsample * self.latent_patch_size

    def latent_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(grid_h, grid_w) of the latent tokens of an image of (height, width) pixels."""
        height, width = size
        return height // self.latent_stride, width // self.latent_stride

    def patch_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(grid_h, grid_w) of the ViT patches of an image that the autoencoder's rule resized to (height, width)."""
        height, width = size
        width, height = self.vit_transform.output_size(width, height)
        return height // self.vit.patch_size, width // self.vit.patch_size

    @property
    def largest_side(self) -> int:
        """Pixels per side of the largest image that fits the position table."""
        return self.max_latent_size * self.latent_stride

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError unless the model can generate an image of this size."""
        stride, largest = self.latent_stride, self.largest_side
        if any(side % stride or not stride <= side <= largest for side in (height, width)):
            raise ValueError(
                f"size must be WIDTHxHEIGHT in multiples of {stride} from {stride} to {largest}, got {width}x{height}."
            )

    @property
    def default_resolution(self) -> int:
        """Pixels per side of a generated image by default: 1024 for the published model."""
        return min(self.vae_transform.max_size // self.latent_stride * self.latent_stride, self.largest_side)

    @property
    def latent_features(self) -> int:
        """Number of features of a latent token."""
        return self.vae.z_channels * self.latent_patch_size**2

    @property
    def patch_features(self) -> int:
        """Number of features of a ViT patch."""
        return self.vit.num_channels * self.vit.patch_size**2

    @classmethod
    def from_folder(cls, path: Path | str) -> "BagelConfig":
        """Read an official model folder. CheckpointError names the file, the key, the allowed values and the remedy."""
        folder = Path(path)
        if not os.path.isdir(folder):
            raise CheckpointError(describe_missing_folder(path))
        main_file, llm_file, vit_file = (folder / f"{name}.json" for name in ("config", "llm_config", "vit_config"))
        llm, vit = _read_required(llm_file), _read_required(vit_file)
        main = read_json(main_file) if os.path.lexists(main_file) else {}
        _require_value(main, "connector_act", _ACTIVATION, main_file)
        return _build(
            cls,
            main,
            main_file,
            llm=_read_llm(llm, llm_file),
            vit=_read_vit(vit, vit_file, main, main_file),
            vae=_read_vae(main, main_file),
            **_read_transforms(main, main_file),
        )


def _uneven_heads(hidden_size: int, heads: int) -> ValueError:
    return invalid("hidden_size", hidden_size, f"a multiple of num_attention_heads, {heads}")


def _file_error(source: Path | str, error: ValueError) -> CheckpointError:
    """The error for an invalid value in a file."""
    return CheckpointError(f"{source}: {error} {REMEDY}.")


def _read_required(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        inner = next((file for depth in ("*", "*/*") for file in path.parent.glob(f"{depth}/{path.name}")), None)
        if inner is not None:  # for example the snapshot in a download cache
            raise CheckpointError(f"{path} is missing. The model is in {inner.parent}. Use that folder.")
        raise CheckpointError(
            f"{path} is missing. Download it from the published model folder; a copy inside config.json is not enough."
        )
    return read_json(path)


def _section(values: dict[str, Any], key: str, source: Path | str) -> dict[str, Any]:
    """The object under ``key``; empty if the key is missing or null."""
    section = values.get(key)
    if section is not None and not isinstance(section, dict):
        raise _file_error(source, invalid(key, section, "an object"))
    return section or {}


def _require_value(values: dict[str, Any], key: str, allowed: Any, source: Path | str) -> None:
    """Raise CheckpointError if the key is present with an unsupported value; only ``allowed`` is supported."""
    if values.get(key, allowed) != allowed:
        raise _file_error(source, invalid(key, values[key], json.dumps(allowed)))


def _build(kind: type[_Config], values: dict[str, Any], source: Path | str, **derived: Any) -> _Config:
    """Create a ``kind`` from the JSON object ``values``, except for the fields in ``derived``."""
    for item in fields(kind):
        key = item.metadata.get("key", item.name)
        if item.name in derived or not item.metadata:
            continue
        if key in values:
            value = values[key]
            derived[item.name] = tuple(value) if isinstance(value, list) else value
        elif item.default is MISSING:
            raise CheckpointError(f"{source}: {key} is missing; it must be {item.metadata['spec'].allowed}. {REMEDY}.")
    try:
        return kind(**derived)
    except ValueError as error:
        raise _file_error(source, error) from None


def _read_llm(values: dict[str, Any], source: Path) -> TransformerConfig:
    _require_value(values, "hidden_act", "silu", source)
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    head_dim = None  # if one of them is not a valid number, its own check fails first
    if type(hidden) is int and type(heads) is int and heads > 0:
        if hidden % heads:
            raise _file_error(source, _uneven_heads(hidden, heads))
        head_dim = hidden // heads
        _require_value(values, "head_dim", head_dim, source)
    return _build(TransformerConfig, values | _read_rope_theta(values, source), source, head_dim=head_dim)


def _read_rope_theta(values: dict[str, Any], source: Path) -> dict[str, Any]:
    """{"rope_theta": theta}, or {} if there is none, from a file of transformers 4 or 5.

    Version 4 writes ``rope_theta`` and, for kinds other than plain RoPE, ``rope_scaling``; version 5 writes both into
    ``rope_parameters``. Only plain RoPE is supported.
    """
    _require_value(values, "partial_rotary_factor", _PLAIN_ROPE["partial_rotary_factor"], source)
    thetas = {"rope_theta": values.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        section = _section(values, key, source)
        for name in ("rope_type", "type", *section):  # the type first: it explains the other keys
            value = section.get(name)
            if name == "rope_theta":
                thetas[f"{key}.rope_theta"] = value
            elif value is not None and value != _PLAIN_ROPE.get(name):
                allowed = f"{json.dumps(_PLAIN_ROPE.get(name))}, because only plain RoPE is supported"
                raise _file_error(source, invalid(f"{key}.{name}", value, allowed))
    thetas = {name: theta for name, theta in thetas.items() if theta is not None}
    if not thetas:
        return {}
    (first, theta), *others = thetas.items()
    for name, other in others:
        if other != theta:
            raise _file_error(source, invalid(name, other, f"equal to {first}, {theta!r}"))
    return {"rope_theta": theta}


def _read_vit(values: dict[str, Any], source: Path, main: dict[str, Any], main_source: Path) -> ViTConfig:
    """Read ``vit_config.json`` without its last layer, and the size of the position table from ``config.json``."""
    _require_value(values, "hidden_act", _ACTIVATION, source)
    layers = values.get("num_hidden_layers")
    used = values | {"num_hidden_layers": layers - 1} if type(layers) is int else values
    own = vars(_build(ViTConfig, used, source))
    return _build(ViTConfig, main, main_source, **{name: own[name] for name in own if name != "max_patches_per_side"})


def _read_vae(main: dict[str, Any], main_source: Path) -> VAEConfig:
    values, source = _section(main, "vae_config", main_source), f"{main_source}, vae_config"
    vae = _build(VAEConfig, values, source)
    _require_value(values, "downsample", vae.downsample, source)
    return vae


def _read_transforms(main: dict[str, Any], source: Path) -> dict[str, ResizeRule]:
    """Read the resize rules in ``config.json``: {"vae": [max, min, stride], "vit": [max, min, stride]}."""
    key = "oracle_image_transforms" if "oracle_image_transforms" in main else "image_transforms"
    rules = {}
    for name, sizes in _section(main, key, source).items():
        if name not in ("vae", "vit"):
            continue
        if not (
            isinstance(sizes, list)
            and len(sizes) == 3
            and all(type(size) is int and 1 <= size <= 1 << 14 for size in sizes)
            and sizes[2] <= sizes[1] <= sizes[0]
        ):
            allowed = "[max, min, stride], integers with 16384 >= max >= min >= stride >= 1"
            raise _file_error(source, invalid(f"{key}.{name}", sizes, allowed))
        rules[f"{name}_transform"] = ResizeRule(*sizes)
    return rules


BAGEL_7B_MOT = BagelConfig(
    llm=TransformerConfig(
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=18944,
        vocab_size=152064,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=32768,
    ),
    vit=ViTConfig(hidden_size=1152, num_layers=26, num_heads=16, intermediate_size=4304, patch_size=14),
)
"""The published ByteDance-Seed/BAGEL-7B-MoT."""
