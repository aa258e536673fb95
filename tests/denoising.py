"""Denoisings that tests start themselves, behind contexts of their own."""

from bagel_rt.models.bagel.contents import NoisedImage
from bagel_rt.runtime.denoise import Denoiser, DenoisingTask


def start(model, cache, branches, noise, settings, grid, graphs=None, deduplicate=True, images=1) -> Denoiser:
    """The denoising of equal images of ``grid`` (grid_h, grid_w) behind three contexts each."""
    tasks = [DenoisingTask(NoisedImage(*grid), noise, tuple(one)) for one in ([branches] if images == 1 else branches)]
    guidance = model.guidance(tasks, [settings] * len(tasks))
    return Denoiser(model, cache, tasks, guidance, graphs, deduplicate)
