"""Roofline of a whole request: a lower bound of its time from arithmetic and weight reads at the device's ceilings.

Guidance branches with equal contexts count once. A step reads each weight once. A forward takes the longer of
arithmetic and weight reads. The autoencoder, elementwise ops and the system prompt in guidance contexts are not
counted, so the result remains a lower bound.
"""

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.workload import Workload


def roofline_seconds(work: Workload, limits: tuple[float, float]) -> float:
    """Lower bound of the time of a workload in seconds.

    Args:
        work: one batch of requests.
        limits: flop/s and bytes/s of the device.
    """
    return _prefill(work, limits) + _decoding(work, limits) + _denoising(work, limits)


def layer_parameters(config: BagelConfig) -> int:
    """Number of weights in the GEMMs of one expert of one layer."""
    llm = config.llm
    attention = llm.hidden_size * llm.head_dim * (2 * llm.num_heads + 2 * llm.num_kv_heads)
    return attention + 3 * llm.hidden_size * llm.intermediate_size


def forward_seconds(
    config: BagelConfig, rows: int, pairs: int, experts: int, itemsize: int, limits: tuple[float, float]
) -> float:
    """Lower bound of the time of one packed forward in seconds.

    Args:
        config: of the model.
        rows: total number of rows.
        pairs: total number of (query row, visible key) pairs.
        experts: number of experts whose weights are read, 1 or 2.
        itemsize: bytes per weight.
        limits: flop/s and bytes/s of the device.
    """
    llm, weights = config.llm, layer_parameters(config)
    flops = llm.num_layers * (2 * weights * rows + 4 * llm.num_heads * llm.head_dim * pairs)
    return max(flops / limits[0], llm.num_layers * experts * weights * itemsize / limits[1])


def _prefill(work: Workload, limits) -> float:
    config, texts = work.config, work.text_tokens
    patches, latents = work.patches, work.image_tokens - work.patches  # latents include all marker tokens
    if not work.draws:
        patches, latents = work.image_tokens, 0
    pairs = latents**2 + patches * (latents + patches) + texts * (latents + patches) + texts * (texts + 1) // 2
    rows = latents + patches + texts
    forward = forward_seconds(
        config, work.batch * rows, work.batch * pairs, 1 + (latents > 0), work.dtype.itemsize, limits
    )
    return forward + work.batch * _vision_tower(config, work.patches, len(work.images)) / limits[0]


def _vision_tower(config: BagelConfig, patches: int, images: int) -> float:
    """Flops of the vision tower and the connector for images of equal size."""
    vit, H = config.vit, config.llm.hidden_size
    V = vit.hidden_size
    pairs = patches**2 / max(images, 1)
    layers = vit.num_layers * (2 * patches * (4 * V * V + 2 * V * vit.intermediate_size) + 4 * V * pairs)
    return layers + 2 * patches * (V * H + H * H)


def _decoding(work: Workload, limits) -> float:
    config, llm, size = work.config, work.config.llm, work.dtype.itemsize
    weights = llm.num_layers * layer_parameters(config) + llm.vocab_size * llm.hidden_size
    kv_elements = 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim
    context = work.image_tokens + work.text_tokens
    tokens = work.max_think_token_n
    keys = tokens * context + tokens * (tokens + 1) // 2
    return size * (tokens * weights + work.batch * keys * kv_elements) / limits[1]


def _denoising(work: Workload, limits) -> float:
    if not work.draws:
        return 0.0
    guided, steps = work.guided_steps
    rows = work.latents + 2
    full = work.image_tokens + work.text_tokens + work.written
    contexts = [full, work.image_tokens, work.text_tokens][: work.branches]

    def step(contexts):
        pairs = sum(rows * (context + rows) for context in contexts)
        batch = work.batch * len(contexts) * rows
        return forward_seconds(work.config, batch, work.batch * pairs, 2, work.dtype.itemsize, limits)

    return guided * step(contexts) + (steps - guided) * step(contexts[:1])
