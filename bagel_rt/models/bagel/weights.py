"""BAGEL's parameters as plain tensors in the layout of the kernels, and the mapping from the official names.

The layout differs from the checkpoint in four ways:

- A parameter that both experts have is a :class:`Pair` of tensors (gen, und).
- The query, key and value projections are row blocks of one fused matrix.
- The gate and up projections are the even and odd rows of one fused matrix. The GEMM then yields both factors of SwiGLU
  in adjacent columns, and its epilogue multiplies them without a second pass.
- The two QK-norm vectors are repeated to one row per head.

Loading needs no conversion pass: a :class:`~bagel_rt.checkpoint.read.WeightSlot` is a view into the fused tensor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch

from bagel_rt.checkpoint.read import WeightSlot
from bagel_rt.models.bagel.config import BagelConfig, TransformerConfig, ViTConfig
from bagel_rt.models.bagel.embed import TIME_FREQUENCIES, sincos_table

_VISION, _CONNECTOR, _IMAGES = "vision tower", "vision connector", "image generation layers"
# Start of the official names -> the part of the model, for error messages.
_PARTS = {
    "vit_model.": _VISION,
    "connector.": _CONNECTOR,
    "vit_pos_embed.": _CONNECTOR,
    "vae2llm.": _IMAGES,
    "llm2vae.": _IMAGES,
    "time_embedder.": _IMAGES,
    "latent_pos_embed.": _IMAGES,
}


class Pair(NamedTuple):
    """A parameter of both experts: generation and understanding."""

    gen: torch.Tensor
    und: torch.Tensor


class Affine(NamedTuple):
    """A weight [N, K], or [N] for a LayerNorm, and its bias [N]."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(slots=True)
class DecoderLayerWeights:
    """One Mixture-of-Transformers layer; shapes with H hidden, D head_dim, F MLP width."""

    input_norm: Pair  # [H]
    qkv: Pair  # [(Hq + 2 Hkv) D, H]: query heads, key heads, value heads
    qkv_bias: Pair  # [(Hq + 2 Hkv) D]
    qk_norm: Pair  # [Hq + Hkv, D]
    o: Pair  # [H, Hq D]
    post_norm: Pair  # [H]
    gate_up: Pair  # [2 F, H]: row 2i is gate i, row 2i + 1 is up i
    down: Pair  # [H, F]


@dataclass(slots=True)
class ViTLayerWeights:
    """One pre-LayerNorm SigLIP block of width V."""

    norm1: Affine  # [V]
    qkv: Affine  # [3 V, V]
    out: Affine  # [V, V]
    norm2: Affine  # [V]
    fc1: Affine  # [F, V]
    fc2: Affine  # [V, F]


@dataclass(slots=True)
class ViTWeights:
    """The SigLIP vision tower."""

    patch_embedding: Affine  # [V, patch * patch * channels], a linear layer on flattened patches
    position_embedding: torch.Tensor  # [max_side ** 2, V]
    layers: list[ViTLayerWeights]
    post_norm: Affine  # [V]


