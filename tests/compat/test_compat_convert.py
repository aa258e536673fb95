"""Conversion of official configurations and tokenizers."""

import pytest
import torch
from conftest import CHECKPOINT
from official_modules import SlowTokenizer, load_official

from bagel_rt.compat import accelerate
from bagel_rt.compat.convert import convert_config, convert_tokenizer
from bagel_rt.models.bagel.images import ResizeRule
from bagel_rt.models.bagel.tokenizer import Tokenizer


@pytest.fixture
def official():
    return load_official(CHECKPOINT)


def test_config_matches_the_checkpoint(official):
    assert convert_config(official.model, official.vae_transform, official.vit_transform) == official.ours


def test_accepts_the_default_rope_scaling(official):
    official.model.config.llm_config.rope_scaling = {"rope_type": "default"}
    assert convert_config(official.model).llm == official.ours.llm


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("llm_config", "layer_module", "Qwen2MoEDecoderLayer"),
        ("llm_config", "qk_norm", False),
        ("llm_config", "hidden_act", "gelu"),
        ("llm_config", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("vit_config", "hidden_act", "quick_gelu"),
        ("vit_config", "rope", True),
        (None, "connector_act", "relu"),
    ],
)
def test_rejects_another_architecture(part, key, value, official):
    config = official.model.config
    setattr(config if part is None else getattr(config, part), key, value)
    with pytest.raises(ValueError, match=f"{part or 'config'}.{key} must be "):
        accelerate(official.model)


def test_rejects_a_module_without_vision_tower(official):
    official.model.config.visual_und = False
    with pytest.raises(ValueError, match="visual_und must be True"):
        accelerate(official.model)


def test_rejects_a_module_that_is_not_bagel():
    with pytest.raises(TypeError, match="must be an official Bagel module, got Linear without config, language_model"):
        accelerate(torch.nn.Linear(2, 2))


def test_rejects_missing_generation_weights(official):
    del official.model._modules["vae2llm"]
    with pytest.raises(TypeError, match="without vae2llm"):
        accelerate(official.model)


def test_rejects_a_transform_that_is_not_official(official):
    with pytest.raises(TypeError, match="vit_transform must be an official ImageTransform, got str"):
        convert_config(official.model, vit_transform="resize")


def test_default_resize_rules_are_multiples_of_the_patch_sizes(official):
    published = convert_config(official.model)
    assert (published.vae_transform, published.vit_transform) == (ResizeRule(1024, 512, 16), ResizeRule(980, 224, 14))
    official.model.config.vit_config.patch_size = 16
    official.model.config.latent_patch_size = 3
    config = convert_config(official.model)
    assert (config.vae_transform, config.vit_transform) == (ResizeRule(1008, 504, 24), ResizeRule(976, 224, 16))


def test_slow_tokenizer_encodes_like_the_fast_one(official):
    slow, ours = (
        convert_tokenizer(SlowTokenizer(CHECKPOINT), official.new_token_ids),
        Tokenizer.from_folder(CHECKPOINT),
    )
    for text in ("a red circle", "naïve  Käfig 🦊\n<|im_end|> x", ""):
        assert slow.encode(text) == ours.encode(text)
    assert len(slow) == len(ours)


def test_rejects_wrong_token_ids(official):
    with pytest.raises(ValueError, match="new_token_ids must be .*, got {'eos_token_id': 3}"):
        convert_tokenizer(official.tokenizer, official.new_token_ids | {"eos_token_id": 3})


def test_rejects_another_tokenizer(official):
    with pytest.raises(TypeError, match="must be a Hugging Face Qwen2 tokenizer, got str"):
        convert_tokenizer("gpt2", official.new_token_ids)
