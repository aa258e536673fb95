"""Cases of a training step: forward and backward of a recorded packed batch through the runtime's ops."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from bagel_rt.conformance.compare import TOLERANCE, Comparison, Meta, Tensors, compare_tensors, compare_values
from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.embed import patchify, position_ids
from bagel_rt.models.bagel.images import ResizeRule, image_to_tensor, official_rgb
from bagel_rt.pipeline import Bagel
from bagel_rt.runtime.plan import Plan, visibility
from bagel_rt.train.batch import TrainingBatch
from bagel_rt.train.objective import encode_padded, latent_tokens, training_losses
from bagel_rt.train.parameters import Parameters

# Sample name -> letters of its images for the autoencoder and for the ViT, in packing order. The pack lists these in
# prose only.
_SAMPLE_IMAGES = {
    "text_to_image": ("a", ""),
    "edit_chain": ("baac", "ba"),
    "vlm_sft": ("", "a"),
    "edit_all_conditions_dropped": ("c", ""),
    "edit_vit_dropped": ("ac", ""),
    "video_frames_one_split": ("aca", ""),
    "clean_video_then_image": ("caa", ""),
}
_INTEGER_TENSORS = (
    "packed_position_ids", "packed_text_indexes", "packed_text_ids", "packed_vit_token_indexes",
    "packed_vit_position_ids", "packed_vae_token_indexes", "packed_latent_position_ids", "ce_loss_indexes",
    "packed_label_ids", "mse_loss_indexes",
)  # fmt: skip


@torch.inference_mode(False)
@torch.enable_grad()
def run_training_case(bagel: Bagel, pack: Path, case: Path) -> list[Comparison]:
    """Run a recorded training step; compare the mask, hidden states, per-token losses, losses and gradients."""
    meta, golden = json.loads((case / "meta.json").read_text("utf-8")), load_file(case / "tensors.safetensors")
    packing, inputs = meta["packing"], meta["inputs"]
    parameters = Parameters(bagel.model)
    model, config = parameters.model(), bagel.model.config
    for_vae, for_vit = _load_pixels(config, pack, packing["samples"])
    latent_grids = [config.latent_grid((pixels.shape[1], pixels.shape[2])) for pixels in for_vae]
    patches = [patchify(pixels, config.vit.patch_size) for pixels in for_vit]
    batch = _make_batch(golden, packing, patches)
    plan = batch.plan()
    with torch.no_grad():
        padded = encode_padded(model, for_vae, golden["vae_eps"])
    latents = latent_tokens(padded, latent_grids, config.latent_patch_size)
    losses = training_losses(model, batch, latents, golden["flow_noise"], inputs["timestep_shift"])
    total = inputs["ce_weight"] * losses.ce + inputs["mse_weight"] * losses.mse
    total.backward()
    gradients = parameters.official_gradients()

    patch = config.vit.patch_size
    vit_grids = [(pixels.shape[1] // patch, pixels.shape[2] // patch) for pixels in for_vit]
    tensors = {
        "batch.packed_vit_position_ids": _position_ids(config, vit_grids, config.vit.max_patches_per_side),
        "batch.packed_latent_position_ids": _position_ids(config, latent_grids, config.max_latent_size),
        "padded_latent": padded,
        "mask_packed": torch.from_numpy(np.packbits(sequence_mask(plan), axis=1)),
        "last_hidden_rows": every_nth_row(losses.last_hidden.detach(), golden["last_hidden_rows"]),
        "ce_per_token": losses.ce_per_token,
        "mse_per_token_channel_mean": losses.mse_per_token,
        **{f"grad.{name}": gradient for name, gradient in gradients.items() if f"grad.{name}" in golden},
    }
    comparisons = [compare_tensors(name, tensor, golden[name]) for name, tensor in tensors.items()]
    scalars = {
        "ce": losses.ce,
        "mse": losses.mse,
        "total": total,
        "ce_reweighted": losses.ce_reweighted,
        "num_ce_tokens": torch.tensor(len(losses.ce_per_token)),
        "num_mse_tokens": torch.tensor(len(losses.mse_per_token)),
    }
    absent = torch.empty(0)
    for name, recorded in meta["losses"].items():
        comparisons.append(compare_tensors(f"losses.{name}", scalars.get(name, absent), torch.tensor(recorded)))
    comparisons += _compare_norms(gradients, meta["grad_norms"])
    for name in sorted(set(golden) - {*tensors, "vae_eps", "flow_noise"}):
        if not name.startswith("batch."):
            comparisons.append(Comparison(name, 1.0, TOLERANCE, False, "recorded, but not computed"))
    return comparisons


def every_nth_row(rows: torch.Tensor, recorded: torch.Tensor) -> torch.Tensor:
    """Every n-th row, for the n with which as many remain as were recorded.

    The pack does not say n. If several are possible, it is the one whose rows are closest to the recorded ones.
    """
    candidates = [rows[::n] for n in range(1, len(rows) + 1) if -(-len(rows) // n) == len(recorded)]
    if not candidates:
        return rows
    return min(candidates, key=lambda candidate: float((candidate.cpu() - recorded).abs().max()))


def sequence_mask(plan: Plan) -> np.ndarray:
    """The dense attention mask of a training plan, in sequence order: bool [L, L], entry (q, k) if row q sees row k."""
    inverse = np.argsort(plan.order)
    return visibility(plan)[inverse][:, plan.slots[inverse]]


def _compare_norms(gradients: dict[str, torch.Tensor], recorded: dict[str, float | None]) -> list[Comparison]:
    """Compare the norm of every parameter's gradient, relative to the recorded norm.

    Norms below a millionth of the largest are rounding noise and only have to stay that small. A key bias, for example,
    has no gradient: it adds the same number to all scores of a softmax.
    """
    norms = {name: norm for name, norm in recorded.items() if norm is not None}  # None: not trained
    noise_level = max(norms.values()) * 1e-6
    comparisons = [compare_values("parameters with a gradient", sorted(gradients), sorted(norms))]
    for name in sorted(gradients.keys() & norms.keys()):
        error = abs(float(gradients[name].norm()) - norms[name]) / max(norms[name], noise_level)
        tolerance = TOLERANCE if norms[name] > noise_level else 1.0
        comparisons.append(Comparison(f"grad_norms.{name}", error, tolerance, error <= tolerance))
    return comparisons


def _load_pixels(config: BagelConfig, pack: Path, samples: list[Meta]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pixels [3, H, W] for the autoencoder and for the ViT, in packing order, each resized from the original."""

    def resized(rule: ResizeRule, letter: str) -> Image.Image:
        return rule.resize(official_rgb(Image.open(pack / "images" / f"{letter}.png")))

    letters = [_SAMPLE_IMAGES[sample["name"]] for sample in samples]
    for_vae = [image_to_tensor(resized(config.vae_transform, letter)) for vae, _ in letters for letter in vae]
    for_vit = [image_to_tensor(resized(config.vit_transform, letter)) for _, vit in letters for letter in vit]
    return for_vae, for_vit


def _make_batch(golden: Tensors, packing: Meta, patches: list[torch.Tensor]) -> TrainingBatch:
    """The recorded batch, without the padding at its end."""
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
        **{name: golden[f"batch.{name}"].long() for name in _INTEGER_TENSORS},
    )


def _position_ids(config: BagelConfig, grids: list[tuple[int, int]], max_side: int) -> torch.Tensor:
    return torch.cat([position_ids(*grid, max_side, config.interpolate_pos) for grid in grids])
