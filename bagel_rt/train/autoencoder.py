"""Training of the autoencoder with a reconstruction loss and a KL loss.

loss = mean w (|y - x| + (y - x)^2) + kl_weight * mean KL(N(mean, var) || N(0, 1)). The first mean is over pixels in
[-1, 1], with a larger weight w near edges; the second is over latent values. This is the KL autoencoder of Kingma &
Welling 2014 (arXiv:1312.6114) and Rombach et al. 2022 (arXiv:2112.10752), without the adversarial loss. The KL term
widens the posterior as far as the reconstruction allows, which makes the decoder robust to the errors of a small
generator.

The images and the noise of step n are drawn from generators seeded with (seed, n), so a resumed run gives the same
results. Activations can be bfloat16; weights, loss reductions and the optimizer are float32.
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

DrawImages = Callable[[np.random.Generator, float], Sequence[Image.Image]]


@dataclass(frozen=True)
class AutoencoderSettings:
    """Hyper-parameters of an autoencoder training run.

    Attributes:
        steps: total number of optimizer steps.
        learning_rate: peak value, after a linear warm-up over ``warmup_steps`` and before a cosine decay to 0.
        kl_weight: weight of the KL loss, a mean over latent values.
        edge_weight: extra weight of pixels near an edge.
        edge_weight_start: fraction of the steps after which ``edge_weight`` applies.
        ema: decay of the moving average of the weights.
        clip: maximum global gradient norm.
        seed: seed of the initial weights, the images and the noise.
        bfloat16: compute activations and their gradients in bfloat16.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int = checked(integer(1))
    learning_rate: float = checked(number(0, above=True), 1e-3)
    warmup_steps: int = checked(integer(0), 100)
    kl_weight: float = checked(number(0), 1e-3)
    edge_weight: float = checked(number(0), 4.0)
    edge_weight_start: float = checked(number(0), 0.56)
    ema: float = checked(number(0, 1, below=True), 0.998)
    clip: float = checked(number(0, above=True), 1.0)
    seed: int = checked(integer(0), 0)
    bfloat16: bool = True

    def __post_init__(self) -> None:
        check_fields(self)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        return self.learning_rate * warm * (1 + np.cos(np.pi * step / self.steps)) / 2


class AutoencoderTrainer(TrainingRun):
    """Trains an autoencoder in a folder; resumes if the folder has a saved state."""

    name, progress_losses = "autoencoder", ("reconstruction", "kl")

    def __init__(
        self,
        config: VAEConfig,
        draw: DrawImages,
        settings: AutoencoderSettings,
        folder: str | Path,
        device: torch.device | str = "cpu",
    ):
        """
        Args:
            config: the architecture; scale and shift are not used.
            draw: (generator, fraction of steps done) -> the RGB images of a step, all of one size.
            settings: the hyper-parameters.
            folder: created if missing.
            device: the device to train on.

        Raises:
            CheckpointError: the folder has a state of another architecture or other settings.
        """
        super().__init__(folder, settings.steps)
        self.settings, self.draw = settings, draw
        self._configuration = f"{config} {settings}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.network = AutoEncoder(config)
            initialize_(self.network)
        self.network.to(device)
        # float32 master weights and their moving average; the network has copies in the compute dtype.
        self._weights = [weight.detach().contiguous().clone() for weight in self.network.parameters()]
        self._average = [weight.clone() for weight in self._weights]
        self.network.to(torch.bfloat16 if settings.bfloat16 else torch.float32)
        self._optimizer = torch.optim.AdamW(self._weights, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
        allocate_moments(self._optimizer, self._weights)
        self._gradients = [torch.zeros_like(weight) for weight in self._weights]
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            weight.grad = gradient
        self._resume(self._optimizer)

    def averaged(self) -> AutoEncoder:
        """A float32 autoencoder with the averaged weights, without gradients."""
        model = AutoEncoder(self.network.config).requires_grad_(False)
        for weight, average in zip(model.parameters(), self._average, strict=True):
            weight.copy_(average)
        return model

    def _identity(self) -> dict:
        return {"run": self._configuration}

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        names = [name for name, _ in self.network.named_parameters()]
        for name, weight, average in zip(names, self._weights, self._average, strict=True):
            state = self._optimizer.state[weight]
            kinds = {"weight": weight, "average": average, **{kind: state[kind] for kind in MOMENTS}}
            tensors |= {f"{kind}/{name}": tensor for kind, tensor in kinds.items()}
        return tensors

    def train_step(self) -> dict[str, float]:
        settings = self.settings
        rng = np.random.default_rng((settings.seed, self.step))
        pixels = torch.stack([image_to_tensor(image) for image in self.draw(rng, self.step / settings.steps)]).to(
            self._weights[0].device
        )
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with torch.no_grad():
            torch._foreach_copy_(list(self.network.parameters()), self._weights)
        edge_weight = settings.edge_weight if self.step >= settings.edge_weight_start * settings.steps else 0.0
        reconstruction, kl = autoencoder_losses(self.network, pixels, noise, edge_weight)
        loss = reconstruction + settings.kl_weight * kl
        torch._foreach_copy_(self._gradients, torch.autograd.grad(loss, list(self.network.parameters())))
        torch.nn.utils.clip_grad_norm_(self._weights, settings.clip, error_if_nonfinite=True)
        self._updating = True
        self._optimizer.param_groups[0]["lr"] = settings.learning_rate_at(self.step)
        self._optimizer.step()
        self.step += 1
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))  # drops the initial weights quickly
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)
        self._updating = False
        return {"reconstruction": reconstruction.item(), "kl": kl.item()}


@torch.no_grad()
def initialize_(network: AutoEncoder) -> None:
    """Initialize the weights from torch's global generator.

    Convolutions preserve the variance of their input and residual branches start at 0. The posterior starts with a
    standard deviation of 0.05: with 1, the decoder's input is almost pure noise and training stalls for a long time.
    """
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if name.endswith(("conv2", "proj_out")):
                torch.nn.init.zeros_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
                if name == "encoder.conv_out":
                    _, logvar = module.bias.chunk(2)
                    logvar.fill_(2 * np.log(0.05))


def autoencoder_losses(
    network: AutoEncoder, pixels: torch.Tensor, noise: torch.Generator, edge_weight: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(reconstruction, KL) losses, float32 scalars.

    Args:
        pixels: float32 [B, 3, H, W] in [-1, 1].
        noise: generator for the posterior sample.
        edge_weight: extra weight of pixels near an edge.
    """
    mean, logvar = network.moments(pixels.to(next(network.parameters()).dtype))
    difference = network.decoder(sample_posterior(mean, logvar, noise)).float() - pixels
    mean, logvar = mean.float(), logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    error = difference.abs() + difference.square()
    return (error * (1 + edge_weight * edge_mask(pixels)) if edge_weight else error).mean(), kl


def edge_mask(pixels: torch.Tensor) -> torch.Tensor:
    """Mark pixels whose 5x5 neighborhood spans more than a tenth of the value range; bool [B, 1, H, W]."""
    highest, lowest = (F.max_pool2d(sign * pixels, 5, stride=1, padding=2) * sign for sign in (1, -1))
    return (highest - lowest).amax(1, keepdim=True) > 0.2


def sample_posterior(mean: torch.Tensor, logvar: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """Sample each posterior, before shift and scale, in the dtype of ``mean``."""
    return mean + torch.exp(logvar / 2) * torch.randn(mean.shape, generator=noise).to(mean)
