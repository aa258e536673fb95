"""Models of random weights made on their device, in seconds: for shapes whose published weights are not at hand."""

import math

import torch

from bagel_rt.config import BagelConfig
from bagel_rt.models.bagel.embed import sincos_table
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.pipeline import DEFAULT_MODEL
from bagel_rt.tokenizer import Tokenizer


@torch.inference_mode()
def random_model(config: BagelConfig, device: torch.device, dtype: torch.dtype) -> tuple[BagelModel, Tokenizer]:
    """Weights drawn on the device, and the embedded model's tokenizer, all of whose plain tokens the model can write.

    Deviations are those of ``bagel_rt.random_checkpoint``, which draws on the CPU and takes minutes. No text ends
    before its length: special tokens have logits of zero.
    """
    tokenizer = Tokenizer.from_folder(DEFAULT_MODEL)
    model = BagelModel.allocate(config, (tokenizer.start_of_image, tokenizer.end_of_image), device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for places in model.destinations().values():
        for name, place in places.items():
            drawn = torch.empty(place.shape, dtype=place.view.dtype, device=device)
            if name.endswith("pos_embed"):
                drawn.copy_(sincos_table(place.shape[1], math.isqrt(place.shape[0])))
            elif name.endswith(".bias"):
                drawn.normal_(0, 0.02, generator=generator)
            elif len(place.shape) == 1:
                drawn.normal_(1, 0.1, generator=generator)
            else:
                drawn.normal_(0, math.prod(place.shape[1:]) ** -0.5, generator=generator)
            place.view.copy_(drawn)  # a weight of QK-norm goes to every head
    plain = [token for token in range(len(tokenizer)) if (tokenizer.spell(token) or b"<")[:1] != b"<"]
    kept = torch.zeros(config.llm.vocab_size, 1, dtype=dtype, device=device)
    kept[plain] = 1
    model.weights.lm_head.mul_(kept)
    return model, tokenizer
