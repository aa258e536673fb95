import dataclasses
import json
import os
from pathlib import Path

import pytest

from bagel_rt.errors import CheckpointError
from bagel_rt.models.bagel.config import BAGEL_7B_MOT, BagelConfig, TransformerConfig, VAEConfig, ViTConfig
from bagel_rt.models.bagel.images import ResizeRule

CONFORMANCE = Path(__file__).parents[2] / "conformance" / "bagel" / "checkpoint"

# The published files, without the keys that are not used.
LLM = {
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,  # overridden, like qk_norm
    "vocab_size": 152064,
}
VIT = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}


def folder(path, llm=LLM, vit=VIT, config=None):
    """Write a model folder with these JSON values or bytes."""
    for name, value in (("llm_config.json", llm), ("vit_config.json", vit), ("config.json", config)):
        if value is not None:
            (path / name).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


def test_published_folder_without_config_json_is_the_published_model(tmp_path):
    assert BagelConfig.from_folder(folder(tmp_path)) == BAGEL_7B_MOT


def test_null_and_unknown_keys_in_config_json_are_ignored(tmp_path):
    config = {"vae_config": {"downsample": 8, "resolution": 256}, "image_transforms": None, "llm_config": [], "new": 1}
    assert BagelConfig.from_folder(str(folder(tmp_path, config=config))) == BAGEL_7B_MOT


def test_published_model_has_the_official_values():
    config = BAGEL_7B_MOT
    assert (config.llm.num_layers, config.llm.head_dim, config.vit.num_layers, config.vit.head_dim) == (28, 128, 26, 72)
    assert (config.latent_stride, config.latent_features, config.patch_features) == (16, 64, 588)
    assert config.vae == VAEConfig(3, 3, 128, (1, 2, 4, 4), 2, 16, 0.3611, 0.1159) and config.vae.downsample == 8
    assert (config.vae_transform, config.vit_transform) == (ResizeRule(1024, 512, 16), ResizeRule(980, 224, 14))
    assert (config.max_latent_size, config.vit.max_patches_per_side, config.interpolate_pos) == (64, 70, False)


def test_reads_every_value_of_the_conformance_folder():
    assert BagelConfig.from_folder(CONFORMANCE) == BagelConfig(
        llm=TransformerConfig(64, 3, 4, 2, 16, 96, 384, 1e6, 1e-6, 32768),
        vit=ViTConfig(48, 2, 4, 88, 14, 3, 1e-6, 10),
        vae=VAEConfig(ch=32, ch_mult=(1, 2, 1, 1), num_res_blocks=1),
        max_latent_size=16,
        vae_transform=ResizeRule(128, 64, 16),
        vit_transform=ResizeRule(140, 56, 14),
    )


def test_every_field_is_read_from_its_key(tmp_path):
    llm = LLM | {"hidden_size": 96, "intermediate_size": 100, "max_position_embeddings": 77, "num_attention_heads": 6}
    llm |= {"num_hidden_layers": 5, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 500, "vocab_size": 9}
    vit = VIT | {"hidden_size": 60, "intermediate_size": 61, "layer_norm_eps": 1e-5, "num_attention_heads": 5}
    vit |= {"num_hidden_layers": 2, "patch_size": 7}
    vae = {"ch": 64, "ch_mult": [1, 3], "num_res_blocks": 3, "z_channels": 4, "scale_factor": 2, "shift_factor": -1.5}
    config = {"vae_config": vae, "latent_patch_size": 4, "max_latent_size": 20, "vit_max_num_patch_per_side": 30}
    config |= {"image_transforms": {"vae": [160, 80, 16], "vit": [203, 70, 7], "audio": 0}, "interpolate_pos": True}
    read = BagelConfig.from_folder(folder(tmp_path, llm, vit, config))
    assert read.llm == TransformerConfig(96, 5, 6, 3, 16, 100, 9, 500, 1e-5, 77)
    assert read.vit == ViTConfig(60, 1, 5, 61, 7, 3, 1e-5, 30)
    assert read.vae == VAEConfig(3, 3, 64, (1, 3), 3, 4, 2, -1.5)
    assert (read.latent_patch_size, read.max_latent_size, read.interpolate_pos) == (4, 20, True)
    assert (read.latent_stride, read.latent_features) == (8, 64)
    assert (read.vae_transform, read.vit_transform) == (ResizeRule(160, 80, 16), ResizeRule(203, 70, 7))


