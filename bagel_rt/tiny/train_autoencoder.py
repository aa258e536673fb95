"""Training and evaluation of the small autoencoder on images of the world of shapes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save

from bagel_rt.files import atomic_write
from bagel_rt.models.bagel.autoencoder import AutoEncoder
from bagel_rt.models.bagel.config import VAEConfig
from bagel_rt.models.bagel.images import image_to_tensor, tensor_to_image
from bagel_rt.tiny.claims import Claims, claim_group
from bagel_rt.tiny.judge import judge
from bagel_rt.tiny.model import SIDE
from bagel_rt.tiny.render import render
from bagel_rt.tiny.scene import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    draw_scene,
    groups_of,
    pick,
    split_of,
)
from bagel_rt.train.autoencoder import AutoencoderSettings, AutoencoderTrainer, sample_posterior

_IMAGE_BATCH = 4  # images per forward; larger batches exceed the CPU cache
# (number of images, their side in pixels) of a step, uniformly drawn. Small crops have many colors and edges and are
# the most efficient to learn from. But GroupNorm statistics depend on the area of the background, so whole scenes are
# needed too.
_EARLY = ((8, 32), (8, 32), (8, 32), (8, 32), (4, 64), (4, 64), (1, SIDE))
_LATE = ((4, 64), (1, SIDE), (1, SIDE), (1, SIDE))


def train_autoencoder(
    folder: Path,
    config: VAEConfig,
    settings: AutoencoderSettings,
    eval_images: int,
    seconds: float | None = None,
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> bool:
    """Train the autoencoder, or resume training. At the end, write ``ae.safetensors`` and ``ae.json``.

    Args:
        folder: the folder of the run.
        config: the architecture.
        settings: the training settings.
        eval_images: number of images to measure latents and reconstructions on.
        seconds: time limit; a later call resumes.
        progress: show a progress bar on stderr.
        device: the device to train on.

    Returns:
        Whether training is complete.
    """
    if (folder / "ae.json").exists():
        return True
    trainer = AutoencoderTrainer(config, draw_images, settings, folder, device)
    if not trainer.run(seconds, progress):
        return False
    model = trainer.averaged().half().float()  # measure the weights as stored, in float16
    save_autoencoder(model, folder / "ae.safetensors")
    figures = measure_latents(model, eval_images) | evaluate_reconstructions(model, eval_images)
    with atomic_write(folder / "ae.json") as file:
        file.write(json.dumps(figures, indent=2).encode())
    return True


def save_autoencoder(model: AutoEncoder, file: Path) -> None:
    """Write the weights in float16: half the size of float32, and eight times the precision of bfloat16."""
    tensors = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    with atomic_write(file) as partial:
        partial.write(save(tensors, {"format": "pt"}))


def load_autoencoder(folder: Path, config: VAEConfig) -> AutoEncoder:
    """Load the result of :func:`train_autoencoder`, with measured scale and shift; float32, without gradients."""
    figures = json.loads((folder / "ae.json").read_text())
    model = AutoEncoder(replace(config, **{name: figures[name] for name in ("scale_factor", "shift_factor")}))
    model.load_state_dict(load_file(folder / "ae.safetensors"))
    return model.requires_grad_(False)


@torch.inference_mode()
def measure_latents(model: AutoEncoder, count: int) -> dict[str, float]:
    """The ``scale_factor`` and ``shift_factor`` that normalize the latents of ``count`` images to mean 0 and std 1."""
    noise = torch.Generator().manual_seed(1)
    batches = _images("train", count)[1]
    latents = torch.cat([sample_posterior(*model.moments(pixels), noise).double() for pixels in batches])
    return {"scale_factor": 1 / latents.std().item(), "shift_factor": latents.mean().item()}


@torch.inference_mode()
def evaluate_reconstructions(model: AutoEncoder, count: int) -> dict[str, float]:
    """Measure the reconstructions of ``count`` images of the test split.

    Returns:
        ``psnr``, in dB of the mean squared error; ``agreement``, the share of reconstructions that the judge accepts.
    """
    noise, errors, correct = torch.Generator().manual_seed(2), [], 0
    scenes, images = _images("test", count)
    remaining = iter(scenes)
    for pixels in images:
        decoded = model.decoder(sample_posterior(*model.moments(pixels), noise)).clamp(-1, 1)
        errors.append((decoded - pixels).square().mean((1, 2, 3)) / 4)  # in the range [0, 1] of pixels
        correct += sum(depicts(tensor_to_image(image), next(remaining)) for image in decoded)
    return {"psnr": -10 * torch.cat(errors).mean().log10().item(), "agreement": correct / count}


def depicts(image: Image.Image, scene: Scene) -> bool:
    """Whether the judge accepts an image as the scene, with all positions."""
    groups = tuple(claim_group(group, at=True) for group in groups_of(scene.things))
    claims = Claims(groups, background=scene.background)
    return judge(claims, image).correct


def draw_images(rng: np.random.Generator, done: float) -> list[Image.Image]:
    """The images of a step: crops around things, half of them of clutter, or a whole scene, more often later.

    Args:
        rng: the generator of the step.
        done: fraction of the steps done.
    """
    count, side = pick(rng, _EARLY if done < 0.3 else _LATE)
    if side == SIDE:
        return [render(draw_split_scene("train", rng), SIDE) for _ in range(count)]
    return [
        _random_crop(rng, draw_clutter(rng) if rng.random() < 0.5 else draw_split_scene("train", rng), side)
        for _ in range(count)
    ]


def _random_crop(rng: np.random.Generator, scene: Scene, side: int) -> Image.Image:
    """A square crop that has the center of a random thing in its inner 80%."""
    thing = pick(rng, scene.things)
    corner = [round(center * SIDE - (0.1 + 0.8 * rng.random()) * side) for center in (thing.x, thing.y)]
    left, top = (min(max(start, 0), SIDE - side) for start in corner)
    return render(scene, SIDE).crop((left, top, left + side, top + side))


def draw_clutter(rng: np.random.Generator) -> Scene:
    """Draw many overlapping things at random positions.

    This is not a valid scene of the world, but it has many colors, edges and corners: per pixel, the autoencoder
    learns ten times as fast from it.
    """
    things = [
        Thing(pick(rng, SHAPES), pick(rng, list(COLORS)), pick(rng, list(SIZES)), rng.random(), rng.random())
        for _ in range(int(rng.integers(4, 25)))
    ]
    return Scene(pick(rng, list(BACKGROUNDS)), tuple(things))


def draw_split_scene(split: str, rng: np.random.Generator) -> Scene:
    """Draw a random scene of a split."""
    while split_of(scene := draw_scene(rng)) != split:
        pass
    return scene


def _images(split: str, count: int) -> tuple[list[Scene], list[torch.Tensor]]:
    """Random scenes, and their pixels in batches [_IMAGE_BATCH, 3, H, W]."""
    rng = np.random.default_rng(count)
    scenes = [draw_split_scene(split, rng) for _ in range(count)]
    pixels = [image_to_tensor(render(scene)) for scene in scenes]
    return scenes, [torch.stack(pixels[first : first + _IMAGE_BATCH]) for first in range(0, count, _IMAGE_BATCH)]
