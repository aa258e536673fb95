"""Conformance of a training step: a recorded packed batch forward and backward through the runtime's ops."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from bagel_rt.conformance.compare import TOLERANCE, Comparison, agree, compare
from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.embed import patchify, position_ids
from bagel_rt.models.bagel.images import image_to_tensor, to_rgb
from bagel_rt.runtime.plan import Plan, visibility
from bagel_rt.train.batch import TrainingBatch
from bagel_rt.train.objective import encode_padded, latent_tokens, training_losses
from bagel_rt.train.parameters import Parameters

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


@torch.inference_mode(False)
@torch.enable_grad()
def run_training_case(bagel, pack: Path, case: Path) -> list[Comparison]:
    """Run a recorded training step; compare mask, hidden states, per-token losses, losses and gradients."""
    meta, golden = json.loads((case / "meta.json").read_text("utf-8")), load_file(case / "tensors.safetensors")
    packing, inputs = meta["packing"], meta["inputs"]
    parameters = Parameters(bagel.model)
    model, config = parameters.model(), bagel.model.config
    for_vae, for_vit = _images(config, pack, packing["samples"])
    grids = [tuple(side // config.latent_stride for side in picture.shape[1:]) for picture in for_vae]
    patches = [patchify(pixels, config.vit.patch_size) for pixels in for_vit]
    batch = _batch(golden, packing, patches)
    plan = batch.plan()
    with torch.no_grad():
        padded = encode_padded(model, for_vae, golden["vae_eps"])
    latents = latent_tokens(padded, grids, config.latent_patch_size)
    losses = training_losses(model, batch, latents, golden["flow_noise"], inputs["timestep_shift"])
    total = inputs["ce_weight"] * losses.ce + inputs["mse_weight"] * losses.mse
    total.backward()
    gradients = parameters.official_gradients()

    patch = config.vit.patch_size
    grids_vit = [(pixels.shape[1] // patch, pixels.shape[2] // patch) for pixels in for_vit]
    every = -(-len(batch) // len(golden["last_hidden_rows"]))  # a pack stores every 7th row, or every 11th
    found = {
        "batch.packed_vit_position_ids": _ids(config, grids_vit, config.vit.max_patches_per_side),
        "batch.packed_latent_position_ids": _ids(config, grids, config.max_latent_size),
        "padded_latent": padded,
        "mask_packed": torch.from_numpy(np.packbits(sequence_mask(plan), axis=1)),
        "last_hidden_rows": losses.last_hidden[::every],
        "ce_per_token": losses.ce_per_token,
        "mse_per_token_channel_mean": losses.mse_per_token,
        **{f"grad.{name}": gradient for name, gradient in gradients.items() if f"grad.{name}" in golden},
    }
    results = [compare(name, tensor, golden[name]) for name, tensor in found.items()]
    scalars = {
        "ce": losses.ce,
        "mse": losses.mse,
        "total": total,
        "ce_reweighted": losses.ce_reweighted,
        "num_ce_tokens": torch.tensor(len(losses.ce_per_token)),
        "num_mse_tokens": torch.tensor(len(losses.mse_per_token)),
    }
    for name, want in meta["losses"].items():
        got = scalars.get(name)
        results.append(compare(f"losses.{name}", torch.empty(0) if got is None else got, torch.tensor(want)))
    results += _compare_norms(gradients, meta["grad_norms"])
    left = sorted(name for name in set(golden) - {*found, "vae_eps", "flow_noise"} if not name.startswith("batch."))
    return results + [Comparison(name, 1.0, TOLERANCE, False, "recorded, but nothing computes it") for name in left]


def sequence_mask(plan: Plan) -> np.ndarray:
    """The dense mask of a training plan in the order of the batch, bool [L, L]: row q sees row k."""
    inverse = np.argsort(plan.order)
    return visibility(plan)[inverse][:, plan.slots[inverse]]


def _compare_norms(gradients: dict[str, torch.Tensor], recorded: dict[str, float | None]) -> list[Comparison]:
    """Norm of every parameter's gradient, relative to the recorded one.

    A norm that is nothing beside the largest is relative to a millionth of that: a key's bias has no gradient, because
    it adds the same to all scores of a softmax, and what was recorded of it is rounding.
    """
    norms = {name: norm for name, norm in recorded.items() if norm is not None}  # the others are not trained
    least = max(norms.values()) * 1e-6
    results = [agree("parameters with a gradient", sorted(gradients), sorted(norms))]
    for name in sorted(gradients.keys() & norms.keys()):
        error = abs(float(gradients[name].norm()) - norms[name]) / max(norms[name], least)
        tolerance = TOLERANCE if norms[name] > least else 1.0
        results.append(Comparison(f"grad_norms.{name}", error, tolerance, error <= tolerance))
    return results


def _images(config: BagelConfig, pack: Path, samples: list[dict]) -> tuple[list, list]:
    """Pixels [3, H, W] for the autoencoder and for the ViT, in packing order, each resized from the original."""

    def resized(rule, letter):
        return rule.resize(to_rgb(Image.open(pack / "images" / f"{letter}.png")))

    letters = [_PICTURES[sample["name"]] for sample in samples]
    for_vae = [image_to_tensor(resized(config.vae_transform, letter)) for vae, _ in letters for letter in vae]
    for_vit = [image_to_tensor(resized(config.vit_transform, letter)) for _, vit in letters for letter in vit]
    return for_vae, for_vit


def _batch(golden: dict, packing: dict, patches: list) -> TrainingBatch:
    """The recorded batch, without the padding that closes it."""
    samples = len(packing["samples"])
    splits = int(np.searchsorted(np.cumsum(packing["split_lens_with_pad"]), packing["sequence_length"])) + 1
    return TrainingBatch(
        sample_lens=packing["sample_lens_with_pad"][:samples],
        split_lens=packing["split_lens_with_pad"][:splits],
        attn_modes=packing["attn_modes_with_pad"][:splits],
        packed_vit_tokens=torch.cat(patches),
        vit_token_seqlens=golden["batch.vit_token_seqlens"].tolist(),
        packed_timesteps=golden["batch.packed_timesteps"],
        ce_loss_weights=golden.get("batch.ce_loss_weights"),
        **{name: golden[f"batch.{name}"].long() for name in _INTEGERS},
    )


def _ids(config: BagelConfig, grids: list[tuple[int, int]], side: int) -> torch.Tensor:
    return torch.cat([position_ids(*grid, side, config.interpolate_pos) for grid in grids])