def test_a_missing_transform_has_the_official_default(tmp_path):
    read = BagelConfig.from_folder(folder(tmp_path, config={"image_transforms": {"vae": [512, 256, 16]}}))
    assert (read.vae_transform, read.vit_transform) == (ResizeRule(512, 256, 16), ResizeRule(980, 224, 14))


def test_interpolated_positions_allow_images_larger_than_the_table(tmp_path):
    config = {"max_latent_size": 32, "interpolate_pos": True}
    assert BagelConfig.from_folder(folder(tmp_path, config=config)).max_latent_size == 32


HIDDEN = "must be an integer from 1 to 32768, got"
BAD_LLM = [
    pytest.param("hidden_size", -3584, f"{HIDDEN} -3584", id="hidden-size-negative"),
    pytest.param("hidden_size", 0, f"{HIDDEN} 0", id="hidden-size-zero"),
    pytest.param("hidden_size", 28 * 10**13, f"{HIDDEN} 280000000000000", id="hidden-size-huge"),
    pytest.param("hidden_size", "3584", f"{HIDDEN} '3584'", id="hidden-size-a-string"),
    pytest.param("hidden_size", 3584.0, f"{HIDDEN} 3584.0", id="hidden-size-a-float"),
    pytest.param("hidden_size", True, f"{HIDDEN} True", id="hidden-size-a-bool"),
    pytest.param("hidden_size", None, f"{HIDDEN} None", id="hidden-size-null"),
    pytest.param("hidden_size", [3584], f"{HIDDEN} (3584,)", id="hidden-size-a-list"),
    pytest.param("hidden_size", float("nan"), f"{HIDDEN} nan", id="hidden-size-NaN"),
    pytest.param("hidden_size", 3585, "must be a multiple of num_attention_heads, 28", id="heads-do-not-divide"),
    pytest.param("num_attention_heads", 0, "must be an integer from 1 to 512, got 0", id="no-heads"),
    pytest.param("num_attention_heads", "28", "must be an integer from 1 to 512, got '28'", id="heads-a-string"),
    pytest.param("num_attention_heads", 14, "must be a multiple of num_key_value_heads, 4, got 14", id="uneven-groups"),
    pytest.param("num_hidden_layers", 513, "must be an integer from 1 to 512, got 513", id="too-many-layers"),
    pytest.param("num_hidden_layers", "x" * 10**6, "from 1 to 512, got 'xxx", id="layers-an-endless-string"),
    pytest.param("intermediate_size", -1, "must be an integer from 1 to 262144, got -1", id="mlp-width-negative"),
    pytest.param("vocab_size", 1 << 30, "must be an integer from 1 to 2097152", id="vocabulary-huge"),
    pytest.param("max_position_embeddings", 0, "must be an integer from 1 to 16777216", id="no-positions"),
    pytest.param("rope_theta", float("nan"), "must be a number from 1 to 1e+12, got nan", id="rope-theta-NaN"),
    pytest.param("rope_theta", float("inf"), "must be a number from 1 to 1e+12, got inf", id="rope-theta-infinite"),
    pytest.param("rope_theta", True, "must be a number from 1 to 1e+12, got True", id="rope-theta-a-bool"),
    pytest.param("rms_norm_eps", 0, "must be a number from 1e-12 to 0.1, got 0", id="norm-eps-zero"),
    pytest.param("rms_norm_eps", "1e-6", "must be a number from 1e-12 to 0.1, got '1e-6'", id="norm-eps-a-string"),
    pytest.param("hidden_act", "gelu", "must be \"silu\", got 'gelu'", id="another-activation"),
]
BAD_VIT = [
    pytest.param("num_hidden_layers", 1, "official loader drops the last layer", id="only-the-layer-that-is-dropped"),
    pytest.param("num_hidden_layers", 26.0, "must be an integer from 1 to 256, got 26.0", id="layers-a-float"),
    pytest.param("num_attention_heads", 7, "num_attention_heads, 7, got", id="heads-do-not-divide"),
    pytest.param("patch_size", 0, "must be an integer from 1 to 64, got 0", id="no-patch"),
    pytest.param("num_channels", 1, "must be 3, got 1", id="gray-vision"),
    pytest.param("layer_norm_eps", -1e-6, "must be a number from 1e-12 to 0.1, got -1e-06", id="norm-eps-negative"),
    pytest.param("hidden_act", "gelu", "must be \"gelu_pytorch_tanh\", got 'gelu'", id="another-activation"),
]
VAE_ALLOWED = "1 to 6 integers from 1 to 16"
BAD_CONFIG = [
    pytest.param({"latent_patch_size": 0}, "latent_patch_size must be an integer from", id="no-latent-patch"),
    pytest.param({"max_latent_size": 1e9}, "max_latent_size must be", id="latent-table-a-float"),
    pytest.param({"vit_max_num_patch_per_side": -1}, "vit_max_num_patch_per_side must be", id="patch-table-negative"),
    pytest.param({"interpolate_pos": "no"}, "interpolate_pos must be true or false, got 'no'", id="flag-a-string"),
    pytest.param({"connector_act": "relu"}, "connector_act must be", id="another-connector"),
    pytest.param({"vae_config": [1]}, "vae_config must be an object, got [1]", id="autoencoder-a-list"),
    pytest.param({"vae_config": {"ch": 48}}, "vae_config: ch must be a multiple of 32", id="group-norm-groups"),
    pytest.param({"vae_config": {"ch": 0}}, "vae_config: ch must be", id="no-channels"),
    pytest.param({"vae_config": {"ch_mult": []}}, VAE_ALLOWED, id="no-levels"),
    pytest.param({"vae_config": {"ch_mult": 4}}, VAE_ALLOWED, id="levels-a-number"),
    pytest.param({"vae_config": {"ch_mult": [1, 2, 4, "4"]}}, VAE_ALLOWED, id="level-a-string"),
    pytest.param({"vae_config": {"ch_mult": [1] * 9}}, VAE_ALLOWED, id="nine-levels"),
    pytest.param({"vae_config": {"in_channels": 4}}, "in_channels must be 3, got 4", id="alpha-in"),
    pytest.param({"vae_config": {"out_ch": 1}}, "out_ch must be 3, got 1", id="gray-out"),
    pytest.param({"vae_config": {"scale_factor": 0}}, "scale_factor must be", id="scale-zero"),
    pytest.param({"vae_config": {"shift_factor": float("nan")}}, "shift_factor must be", id="shift-NaN"),
    pytest.param(
        {"vae_config": {"downsample": 16}}, "downsample must be 8, got 16", id="downsample-contradicts-levels"
    ),
    pytest.param({"image_transforms": {"vae": [1024, 512]}}, "vae must be [max, min, stride]", id="two-sizes"),
    pytest.param({"image_transforms": {"vit": {}}}, "vit must be [max, min, stride]", id="sizes-an-object"),
    pytest.param({"image_transforms": {"vae": [512, 1024, 16]}}, "max >= min", id="max-below-min"),
    pytest.param({"image_transforms": {"vae": [1024, 512, 0]}}, "stride >= 1", id="stride-zero"),
    pytest.param({"image_transforms": {"vae": [1024, 8, 16]}}, "min >= stride", id="min-below-stride"),
    pytest.param({"image_transforms": {"vae": [10**9, 512, 16]}}, "16384 >= max", id="giant-images"),
    pytest.param({"image_transforms": {"vae": [1024, 512, 24]}}, "must be a multiple of 16", id="stride-off-the-grid"),
    pytest.param(
        {"oracle_image_transforms": 3}, "oracle_image_transforms must be an object, got 3", id="not-an-object"
    ),
]


