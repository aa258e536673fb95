"""Signatures of the entry points and of the inferencer, against the official ones."""

import inspect

from conftest import CHECKPOINT
from official_modules import load_official

from bagel_rt.compat import InterleaveInferencer, accelerate
from bagel_rt.compat.accelerate import ENTRY_POINTS

EMPTY = inspect.Parameter.empty
# The official arguments in order, with their defaults; lists are tuples here.
ENTRY_POINT_ARGUMENTS = {
    "forward_cache_update_text": {
        "past_key_values": EMPTY,
        "packed_text_ids": EMPTY,
        "packed_text_position_ids": EMPTY,
        "text_token_lens": EMPTY,
        "packed_text_indexes": EMPTY,
        "packed_key_value_indexes": EMPTY,
        "key_values_lens": EMPTY,
    },
    "forward_cache_update_vit": {
        "past_key_values": EMPTY,
        "packed_text_ids": EMPTY,
        "packed_text_indexes": EMPTY,
        "packed_vit_tokens": EMPTY,
        "packed_vit_token_indexes": EMPTY,
        "packed_vit_position_ids": EMPTY,
        "vit_token_seqlens": EMPTY,
        "packed_position_ids": EMPTY,
        "packed_seqlens": EMPTY,
        "packed_indexes": EMPTY,
        "packed_key_value_indexes": EMPTY,
        "key_values_lens": EMPTY,
    },
    "forward_cache_update_vae": {
        "vae_model": EMPTY,
        "past_key_values": EMPTY,
        "padded_images": EMPTY,
        "patchified_vae_latent_shapes": EMPTY,
        "packed_vae_position_ids": EMPTY,
        "packed_timesteps": EMPTY,
        "packed_vae_token_indexes": EMPTY,
        "packed_text_ids": EMPTY,
        "packed_text_indexes": EMPTY,
        "packed_position_ids": EMPTY,
        "packed_seqlens": EMPTY,
        "packed_indexes": EMPTY,
        "key_values_lens": EMPTY,
        "packed_key_value_indexes": EMPTY,
    },
    "generate_image": {
        "packed_text_ids": EMPTY,
        "packed_text_indexes": EMPTY,
        "packed_init_noises": EMPTY,
        "packed_vae_position_ids": EMPTY,
        "packed_vae_token_indexes": EMPTY,
        "packed_seqlens": EMPTY,
        "packed_position_ids": EMPTY,
        "packed_indexes": EMPTY,
        "past_key_values": EMPTY,
        "key_values_lens": EMPTY,
        "packed_key_value_indexes": EMPTY,
        "num_timesteps": 24,
        "timestep_shift": 1.0,
        "cfg_renorm_min": 0.0,
        "cfg_renorm_type": "global",
        "cfg_interval": (0, 1),
        "cfg_text_scale": 1.0,
        "cfg_text_packed_query_indexes": None,
        "cfg_text_packed_position_ids": None,
        "cfg_text_past_key_values": None,
        "cfg_text_key_values_lens": None,
        "cfg_text_packed_key_value_indexes": None,
        "cfg_img_scale": 1.0,
        "cfg_img_packed_query_indexes": None,
        "cfg_img_packed_position_ids": None,
        "cfg_img_past_key_values": None,
        "cfg_img_key_values_lens": None,
        "cfg_img_packed_key_value_indexes": None,
        "cfg_type": "parallel",
        "enable_taylorseer": False,
    },
    "generate_text": {
        "past_key_values": EMPTY,
        "packed_key_value_indexes": EMPTY,
        "key_values_lens": EMPTY,
        "packed_start_tokens": EMPTY,
        "packed_query_position_ids": EMPTY,
        "max_length": EMPTY,
        "do_sample": False,
        "temperature": 1.0,
        "end_token_id": None,
    },
    "chat": {
        "tokenizer": EMPTY,
        "new_token_ids": EMPTY,
        "image_transform": EMPTY,
        "images": EMPTY,
        "prompt": EMPTY,
        "max_length": EMPTY,
        "do_sample": False,
        "temperature": 1.0,
    },
}
INFERENCER_ARGUMENTS = {
    "init_gen_context": {},
    "update_context_text": {"text": EMPTY, "gen_context": EMPTY},
    "update_context_image": {"image": EMPTY, "gen_context": EMPTY, "vae": True, "vit": True},
    "gen_image": {
        "image_shape": EMPTY,
        "gen_context": EMPTY,
        "cfg_text_scale": 4.0,
        "cfg_img_scale": 1.5,
        "cfg_text_precontext": None,
        "cfg_img_precontext": None,
        "cfg_interval": (0.4, 1.0),
        "cfg_renorm_min": 0.0,
        "cfg_renorm_type": "global",
        "num_timesteps": 50,
        "timestep_shift": 3.0,
        "enable_taylorseer": False,
    },
    "decode_image": {"latent": EMPTY, "image_shape": EMPTY},
    "gen_text": {"gen_context": EMPTY, "max_length": 500, "do_sample": True, "temperature": 1.0},
    "interleave_inference": {
        "input_lists": EMPTY,
        "think": False,
        "understanding_output": False,
        "max_think_token_n": 1000,
        "do_sample": False,
        "text_temperature": 0.3,
        "cfg_text_scale": 3.0,
        "cfg_img_scale": 1.5,
        "cfg_interval": (0.4, 1.0),
        "timestep_shift": 3.0,
        "num_timesteps": 50,
        "cfg_renorm_min": 0.0,
        "cfg_renorm_type": "global",
        "image_shapes": (1024, 1024),
        "enable_taylorseer": False,
    },
    "__call__": {"image": None, "text": None, "kargs": EMPTY},
}


def arguments(function) -> list[tuple]:
    return [(name, parameter.default) for name, parameter in inspect.signature(function).parameters.items()]


def test_entry_points_have_the_official_signatures():
    model = load_official(CHECKPOINT).model
    accelerate(model)
    assert ENTRY_POINT_ARGUMENTS.keys() == set(ENTRY_POINTS)
    for name, expected in ENTRY_POINT_ARGUMENTS.items():
        assert arguments(getattr(model, name)) == list(expected.items()), name


def test_inferencer_has_the_official_signatures():
    for name, expected in INFERENCER_ARGUMENTS.items():
        assert arguments(getattr(InterleaveInferencer, name))[1:] == list(expected.items()), name
    names = ["model", "vae_model", "tokenizer", "vae_transform", "vit_transform", "new_token_ids"]
    assert [name for name, _ in arguments(InterleaveInferencer)] == names
