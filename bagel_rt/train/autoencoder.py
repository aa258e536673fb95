"""Training of the autoencoder: its reconstruction is to resemble the picture, its posterior the standard normal.

loss = mean w (|y - x| + (y - x)^2) + kl * mean KL(N(mean, var) || N(0, 1)), over pixels in [-1, 1], of which those near
edges may weigh more, and latent numbers (Kingma & Welling 2014, arXiv:1312.6114; Rombach et al. 2022, arXiv:2112.10752,
without their adversary). The KL term makes the posterior as wide as the reconstruction allows: what a small model
generates is off by about as much.

Step n's pictures and noise are drawn from generators seeded with (seed, n), so that a resumed run goes on as if it had
not been stopped. Maps are bfloat16 if wanted; weights, sums of the loss and the optimizer are float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bagel_rt.models.bagel.autoencoder import AutoEncoder
from bagel_rt.models.bagel.config import VAEConfig
from bagel_rt.models.bagel.images import image_to_tensor
from bagel_rt.train.run import MOMENTS, TrainingRun, allocate_moments
from bagel_rt.validation import check_fields, checked, integer, number

DrawPictures = Callable[[np.random.Generator, float], Sequence[Image.Image]]


@dataclass(frozen=True)
class AutoencoderSettings:
    """What decides a run, beside the shape and the pictures.

    Attributes:
        steps: of the whole run.
        learning_rate: the largest; it is reached linearly in ``warmup_steps`` and falls along a cosine to 0.
        kl: weight of the KL term, in units of the mean over latent numbers.
        edges: by how much pixels near an edge weigh more than others, from the share ``edges_from`` of the steps on.
        ema: decay of the average of the weights, a step.
        clip: largest global norm of the gradient.
        seed: of the weights, the pictures and the noise.
        bfloat16: maps and gradients of maps are bfloat16.

    Raises:
        ValueError: a number out of range.
    """

    steps: int = checked(integer(1))
    learning_rate: float = checked(number(0, above=True), 1e-3)
    warmup_steps: int = checked(integer(0), 100)
    kl: float = checked(number(0), 1e-3)
    edges: float = checked(number(0), 4.0)
    edges_from: float = checked(number(0), 0.56)
    ema: float = checked(number(0, 1, below=True), 0.998)
    clip: float = checked(number(0, above=True), 1.0)
    seed: int = checked(integer(0), 0)
    bfloat16: bool = True

    def __post_init__(self):
        check_fields(self)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        return self.learning_rate * warm * (1 + np.cos(np.pi * step / self.steps)) / 2


class AutoencoderTrainer(TrainingRun):
    """The training of an autoencoder in a folder, resumed if it holds the state of one."""

    name, shown = "autoencoder", ("reconstruction", "kl")

    def __init__(
        self, config: VAEConfig, draw: DrawPictures, settings: AutoencoderSettings, folder: str | Path, device="cpu"
    ):
        """
        Args:
            config: the shape; scale and shift play no part.
            draw: makes the RGB pictures of a step, all of one size, from a generator and the share of steps done.
            settings: of the run.
            folder: made if it is not there.
            device: that it trains on.

        Raises:
            CheckpointError: the folder holds the state of a run of another shape or other settings.
        """
        super().__init__(folder, settings.steps)
        self.settings, self.draw = settings, draw
        self._configuration = f"{config} {settings}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.network = AutoEncoder(config)
            initialize_(self.network)
        self.network.to(device)
        # The weights that are trained, of which the network's are roundings, and their average; as files have them.
        self._weights = [weight.detach().contiguous().clone() for weight in self.network.parameters()]
        self._average = [weight.clone() for weight in self._weights]
        self.network.to(torch.bfloat16 if settings.bfloat16 else torch.float32)
        self._optimizer = torch.optim.AdamW(self._weights, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
        allocate_moments(self._optimizer, self._weights)
        for weight in self._weights:
            weight.grad = torch.zeros_like(weight)
        self._resume(self._optimizer)

    def averaged(self) -> AutoEncoder:
        """An autoencoder of the averaged weights, float32, without gradients."""
        model = AutoEncoder(self.network.config).requires_grad_(False)
        for weight, average in zip(model.parameters(), self._average, strict=True):
            weight.copy_(average)
        return model

    def _identity(self) -> dict:
        return {"run": self._configuration}

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors, names = {}, [name for name, _ in self.network.named_parameters()]
        for name, weight, average in zip(names, self._weights, self._average, strict=True):
            state = self._optimizer.state[weight]
            kinds = {"weight": weight, "average": average, **{kind: state[kind] for kind in MOMENTS}}
            tensors |= {f"{kind}/{name}": tensor for kind, tensor in kinds.items()}
        return tensors

    def train_step(self) -> dict[str, float]:
        settings = self.settings
        rng = np.random.default_rng((settings.seed, self.step))
        pixels = torch.stack([image_to_tensor(picture) for picture in self.draw(rng, self.step / settings.steps)]).to(
            self._weights[0].device
        )
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with torch.no_grad():
            torch._foreach_copy_(list(self.network.parameters()), self._weights)
        edges = settings.edges if self.step >= settings.edges_from * settings.steps else 0.0
        reconstruction, kl = losses(self.network, pixels, noise, edges)
        loss = reconstruction + settings.kl * kl
        self.network.zero_grad()
        loss.backward()
        torch._foreach_copy_([weight.grad for weight in self._weights], [w.grad for w in self.network.parameters()])
        torch.nn.utils.clip_grad_norm_(self._weights, settings.clip, error_if_nonfinite=True)
        self._updating = True
        self._optimizer.param_groups[0]["lr"] = settings.rate(self.step)
        self._optimizer.step()
        self.step += 1
        keep = min(settings.ema, (1 + self.step) / (10 + self.step))  # soon forgets where it began
        torch._foreach_lerp_(self._average, self._weights, 1 - keep)
        self._updating = False
        return {"reconstruction": reconstruction.item(), "kl": kl.item()}


@torch.no_grad()
def initialize_(network: AutoEncoder) -> None:
    """Values from which training starts, drawn from torch's global generator.

    Convolutions keep the variance of what they read, residual branches begin at 0, and the posterior with a standard
    deviation of 0.05: with one of 1 the decoder sees hardly anything but noise, and for long learns nothing.
    """
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            torch.nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "proj_out")):
                torch.nn.init.zeros_(module.weight)
    _, logvar = network.encoder.conv_out.bias.chunk(2)
    logvar.fill_(2 * np.log(0.05))


def losses(
    network: AutoEncoder, pixels: torch.Tensor, noise: torch.Generator, edges: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(reconstruction, KL) of pictures, scalars, float32.

    Args:
        pixels: float32 [B, 3, H, W] in [-1, 1].
        noise: for the sample of the posterior.
        edges: by how much pixels near an edge weigh more than others.
    """
    mean, logvar = network.moments(pixels.to(next(network.parameters()).dtype))
    difference = network.decoder(sample_posterior(mean, logvar, noise)).float() - pixels
    mean, logvar = mean.float(), logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    error = difference.abs() + difference.square()
    return (error * (1 + edges * near_edges(pixels)) if edges else error).mean(), kl


def near_edges(pixels: torch.Tensor) -> torch.Tensor:
    """Which pixels have others within two pixels that differ by a tenth of the range; bool [B, 1, H, W]."""
    highest, lowest = (F.max_pool2d(sign * pixels, 5, stride=1, padding=2) * sign for sign in (1, -1))
    return (highest - lowest).amax(1, keepdim=True) > 0.2


def sample_posterior(mean: torch.Tensor, logvar: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """A sample of each posterior, neither shifted nor scaled, in the dtype of ``mean``."""
    return mean + torch.exp(logvar / 2) * torch.randn(mean.shape, generator=noise).to(mean)