def assert_rejected(path, file, *parts):
    """Reading the folder raises a short message that contains the file and all ``parts``."""
    with pytest.raises(CheckpointError) as error:
        BagelConfig.from_folder(path)
    message = str(error.value)
    for part in (str(path / file), *parts):
        assert part in message
    assert len(message) < 600 and message.isprintable()


@pytest.mark.parametrize("key, value, message", BAD_LLM)
def test_rejects_invalid_llm_values(tmp_path, key, value, message):
    assert_rejected(folder(tmp_path, llm=LLM | {key: value}), "llm_config.json", key, message, "published model folder")


@pytest.mark.parametrize("key, value, message", BAD_VIT)
def test_rejects_invalid_vision_values(tmp_path, key, value, message):
    assert_rejected(folder(tmp_path, vit=VIT | {key: value}), "vit_config.json", key, message, "published model folder")


def test_rejects_an_odd_head_dim(tmp_path):
    llm = LLM | {"hidden_size": 28 * 127}
    assert_rejected(
        folder(tmp_path, llm=llm),
        "llm_config.json",
        "head_dim must be an even number, because RoPE",
    )


def test_rejects_a_transform_stride_that_does_not_match_the_patch_size(tmp_path):
    path = folder(tmp_path, vit=VIT | {"patch_size": 16})
    assert_rejected(path, "config.json", "image_transforms.vit: stride must be a multiple of 16, got 14")


