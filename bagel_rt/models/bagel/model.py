"""BAGEL on one device: weights, transformer, vision tower and autoencoder behind the few calls a runtime makes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bagel_rt.checkpoint.read import WeightSlot, check_weights, find_weights, load_weights
from bagel_rt.errors import CheckpointError
from bagel_rt.kernels import decode_linear
from bagel_rt.models.bagel.autoencoder import AutoEncoder
from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.embed import position_ids, time_embedding
from bagel_rt.models.bagel.transformer import Rows, Transformer, rope_tables
from bagel_rt.models.bagel.vision import connect, vision_tower
from bagel_rt.models.bagel.weights import BagelWeights
from bagel_rt.runtime.plan import Plan
from bagel_rt.runtime.slots import KVCache

# Recomputed by rotary code, or state of a trainer: harmless leftovers that official-format files may carry.
IGNORED_TENSORS = ("*.rotary_emb.inv_freq", "*.position_ids")


class BagelModel:
    """The network of one checkpoint.

    Attributes:
        config: the checkpoint's configuration.
        weights: every tensor of ``ema.safetensors``, fused and paired.
        transformer: the decoder stack over packed rows.
        vae: the FLUX autoencoder, in float32 as published; None where pictures are neither encoded nor decoded here.
        markers: token ids of the start and end of an image; None until they are known.
    """

    def __init__(
        self, config: BagelConfig, weights: BagelWeights, vae: AutoEncoder | None, markers: tuple[int, int] | None
    ):
        self.config = config
        self.weights = weights
        self.transformer = Transformer(config.llm, weights.layers, weights.norm)
        self.vae = vae
        self.markers = markers
        self.device = weights.embed_tokens.device
        self.dtype = weights.embed_tokens.dtype
        self._rope_table: torch.Tensor | None = None

    @classmethod
    def allocate(cls, config: BagelConfig, markers: tuple[int, int], device, dtype) -> "BagelModel":
        """A model of uninitialised weights."""
        with torch.device("meta"):
            vae = AutoEncoder(config.vae)
        vae = vae.to_empty(device=device).requires_grad_(False)  # float32 whatever the model's dtype, as officially
        return cls(config, BagelWeights.allocate(config, device, dtype), vae, markers)

    @classmethod
    def from_folder(
        cls, folder: str | Path, config: BagelConfig, markers: tuple[int, int], device, dtype, progress: bool = False
    ) -> "BagelModel":
        """Read ``ema.safetensors`` and ``ae.safetensors`` (or their shards) of an official checkpoint folder.

        Raises:
            CheckpointError: a file or tensor is missing, left over, corrupt or of the wrong shape.
        """
        files, problems = {}, []
        for stem, places in cls.allocate(config, markers, "meta", dtype).destinations().items():
            try:  # before anything of the configuration's size exists
                files[stem] = find_weights(folder, stem)
                check_weights(files[stem], places, IGNORED_TENSORS)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError("\n".join(problems))
        model = cls.allocate(config, markers, device, dtype)
        for stem, places in model.destinations().items():
            load_weights(files[stem], places, IGNORED_TENSORS, progress)
        return model

    def destinations(self) -> dict[str, dict[str, WeightSlot]]:
        """File stem ("ema", "ae") -> official tensor name -> where it is stored."""
        autoencoder = {name: WeightSlot(p.data, tuple(p.shape)) for name, p in self.vae.named_parameters()}
        return {"ema": self.weights.destinations(self.config), "ae": autoencoder}

    def make_cache(self, slots: int = 0) -> KVCache:
        """An empty KV cache of this model's shape."""
        llm = self.config.llm
        return KVCache(llm.num_layers, llm.num_kv_heads, llm.head_dim, self.dtype, self.device, slots)

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [n] -> [n, H]."""
        return F.embedding(ids, self.weights.embed_tokens)

    def embed_markers(self) -> torch.Tensor:
        """The start-of-image and end-of-image rows, [2, H]."""
        return self.embed_tokens(torch.tensor(self.markers, device=self.device))

    def embed_patches(self, images: Sequence[tuple[torch.Tensor, int, int]]) -> torch.Tensor:
        """Images as (patches [rows * columns, features], rows, columns) -> their ViT tokens [sum n, H], packed."""
        side = self.config.vit.max_patches_per_side
        ids = torch.cat([position_ids(r, c, side, self.config.interpolate_pos) for _, r, c in images]).to(self.device)
        patches = torch.cat([patches for patches, _, _ in images]).to(self.device, self.dtype)
        lengths = [rows * columns for _, rows, columns in images]
        tokens = vision_tower(self.weights.vit, self.config.vit, patches, ids, lengths)
        return connect(self.weights.connector, tokens) + self.weights.vit_positions[ids]

    def latent_positions(self, rows: int, columns: int) -> torch.Tensor:
        """The constant part of a latent grid's embedding, position plus projection bias, [rows * columns, H]."""
        ids = position_ids(rows, columns, self.config.max_latent_size, self.config.interpolate_pos)
        return self.weights.latent_positions[ids.to(self.device)] + self.weights.vae2llm.bias

    def time_embedding(self, t: torch.Tensor) -> torch.Tensor:
        """Timesteps float32 [n] in [0, 1] -> [n, H]."""
        return time_embedding(self.weights.time_embedder, t)

    def embed_latents(self, latents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Latent tokens [n, features] -> [n, H]; ``positions`` [n, H] are :meth:`latent_positions` plus the time's."""
        return torch.addmm(positions, latents.to(self.dtype), self.weights.vae2llm.weight.t())

    def rows(self, plan: Plan, positions: np.ndarray) -> Rows:
        """Put a plan on the device.

        Args:
            plan: as built from segments.
            positions: [T] RoPE positions in segment order.
        """
        ordered = torch.from_numpy(np.asarray(positions, dtype=np.int64)[plan.order])
        cos, sin = self.rope(ordered)
        slots, limits, blocks = (torch.from_numpy(a).to(self.device) for a in (plan.slots, plan.limits, plan.blocks))
        return Rows(plan.G, cos, sin, slots, limits, blocks)

    def rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary tables cos, sin float32 [T, head_dim / 2] of positions [T]."""
        return rope_tables(positions.to(self.device), self.config.llm.head_dim, self.config.llm.rope_theta)

    def rope_table(self, positions: int) -> torch.Tensor:
        """Rotary tables (cos, sin) of positions 0, 1, ..., float32 [2, P, head_dim / 2], P at least ``positions``.

        One tensor for the model's life: captured steps read it. P is the model's ``max_position_embeddings``.

        Raises:
            ValueError: more positions than the model has.
        """
        most = self.config.llm.max_position_embeddings
        if positions > most:
            raise ValueError(f"a text reaches position {positions}, the model has {most}: lower max_think_token_n")
        if self._rope_table is None:
            self._rope_table = torch.stack(self.rope(torch.arange(most)))
        return self._rope_table

    def velocity(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states of generation rows [n, H] (before the final norm) -> velocity [n, features]."""
        return F.linear(self.transformer.final_norm(hidden, hidden.shape[0]), *self.weights.llm2vae)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states of understanding rows [n, H] (before the final norm) -> logits [n, vocab]."""
        norm = self.weights.norm.und
        return decode_linear(hidden, self.weights.lm_head, norm=norm, eps=self.config.llm.rms_norm_eps)
