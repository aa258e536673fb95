"""Find the weights of a model folder, and say which files are used and which are there instead."""

import json
import logging

import pytest

from bagel_rt.checkpoint.find import describe_missing_folder, find_weights
from bagel_rt.errors import CheckpointError

MODEL_INDEX = "model.safetensors.index.json"
SHARD_1, SHARD_2 = (f"ema-0000{k}-of-00002.safetensors" for k in (1, 2))


def make_files(folder, *names):
    """Empty files; every index lists one shard, shard.safetensors."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"weight_map": {"a": "shard.safetensors"}}) if "index" in name else "")


@pytest.mark.parametrize(
    "present, expected",
    [
        pytest.param(["ema.safetensors", MODEL_INDEX], 0, id="published-folder-with-a-stale-index"),
        pytest.param(["model.safetensors"], 0, id="model-alone"),
        pytest.param([MODEL_INDEX, "shard.safetensors", "ema.bin"], 0, id="model-index-alone"),
        pytest.param(["ema.safetensors.index.json", "model.safetensors"], 1, id="model-beside-a-stale-index"),
        pytest.param([SHARD_1, SHARD_2], 0, id="shards-without-an-index"),
        pytest.param([SHARD_2], 0, id="shards-of-which-the-first-is-missing"),
    ],
)
def test_finds_weights(tmp_path, caplog, present, expected):
    make_files(tmp_path, *present)
    assert find_weights(str(tmp_path), "ema") == tmp_path / present[expected]
    assert not caplog.records


@pytest.mark.parametrize(
    "present, expected",
    [
        pytest.param(["ema.safetensors", "model.safetensors"], 0, id="ema-before-model"),
        pytest.param(["ema.safetensors", "ema.safetensors.index.json"], 0, id="one-file-before-an-index"),
        pytest.param(["ema.safetensors.index.json", "model.safetensors"], 0, id="ema-index-before-model"),
        pytest.param([SHARD_1, "model.safetensors"], 0, id="ema-shards-before-model"),
    ],
)
def test_says_which_of_several_weight_files_is_used(tmp_path, caplog, present, expected):
    make_files(tmp_path, *present, "shard.safetensors")
    assert find_weights(tmp_path, "ema") == tmp_path / present[expected]
    [record] = caplog.records
    assert record.levelno == logging.WARNING and record.name == "bagel_rt.checkpoint.find"
    assert f"using the weights in {present[expected]}, not {present[1]}. To choose, give a file" in record.getMessage()


@pytest.mark.parametrize("choice", ["model", "model.safetensors", "model_bf16", "model_bf16.safetensors"])
def test_uses_the_chosen_weights(tmp_path, caplog, choice):
    make_files(tmp_path, "ema.safetensors", "model.safetensors", "model_bf16.safetensors")
    assert find_weights(tmp_path, "ema", choice).name == choice.removesuffix(".safetensors") + ".safetensors"
    assert not caplog.records


@pytest.mark.parametrize("choice", ["modl", "modl.safetensors"])
def test_rejects_an_unknown_choice_of_weights_and_lists_the_files(tmp_path, choice):
    make_files(tmp_path, "ema.safetensors", "model.safetensors")
    with pytest.raises(CheckpointError, match="contain modl.safetensors, .* there: ema.safetensors, model.safetensors"):
        find_weights(tmp_path, "ema", choice)


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_lora_weights.safetensors"])
def test_warns_that_an_adapter_is_not_applied(tmp_path, caplog, name):
    make_files(tmp_path, "ema.safetensors", "ae.safetensors", name)
    for stem in ("ema", "ae"):
        find_weights(tmp_path, stem)
    [record] = caplog.records
    assert f"contains an adapter ({name}), which is not applied. Merge it into the weights" in record.getMessage()


def test_error_for_an_empty_folder_says_how_to_download_the_model(tmp_path):
    expected = "must contain ema.safetensors or model.safetensors, or shards of it. Download the model: hf download"
    with pytest.raises(CheckpointError, match=f"{expected} .* --local-dir {tmp_path}"):
        find_weights(tmp_path, "ema")


def test_autoencoder_does_not_fall_back_to_model_safetensors(tmp_path):
    make_files(tmp_path, "model.safetensors")
    with pytest.raises(CheckpointError, match="contain ae.safetensors, or shards of it. Other .*: model.safetensors"):
        find_weights(tmp_path, "ae")


def test_error_names_a_gguf_file_in_a_folder_without_safetensors(tmp_path):
    make_files(tmp_path, "bagel-Q4_K_M.gguf")
    with pytest.raises(
        CheckpointError, match="contains bagel-Q4_K_M.gguf, but GGUF is not supported. Download the model"
    ):
        find_weights(tmp_path, "ema")


@pytest.mark.parametrize("name", ["ema.bin", "pytorch_model.pt", "ema.ckpt", "x.pth"])
def test_error_names_a_pickle_in_a_folder_without_safetensors(tmp_path, name):
    make_files(tmp_path, name)
    with pytest.raises(CheckpointError, match=f"It contains {name}, but pickles can execute .* Download"):
        find_weights(tmp_path, "ema")


@pytest.mark.parametrize(
    "stem, present, remedy",
    [
        ("ae", "vae/ae.safetensors", "Move vae/ae.safetensors there, or download the model: hf download"),
        ("ae", "flux_vae.safetensors", "Rename the right file to ae.safetensors, or download the model"),
        (
            "ema",
            "model_bf16.safetensors",
            "Rename .* ema.safetensors, give its name as `weights`, or download the model",
        ),
        ("ema", "weights/model.safetensors", "Move weights/model.safetensors there, or download the model"),
    ],
)
def test_error_lists_the_weight_files_that_are_present(tmp_path, stem, present, remedy):
    make_files(tmp_path, present)
    with pytest.raises(CheckpointError, match=f"Other weight files there: {present}. {remedy}"):
        find_weights(tmp_path, stem)


def test_error_lists_at_most_ten_files_on_one_line(tmp_path):
    make_files(tmp_path, *(f"w{k:02}.safetensors" for k in range(30)), "\x1b[2J.safetensors")
    with pytest.raises(CheckpointError, match="w08.safetensors and 21 more") as error:
        find_weights(tmp_path, "ema")
    assert str(error.value).isprintable()


HUB = {
    "ByteDance-Seed/BAGEL-7B-MoT": "ByteDance-Seed/BAGEL-7B-MoT --local-dir BAGEL-7B-MoT",
    "https://huggingface.co/owner/some.model": "owner/some.model --local-dir some.model",
    "https:/huggingface.co/owner/model/tree/main": "owner/model --local-dir model",
    "hf://owner/model": "owner/model --local-dir model",
}


@pytest.mark.parametrize("path, download", HUB.items())
def test_name_of_a_model_on_the_hub_gives_the_download_command(path, download):
    assert describe_missing_folder(path).endswith(f"hf download {download}")


def test_missing_folder_gives_the_remedy(tmp_path):
    for path in (tmp_path / "absent", tmp_path / "absent/model", "../absent/model", "absent"):
        assert describe_missing_folder(path).endswith("Give the path of a downloaded BAGEL checkpoint folder.")
    make_files(tmp_path, "ema.safetensors")
    file = tmp_path / "ema.safetensors"
    assert describe_missing_folder(file) == f"{file} is a file, not a folder. Give its folder, {tmp_path}."