@dataclass(slots=True)
class BagelWeights:
    """All weights in ``ema.safetensors``."""

    embed_tokens: torch.Tensor  # [vocab, H]
    layers: list[DecoderLayerWeights]
    norm: Pair  # [H]
    lm_head: torch.Tensor  # [vocab, H]
    vit: ViTWeights
    connector: tuple[Affine, Affine]  # [H, V], [H, H]
    time_embedder: tuple[Affine, Affine]  # [H, 256], [H, H]
    vae2llm: Affine  # [H, latent features]
    llm2vae: Affine  # [latent features, H]
    latent_positions: torch.Tensor  # [max_latent_size ** 2, H]
    vit_positions: torch.Tensor  # [max_side ** 2, H]

    @classmethod
    def allocate(cls, config: BagelConfig, device: torch.device | str, dtype: torch.dtype) -> "BagelWeights":
        """Allocate uninitialized weights; ``device="meta"`` allocates no memory."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        def affine(rows: int, *columns: int) -> Affine:
            return Affine(empty(rows, *columns), empty(rows))

        def pair(*shape: int) -> Pair:
            return Pair(empty(*shape), empty(*shape))

        llm, vit, features = config.llm, config.vit, config.latent_features
        H, D, V = llm.hidden_size, llm.head_dim, vit.hidden_size
        qkv_rows = (llm.num_heads + 2 * llm.num_kv_heads) * D
        return cls(
            embed_tokens=empty(llm.vocab_size, H),
            layers=[
                DecoderLayerWeights(
                    input_norm=pair(H),
                    qkv=pair(qkv_rows, H),
                    qkv_bias=pair(qkv_rows),
                    qk_norm=pair(llm.num_heads + llm.num_kv_heads, D),
                    o=pair(H, llm.num_heads * D),
                    post_norm=pair(H),
                    gate_up=pair(2 * llm.intermediate_size, H),
                    down=pair(H, llm.intermediate_size),
                )
                for _ in range(llm.num_layers)
            ],
            norm=pair(H),
            lm_head=empty(llm.vocab_size, H),
            vit=ViTWeights(
                patch_embedding=affine(V, config.patch_features),
                position_embedding=empty(vit.max_patches_per_side**2, V),
                layers=[
                    ViTLayerWeights(
                        norm1=affine(V),
                        qkv=affine(3 * V, V),
                        out=affine(V, V),
                        norm2=affine(V),
                        fc1=affine(vit.intermediate_size, V),
                        fc2=affine(V, vit.intermediate_size),
                    )
                    for _ in range(vit.num_layers)
                ],
                post_norm=affine(V),
            ),
            connector=(affine(H, V), affine(H, H)),
            time_embedder=(affine(H, TIME_FREQUENCIES), affine(H, H)),
            vae2llm=affine(H, features),
            llm2vae=affine(features, H),
            latent_positions=empty(config.max_latent_size**2, H),
            vit_positions=empty(vit.max_patches_per_side**2, H),
        )

    def weight_slots(self, config: BagelConfig) -> dict[str, WeightSlot]:
        """Map every tensor name in ``ema.safetensors`` to its slot."""
        views: dict[str, torch.Tensor | WeightSlot] = {
            "language_model.model.embed_tokens.weight": self.embed_tokens,
            "language_model.model.norm_moe_gen.weight": self.norm.gen,
            "language_model.model.norm.weight": self.norm.und,
            "language_model.lm_head.weight": self.lm_head,
            "latent_pos_embed.pos_embed": _table_slot(self.latent_positions, config.max_latent_size),
            "vit_pos_embed.pos_embed": _table_slot(self.vit_positions, config.vit.max_patches_per_side),
        }
        for module, affine in (
            ("connector.fc1", self.connector[0]),
            ("connector.fc2", self.connector[1]),
            ("time_embedder.mlp.0", self.time_embedder[0]),
            ("time_embedder.mlp.2", self.time_embedder[1]),
            ("vae2llm", self.vae2llm),
            ("llm2vae", self.llm2vae),
        ):
            views |= _affine_views(module, affine)
        views |= dict(_vit_views(self.vit, config.vit))
        for index, layer in enumerate(self.layers):
            prefix = f"language_model.model.layers.{index}."
            for expert, suffix in enumerate(("_moe_gen", "")):
                views |= dict(_layer_views(prefix, layer, expert, suffix, config.llm))
        slots = {
            name: view if isinstance(view, WeightSlot) else WeightSlot(view, tuple(view.shape))
            for name, view in views.items()
        }
        return {name: replace(slot, part=_part(name)) for name, slot in slots.items()}


def _part(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    part = next((part for start, part in _PARTS.items() if name.startswith(start)), None)
    return part or ("image generation expert" if "_moe_gen." in name else "language model")


def _table_slot(view: torch.Tensor, side: int) -> WeightSlot:
    """The slot of a sine-cosine position table. Training drops it from checkpoints, so that it may have to be computed.

    The published tables are rounded to bfloat16.
    """
    return WeightSlot(view, tuple(view.shape), default=lambda: sincos_table(view.shape[1], side).bfloat16())


def _affine_views(module: str, affine: Affine) -> dict[str, torch.Tensor]:
    return {f"{module}.weight": affine.weight, f"{module}.bias": affine.bias}


def _layer_views(
    prefix: str, layer: DecoderLayerWeights, expert: int, suffix: str, config: TransformerConfig
) -> Iterator[tuple[str, torch.Tensor | WeightSlot]]:
    """(official name, view) of the tensors of one expert; the official names append the suffix to the module name."""
    heads, D = config.num_heads, config.head_dim
    # Row 2i of gate_up is gate i, row 2i + 1 is up i: [2 F, H] viewed as [F, 2, H] separates them.
    qk_norm, gate_up = layer.qk_norm[expert], layer.gate_up[expert].view(config.intermediate_size, 2, -1)
    rows = [config.num_heads * D, config.num_kv_heads * D, config.num_kv_heads * D]
    for name, weight, bias in zip(
        "qkv", layer.qkv[expert].split(rows), layer.qkv_bias[expert].split(rows), strict=True
    ):
        yield f"{prefix}self_attn.{name}_proj{suffix}.weight", weight
        yield f"{prefix}self_attn.{name}_proj{suffix}.bias", bias
    # The file has one vector [D], which is broadcast to the rows of all heads.
    yield f"{prefix}self_attn.q_norm{suffix}.weight", WeightSlot(qk_norm[:heads], (D,))
    yield f"{prefix}self_attn.k_norm{suffix}.weight", WeightSlot(qk_norm[heads:], (D,))
    yield f"{prefix}self_attn.o_proj{suffix}.weight", layer.o[expert]
    yield f"{prefix}mlp{suffix}.gate_proj.weight", gate_up[:, 0]
    yield f"{prefix}mlp{suffix}.up_proj.weight", gate_up[:, 1]
    yield f"{prefix}mlp{suffix}.down_proj.weight", layer.down[expert]
    yield f"{prefix}input_layernorm{suffix}.weight", layer.input_norm[expert]
    yield f"{prefix}post_attention_layernorm{suffix}.weight", layer.post_norm[expert]


def _vit_views(vit: ViTWeights, config: ViTConfig) -> Iterator[tuple[str, torch.Tensor]]:
    prefix = "vit_model.vision_model."
    yield from _affine_views(f"{prefix}embeddings.patch_embedding", vit.patch_embedding).items()
    yield f"{prefix}embeddings.position_embedding.weight", vit.position_embedding
    yield from _affine_views(f"{prefix}post_layernorm", vit.post_norm).items()
    for index, layer in enumerate(vit.layers):
        module = f"{prefix}encoder.layers.{index}."
        for name, affine in (
            ("layer_norm1", layer.norm1),
            ("layer_norm2", layer.norm2),
            ("self_attn.out_proj", layer.out),
            ("mlp.fc1", layer.fc1),
            ("mlp.fc2", layer.fc2),
        ):
            yield from _affine_views(module + name, affine).items()
        weights, biases = (tensor.split(config.hidden_size) for tensor in layer.qkv)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            yield from _affine_views(f"{module}self_attn.{name}_proj", Affine(weight, bias)).items()


def map_weights(weights: BagelWeights, visit: Callable[[str, torch.Tensor], Any]) -> BagelWeights:
    """Copy the weights with every tensor replaced by ``visit(name, tensor)``; a name is "layers.0.qkv.gen"."""

    def copy(node: Any, name: str) -> Any:
        if isinstance(node, torch.Tensor):
            return visit(name, node)
        prefix = f"{name}." if name else ""
        if isinstance(node, (Pair, Affine)):
            return type(node)(*(copy(part, prefix + key) for key, part in zip(node._fields, node, strict=True)))
        if isinstance(node, (list, tuple)):
            return type(node)(copy(part, f"{prefix}{index}") for index, part in enumerate(node))
        return type(node)(
            **{field.name: copy(getattr(node, field.name), prefix + field.name) for field in fields(node)}
        )

    copied: BagelWeights = copy(weights, "")
    return copied
