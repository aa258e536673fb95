"""Create denoisers in tests, without a request."""

from bagel_rt.models.bagel.contents import NoisedImage
from bagel_rt.runtime.denoise import Denoiser, DenoisingTask


def start(model, cache, branches, noise, settings, grid, graphs=None, deduplicate=True, images=1) -> Denoiser:
    """Create a denoiser of ``images`` images of one ``grid`` (grid_h, grid_w).

    ``branches`` are the three contexts of the image, or with several images a list of three contexts per image.
    """
    tasks = [
        DenoisingTask(NoisedImage(*grid), noise, tuple(contexts))
        for contexts in ([branches] if images == 1 else branches)
    ]
    guidance = model.guidance(tasks, [settings] * len(tasks))
    return Denoiser(model, cache, tasks, guidance, graphs, deduplicate)
