"""Trainable parameters: float32 leaf tensors, and the model in the compute dtype that is built from them.

A leaf is a tensor of :class:`bagel_rt.models.bagel.weights.BagelWeights` in the same fused layout, except for QK-norm.
The runtime repeats the official [head_dim] vector for every head. The leaf has it once, so that training cannot make
the heads differ.
"""

from collections.abc import Mapping

import torch

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.weights import map_weights

FROZEN = {"latent_positions": "latent_pos_embed.pos_embed", "vit_positions": "vit_pos_embed.pos_embed"}
"""Leaf -> official name of the sin-cos tables, which the official trainer freezes too."""


class Parameters:
    """The leaf tensors of a model.

    Attributes:
        leaves: name -> tensor on the model's device, float32 (float64 for a float64 model). All require a gradient
            except those in :data:`FROZEN`.
    """

    def __init__(self, model: BagelModel):
        """Copy the weights of ``model``."""
        self._model = model
        self._wide = torch.promote_types(model.dtype, torch.float32)
        self.leaves: dict[str, torch.Tensor] = {}

        def copy(name: str, tensor: torch.Tensor) -> None:
            once = self._deduplicate(name, tensor).detach()
            self.leaves[name] = once.to(self._wide, copy=True).contiguous().requires_grad_(name not in FROZEN)

        map_weights(model.weights, copy)

    def trained(self) -> dict[str, torch.Tensor]:
        """The leaves that require a gradient."""
        return {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}

    def model(self, leaves: Mapping[str, torch.Tensor] | None = None, dtype: torch.dtype | None = None) -> BagelModel:
        """Build a model from leaves. Gradients flow through it to the leaves.

        Args:
            leaves: tensors with the same names and shapes, such as averaged weights; default: ``self.leaves``.
            dtype: compute dtype; default: that of the leaves.
        """
        leaves, dtype = leaves or self.leaves, dtype or self._wide
        weights = map_weights(self._model.weights, lambda name, _: self._expand(name, leaves[name]).to(dtype))
        return self._model.with_weights(weights)

    def official_gradients(self) -> dict[str, torch.Tensor]:
        """Official name -> gradient, without the :data:`FROZEN` tables."""
        places = map_weights(self._model.weights, self._gradient).weight_slots(self.config)
        return {
            name: place.view.sum_to_size(place.shape) for name, place in places.items() if name not in FROZEN.values()
        }

    @property
    def config(self) -> BagelConfig:
        """The model's configuration."""
        return self._model.config

    def _deduplicate(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[[0, self.config.llm.num_heads]] if ".qk_norm." in name else tensor

    def _expand(self, name: str, leaf: torch.Tensor) -> torch.Tensor:
        if ".qk_norm." not in name:
            return leaf
        heads = (self.config.llm.num_heads, self.config.llm.num_kv_heads)
        return torch.cat([row.expand(count, -1) for row, count in zip(leaf, heads, strict=True)])

    def _gradient(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The gradient in the shape of the model's tensor; of repeated rows, the first has the whole gradient."""
        gradient = self.leaves[name].grad
        gradient = torch.zeros_like(self.leaves[name]) if gradient is None else gradient
        if ".qk_norm." not in name:
            return gradient
        rows = gradient.new_zeros(like.shape)
        rows[[0, self.config.llm.num_heads]] = gradient
        return rows
