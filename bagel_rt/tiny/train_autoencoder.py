"""The small autoencoder of the world of shapes: from pictures to a file of weights and the numbers that go with it."""

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
from bagel_rt.tiny.examples import Example
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

_PICTURES = 4  # that run together: more leave a CPU's cache
# (pictures, pixels of their sides) of a step, all equally likely. Small squares are all colours and edges, and teach
# the most; but one thing on a wide ground moves the statistics of GroupNorm, and is learnt from whole scenes only.
_EARLY = ((8, 32), (8, 32), (8, 32), (8, 32), (4, 64), (4, 64), (1, SIDE))
_LATE = ((4, 64), (1, SIDE), (1, SIDE), (1, SIDE))


def train_autoencoder(
    folder: Path,
    config: VAEConfig,
    settings: AutoencoderSettings,
    measured: int,
    seconds: float | None = None,
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> bool:
    """Train, or go on training; at the end write ``ae.safetensors`` and ``ae.json``.

    Args:
        folder: of the run.
        config: the shape.
        settings: of the run.
        measured: pictures that it is measured on in the end.
        seconds: after which it stops and can be resumed.
        progress: show a bar on stderr.
        device: that it is trained on.

    Returns:
        Whether it is done.
    """
    if (folder / "ae.json").exists():
        return True
    trainer = AutoencoderTrainer(config, draw_pictures, settings, folder, device)
    if not trainer.run(seconds, progress):
        return False
    model = trainer.averaged().half().float()  # what is measured is what will be loaded
    save_autoencoder(model, folder / "ae.safetensors")
    figures = measure_latents(model, measured) | check_reconstructions(model, measured)
    with atomic_write(folder / "ae.json") as file:
        file.write(json.dumps(figures, indent=2).encode())
    return True


def save_autoencoder(model: AutoEncoder, file: Path) -> None:
    """Write the weights in float16: half the bytes, and eight times as precise as bfloat16."""
    tensors = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    with atomic_write(file) as partial:
        partial.write(save(tensors, {"format": "pt"}))


def load_autoencoder(folder: Path, config: VAEConfig) -> AutoEncoder:
    """What :func:`train_autoencoder` wrote, with the scale and shift that it measured; float32, without gradients."""
    measured = json.loads((folder / "ae.json").read_text())
    model = AutoEncoder(replace(config, **{name: measured[name] for name in ("scale_factor", "shift_factor")}))
    model.load_state_dict(load_file(folder / "ae.safetensors"))
    return model.requires_grad_(False)


@torch.inference_mode()
def measure_latents(model: AutoEncoder, count: int) -> dict[str, float]:
    """``scale_factor`` and ``shift_factor`` with which the latents of so many pictures have mean 0 and deviation 1."""
    noise, samples = torch.Generator().manual_seed(1), []
    for pixels in _pictures("train", count)[1]:
        samples.append(sample_posterior(*model.moments(pixels), noise).double())
    latents = torch.cat(samples)
    return {"scale_factor": 1 / latents.std().item(), "shift_factor": latents.mean().item()}


@torch.inference_mode()
def check_reconstructions(model: AutoEncoder, count: int) -> dict[str, float]:
    """How well so many pictures of the test split are reconstructed.

    Returns:
        ``psnr``, in dB of the mean squared error; ``agreement``, the share of reconstructions in which the judge sees
        the scene as it is.
    """
    noise, squares, right = torch.Generator().manual_seed(2), [], 0
    scenes, pictures = _pictures("test", count)
    scenes = iter(scenes)
    for pixels in pictures:
        found = model.decoder(sample_posterior(*model.moments(pixels), noise)).clamp(-1, 1)
        squares.append((found - pixels).square().mean((1, 2, 3)) / 4)  # of the range [0, 1]
        right += sum(resembles(tensor_to_image(picture), next(scenes)) for picture in found)
    return {"psnr": -10 * torch.cat(squares).mean().log10().item(), "agreement": right / count}


def resembles(picture, scene: Scene) -> bool:
    """Whether the judge sees in a picture what is in the scene."""
    groups = tuple(claim_group(group, at=True) for group in groups_of(scene.things))
    claims = Claims(groups, background=scene.background)
    return judge(Example("generate", "", None, scene, None, claims), picture).correct


def draw_pictures(rng: np.random.Generator, done: float) -> list[Image.Image]:
    """The pictures of a step: squares cut out around things, half of them of crowds; or, more often later, a scene.

    Args:
        rng: of the step.
        done: share of the steps that are done.
    """
    count, side = pick(rng, _EARLY if done < 0.3 else _LATE)
    if side == SIDE:
        return [render(scene_of("train", rng), SIDE) for _ in range(count)]
    return [_cut(rng, crowd(rng) if rng.random() < 0.5 else scene_of("train", rng), side) for _ in range(count)]


def _cut(rng: np.random.Generator, scene: Scene, side: int) -> Image.Image:
    """A square of so many pixels that holds the centre of one of the things, but not at its edge."""
    thing = pick(rng, scene.things)
    corner = [round(at * SIDE - (0.1 + 0.8 * rng.random()) * side) for at in (thing.x, thing.y)]
    left, top = (min(max(at, 0), SIDE - side) for at in corner)
    return render(scene, SIDE).crop((left, top, left + side, top + side))


def crowd(rng: np.random.Generator) -> Scene:
    """Many things anywhere, one over the other. No scene of the world, but full of colours, edges and corners: from
    as many pixels the autoencoder learns ten times as fast."""
    things = [
        Thing(pick(rng, SHAPES), pick(rng, list(COLORS)), pick(rng, list(SIZES)), rng.random(), rng.random())
        for _ in range(int(rng.integers(4, 25)))
    ]
    return Scene(pick(rng, list(BACKGROUNDS)), tuple(things))


def scene_of(split: str, rng: np.random.Generator) -> Scene:
    """A random scene of a split."""
    while split_of(scene := draw_scene(rng)) != split:
        pass
    return scene


def _pictures(split: str, count: int) -> tuple[list[Scene], list[torch.Tensor]]:
    """Scenes, and their pixels [_PICTURES, 3, H, W] at a time."""
    rng = np.random.default_rng(count)
    scenes = [scene_of(split, rng) for _ in range(count)]
    pixels = [image_to_tensor(render(scene)) for scene in scenes]
    return scenes, [torch.stack(pixels[first : first + _PICTURES]) for first in range(0, count, _PICTURES)]