@pytest.mark.parametrize("config, message", BAD_CONFIG)
def test_rejects_invalid_values_in_config_json(tmp_path, config, message):
    assert_rejected(folder(tmp_path, config=config), "config.json", message, "must be ", "published model folder")


PLAIN_ROPE = [
    pytest.param({"rope_theta": 1000000}, id="integer"),
    pytest.param({"rope_theta": 1e6, "rope_scaling": None, "rope_parameters": None}, id="null"),
    pytest.param({"rope_theta": 1e6, "rope_scaling": {"rope_type": "default"}}, id="transformers-4"),
    pytest.param({"rope_theta": 1e6, "rope_scaling": {"type": "default"}}, id="transformers-4-old-key"),
    pytest.param({"rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "type": "default"}}, id="both-keys"),
    pytest.param({"rope_theta": 1e6, "rope_scaling": {}}, id="empty"),
    pytest.param({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, id="transformers-5"),
    pytest.param({"rope_parameters": {"rope_theta": 1e6}}, id="transformers-5-without-type"),
    pytest.param({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}}, id="theta-of-4-type-of-5"),
    pytest.param({"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "factor": 1}}, id="neutral-factor"),
    pytest.param({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1000000}}, id="same-theta-twice"),
]


@pytest.mark.parametrize("rope", PLAIN_ROPE)
def test_reads_plain_rope_as_transformers_4_and_5_write_it(rope, tmp_path):
    llm = {key: value for key, value in LLM.items() if not key.startswith("rope_")}
    assert BagelConfig.from_folder(folder(tmp_path, llm=llm | rope)) == BAGEL_7B_MOT


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "llama3", "longrope", "su", "mrope", "proportional"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_rejects_unsupported_kinds_of_rope(kind, key, type_key, tmp_path):
    section = {"rope_theta": 1e6, "factor": 4.0, type_key: kind}
    with pytest.raises(CheckpointError, match=f"llm_config.json: {key}.{type_key} must be \"default\", .*got '{kind}'"):
        BagelConfig.from_folder(folder(tmp_path, llm=LLM | {key: section}))


CONTRADICTORY_ROPE = [
    pytest.param(
        {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta must be equal to rope_theta, 1000000.0, got 10000"
    ),
    pytest.param(
        {"rope_theta": None, "rope_scaling": {"rope_theta": 5.0}, "rope_parameters": {"rope_theta": 6.0}},
        "rope_parameters.rope_theta must be equal to rope_scaling.rope_theta, 5.0, got 6.0",
    ),
    pytest.param({"rope_scaling": {"rope_type": "default", "type": "linear"}}, "rope_scaling.type must be"),
    pytest.param(
        {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section must be null, because"
    ),
    pytest.param({"rope_scaling": {"factor": 8.0}}, "rope_scaling.factor must be 1.0, because"),
    pytest.param({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1.0"),
    pytest.param({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, got 0.5"),
    pytest.param({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention must be null"),
    pytest.param({"rope_parameters": "default"}, "rope_parameters must be an object, got 'default'"),
    pytest.param(
        {"rope_parameters": {"rope_theta": [1e6]}}, r"must be equal to rope_theta, 1000000.0, got \[1000000.0\]"
    ),
    pytest.param(
        {"rope_theta": None, "rope_parameters": {"rope_theta": "1e6"}}, "rope_theta must be a number from 1 to"
    ),
    pytest.param({"rope_theta": None}, "rope_theta must be a number from 1 to 1e[+]12, got None"),
]


@pytest.mark.parametrize("rope, message", CONTRADICTORY_ROPE, ids=range(len(CONTRADICTORY_ROPE)))
def test_rejects_contradictory_rope_settings(rope, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        BagelConfig.from_folder(folder(tmp_path, llm=LLM | rope))


@pytest.mark.parametrize("key", ["hidden_size", "num_key_value_heads", "rope_theta", "vocab_size"])
def test_error_names_a_missing_llm_key(tmp_path, key):
    llm = {name: value for name, value in LLM.items() if name != key}
    assert_rejected(folder(tmp_path, llm=llm), "llm_config.json", f"{key} is missing; it must be a")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "patch_size"])
def test_error_names_a_missing_vision_key(tmp_path, key):
    vit = {name: value for name, value in VIT.items() if name != key}
    assert_rejected(folder(tmp_path, vit=vit), "vit_config.json", f"{key} is missing; it must be a")


@pytest.mark.parametrize("file", ["llm_config.json", "vit_config.json"])
def test_configs_embedded_in_config_json_do_not_replace_their_files(tmp_path, file):
    folder(tmp_path, config={"llm_config": LLM, "vit_config": VIT})
    (tmp_path / file).unlink()
    assert_rejected(tmp_path, file, "is missing", "a copy inside config.json is not enough", "published model folder")


@pytest.mark.parametrize("subfolder", ["BAGEL-7B-MoT", "snapshots/4f8a"])
def test_error_for_a_folder_around_the_model_names_the_inner_folder(tmp_path, subfolder):
    (tmp_path / subfolder).mkdir(parents=True)
    folder(tmp_path / subfolder)
    assert_rejected(tmp_path, "llm_config.json is missing", f"The model is in {tmp_path / subfolder}. Use that folder.")


BAD_JSON = [
    pytest.param(b"{", "is not JSON in UTF-8", id="truncated-file"),
    pytest.param(b'{"a": "\xff"}', "can't decode byte 0xff", id="invalid-UTF-8"),
    pytest.param(b"[]", "must be a JSON object, got list", id="list"),
    pytest.param(b"7", "must be a JSON object, got int", id="number"),
    pytest.param(b"[" * 100_000, "is not JSON in UTF-8", id="brackets-without-end"),
    pytest.param(b"9" * 10_000, "is not JSON in UTF-8", id="number-without-end"),
    pytest.param(b" " * (17 << 20), "must have at most 16777216 bytes", id="17-MB-of-blanks"),
]


@pytest.mark.parametrize("file", ["llm", "config"])
@pytest.mark.parametrize("content, message", BAD_JSON)
def test_rejects_bad_json(tmp_path, file, content, message):
    path = folder(tmp_path, **{file: content})
    assert_rejected(path, {"llm": "llm_config.json", "config": "config.json"}[file], message, "published model folder")


@pytest.mark.parametrize("file", ["config.json", "vit_config.json"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "fifo"])
def test_rejects_a_path_that_is_not_a_regular_file(tmp_path, file, make):
    folder(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    make(tmp_path / file)
    assert_rejected(tmp_path, file, "is not a file")


def test_rejects_config_json_that_is_a_dangling_link(tmp_path):
    (folder(tmp_path) / "config.json").symlink_to("nowhere")
    assert_rejected(tmp_path, "config.json", "cannot be read: No such file")


@pytest.mark.parametrize("name", ["nowhere", "file", "x" * 5000], ids=["missing", "file", "endless-name"])
def test_rejects_a_path_that_is_not_a_folder(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no such folder|is a file, not a folder"):
        BagelConfig.from_folder(tmp_path / name)


@pytest.mark.parametrize(
    "config, field, value, message",
    [
        pytest.param(BAGEL_7B_MOT.llm, "num_layers", 0, "num_hidden_layers must be", id="decoder-without-layers"),
        pytest.param(BAGEL_7B_MOT.llm, "head_dim", 3, "head_dim must be an even number", id="decoder-with-odd-heads"),
        pytest.param(BAGEL_7B_MOT.vit, "num_heads", 5, "a multiple of num_attention_heads, 5", id="uneven-vision"),
        pytest.param(BAGEL_7B_MOT.vae, "ch_mult", [1, 2], "1 to 6 integers", id="levels-in-a-list"),
    ],
)
def test_constructor_checks_its_values(config, field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **{field: value})
