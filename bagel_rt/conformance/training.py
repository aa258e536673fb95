"""Conformance of the training forward: a recorded packed batch through the runtime's packed forward."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from bagel_rt.config import BagelConfig
from bagel_rt.conformance.compare import TOLERANCE, Comparison, compare
from bagel_rt.conversation import encode_patches
from bagel_rt.images import image_to_tensor, to_rgb
from bagel_rt.models.bagel.embed import position_ids
from bagel_rt.plan import Plan, visibility
from bagel_rt.training import TrainingBatch, encode_padded, latent_tokens, training_losses

# Sample name -> its pictures: the letters of those the autoencoder encodes and of those the ViT sees, in packing order.
# A pack records which pictures a batch was made of in prose only.
_PICTURES = {
    "text_to_image": ("a", ""),
    "edit_chain": ("baac", "ba"),
    "vlm_sft": ("", "a"),
    "edit_all_conditions_dropped": ("c", ""),
    "edit_vit_dropped": ("ac", ""),
    "video_frames_one_split": ("aca", ""),
    "clean_video_then_image": ("caa", ""),
}
_INTEGERS = (
    "packed_position_ids", "packed_text_indexes", "packed_text_ids", "packed_vit_token_indexes",
    "packed_vit_position_ids", "packed_vae_token_indexes", "packed_latent_position_ids", "ce_loss_indexes",
    "packed_label_ids", "mse_loss_indexes",
)  # fmt: skip


@torch.inference_mode()
def run_training_case(bagel, pack: Path, case: Path) -> list[Comparison]:
    """Run the forward of a recorded training step; compare mask, hidden states, per-token losses and losses.

    Recorded gradients are listed as not compared.
    """
    meta, golden = json.loads((case / "meta.json").read_text("utf-8")), load_file(case / "tensors.safetensors")
    model, packing, inputs = bagel.model, meta["packing"], meta["inputs"]
    config = model.config
    for_vae, for_vit = _pictures(config, pack, packing["samples"])
    grids = [tuple(side // config.latent_stride for side in picture.shape[1:]) for picture in for_vae]
    batch = _batch(golden, packing, for_vit)
    plan = batch.plan()
    padded = encode_padded(model, for_vae, golden["vae_eps"])
    latents = latent_tokens(padded, grids, config.latent_patch_size)
    losses = training_losses(model, batch, latents, golden["flow_noise"], inputs["timestep_shift"])

    patches = [(content.rows, content.columns) for content in for_vit]
    every = -(-len(batch) // len(golden["last_hidden_rows"]))  # a pack stores every 7th row, or every 11th
    found = {
        "batch.packed_vit_position_ids": _ids(config, patches, config.vit.max_patches_per_side),
        "batch.packed_latent_position_ids": _ids(config, grids, config.max_latent_size),
        "padded_latent": padded,
        "mask_packed": torch.from_numpy(np.packbits(sequence_mask(plan), axis=1)),
        "last_hidden_rows": losses.last_hidden[::every],
        "ce_per_token": losses.ce_per_token,
        "mse_per_token_channel_mean": losses.mse_per_token,
    }
    results = [compare(name, tensor, golden[name]) for name, tensor in found.items()]
    scalars = {
        "ce": losses.ce,
        "mse": losses.mse,
        "total": inputs["ce_weight"] * losses.ce + inputs["mse_weight"] * losses.mse,
        "ce_reweighted": losses.ce_reweighted,
        "num_ce_tokens": torch.tensor(len(losses.ce_per_token)),
        "num_mse_tokens": torch.tensor(len(losses.mse_per_token)),
    }
    for name, want in meta["losses"].items():
        got = scalars.get(name)
        results.append(compare(f"losses.{name}", torch.empty(0) if got is None else got, torch.tensor(want)))
    return results + _not_compared(golden, meta, {*found, "vae_eps", "flow_noise"})


def sequence_mask(plan: Plan) -> np.ndarray:
    """The dense mask of a training plan in the order of the batch, bool [L, L]: row q sees row k."""
    inverse = np.argsort(plan.order)
    return visibility(plan)[inverse][:, plan.slots[inverse]]


def _not_compared(golden: dict, meta: dict, used: set[str]) -> list[Comparison]:
    """Lines for what was recorded and not looked at: gradients with the reason, anything else as a failure."""
    reason = "not compared: gradients come with training"
    results = []
    for name in sorted(set(golden) - used):
        if name.startswith("grad."):
            results.append(Comparison(name, math.nan, TOLERANCE, True, reason))
        elif not name.startswith("batch."):
            results.append(Comparison(name, 1.0, TOLERANCE, False, "recorded, but nothing computes it"))
    if "grad_norms" in meta:
        name = f"grad_norms of {len(meta['grad_norms'])} parameters"
        results.append(Comparison(name, math.nan, TOLERANCE, True, reason))
    return results


def _pictures(config: BagelConfig, pack: Path, samples: list[dict]) -> tuple[list, list]:
    """The autoencoder's pictures [3, H, W] and the ViT's patches, in packing order, each resized from the original."""

    def resized(rule, letter):
        return rule.resize(to_rgb(Image.open(pack / "images" / f"{letter}.png")))

    letters = [_PICTURES[sample["name"]] for sample in samples]
    for_vae = [image_to_tensor(resized(config.vae_transform, letter)) for vae, _ in letters for letter in vae]
    for_vit = [encode_patches(config, resized(config.vit_transform, letter)) for _, vit in letters for letter in vit]
    return for_vae, for_vit


def _batch(golden: dict, packing: dict, for_vit: list) -> TrainingBatch:
    """The recorded batch, without the padding that closes it."""
    samples = len(packing["samples"])
    splits = int(np.searchsorted(np.cumsum(packing["split_lens_with_pad"]), packing["sequence_length"])) + 1
    return TrainingBatch(
        sample_lens=packing["sample_lens_with_pad"][:samples],
        split_lens=packing["split_lens_with_pad"][:splits],
        attn_modes=packing["attn_modes_with_pad"][:splits],
        packed_vit_tokens=torch.cat([content.patches for content in for_vit]),
        vit_token_seqlens=golden["batch.vit_token_seqlens"].tolist(),
        packed_timesteps=golden["batch.packed_timesteps"],
        ce_loss_weights=golden.get("batch.ce_loss_weights"),
        **{name: golden[f"batch.{name}"].long() for name in _INTEGERS},
    )


def _ids(config: BagelConfig, grids: list[tuple[int, int]], side: int) -> torch.Tensor:
    return torch.cat([position_ids(*grid, side, config.interpolate_pos) for grid in grids])
