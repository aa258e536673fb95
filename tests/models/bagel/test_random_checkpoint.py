"""Random checkpoints: official layout, the same weights as a model randomized in place, and usable for every task."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CHECKPOINT
from safetensors import safe_open
from typer.testing import CliRunner

from bagel_rt import Bagel
from bagel_rt.cli import app
from bagel_rt.models.bagel.config import BAGEL_7B_MOT, BagelConfig, ResizeRule
from bagel_rt.models.bagel.embed import sincos_table
from bagel_rt.models.bagel.folder import official_json
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.random_checkpoint import make_random_checkpoint, random_tensor, randomize_

TINY = BagelConfig.from_folder(CHECKPOINT)
ODD = replace(
    TINY,
    llm=replace(TINY.llm, num_layers=1, rope_theta=5e5, rms_norm_eps=1e-5, max_position_embeddings=77),
    vit=replace(TINY.vit, num_layers=1, max_patches_per_side=12, layer_norm_eps=1e-5),
    vae=replace(TINY.vae, ch_mult=(1, 2), z_channels=8, scale_factor=0.5),
    latent_patch_size=1,
    max_latent_size=9,
    vae_transform=ResizeRule(18, 6, 6),
    interpolate_pos=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "new" / "model"
    make_random_checkpoint(folder, TINY, seed=3, shard_bytes=200_000, tokenizer=CHECKPOINT)
    return folder


def all_slots(model):
    return {(stem, name): slot for stem, slots in model.weight_slots().items() for name, slot in slots.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_and_randomized_model_have_the_same_weights(folder, dtype):
    loaded = all_slots(Bagel.from_pretrained(folder, device="cpu", dtype=dtype).model)
    model = BagelModel.allocate(TINY, (0, 0), "cpu", dtype)
    slots = all_slots(model)
    for slot in slots.values():
        slot.view.fill_(torch.nan)
    randomize_(model, seed=3)
    assert loaded.keys() == slots.keys()
    for key, slot in slots.items():
        assert torch.equal(slot.view, loaded[key].view), key


def test_weights_depend_on_the_seed(folder):
    other = random_tensor("language_model.lm_head.weight", (384, 64), torch.bfloat16, seed=4)
    same = random_tensor("language_model.lm_head.weight", (384, 64), torch.bfloat16, seed=3)
    assert torch.equal(same, Bagel.from_pretrained(folder, device="cpu", dtype=torch.bfloat16).model.weights.lm_head)
    assert (other == same).float().mean() < 0.1


def test_weights_depend_on_the_tensor_name():
    a, b = (random_tensor(f"connector.fc{i}.weight", (64, 96), torch.float32, seed=0) for i in "12")
    assert (a == b).float().mean() < 0.01


@pytest.mark.slow
def test_weights_do_not_depend_on_process_or_thread_count():
    script = (
        "import hashlib, os, torch; from bagel_rt.models.bagel.random_checkpoint import random_tensor\n"
        "os.cpu_count = lambda: int(os.environ['CPUS'])\n"
        "w = random_tensor('x.weight', (1100, 4000), torch.bfloat16, 5)\n"  # more than one chunk
        "print(hashlib.sha256(w.view(torch.uint8).numpy()).hexdigest())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": salt, "CPUS": cpus},
            capture_output=True, text=True, check=True,
        ).stdout
        for salt, cpus in (("1", "1"), ("2", "3"))
    }  # fmt: skip
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "name, shape, mean, deviation",
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", (512, 256), 0, 1 / 16),
        ("language_model.model.layers.0.self_attn.q_proj.bias", (40_000,), 0, 0.02),
        ("language_model.model.layers.0.self_attn.q_norm_moe_gen.weight", (40_000,), 1, 0.1),
        ("vit_model.vision_model.post_layernorm.weight", (40_000,), 1, 0.1),
        ("encoder.conv_in.weight", (512, 64, 3, 3), 0, 1 / 24),
        ("decoder.mid.block_1.norm1.weight", (40_000,), 1, 0.1),
    ],
)
def test_mean_and_deviation_of_each_kind_of_weight(name, shape, mean, deviation):
    tensor = random_tensor(name, shape, torch.float32, 0)
    assert tensor.shape == shape
    assert abs(tensor.mean() - mean) < 4 * deviation / tensor.numel() ** 0.5
    assert abs(tensor.std() / deviation - 1) < 0.05


def test_position_tables_are_sincos_tables(folder):
    weights = Bagel.from_pretrained(folder, device="cpu").model.weights
    for table, side in ((weights.latent_positions, TINY.max_latent_size), (weights.vit_positions, 10)):
        assert torch.equal(table, sincos_table(64, side).bfloat16().float())


def test_folder_has_the_official_layout(folder):
    assert BagelConfig.from_folder(folder) == TINY
    names = set(os.listdir(folder))
    shards = sorted(name for name in names if name.startswith("ema-"))
    assert len(shards) > 2
    assert names - set(shards) == {
        "config.json", "llm_config.json", "vit_config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "vocab.json", "merges.txt", "ema.safetensors.index.json", "ae.safetensors",
    }  # fmt: skip
    assert len({(folder / name).stat().st_mode for name in names}) == 1
    stored = {}
    for file in (*shards, "ae.safetensors"):
        with safe_open(folder / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                stored[name] = tensors.get_slice(name)
    published = {}
    for file in ("ema.safetensors", "ae.safetensors"):
        with safe_open(CHECKPOINT / file, "pt") as tensors:
            published |= {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
    assert stored.keys() == published.keys()
    for name, part in published.items():
        assert (part.get_dtype(), part.get_shape()) == (stored[name].get_dtype(), stored[name].get_shape()), name


def test_json_files_have_what_the_official_loader_reads(folder):
    # The official code builds the ViT's position table from image_size and patch_size (default 224 and 16), and the
    # autoencoder from all of these values.
    vit = json.loads((folder / "vit_config.json").read_text())
    assert vit["image_size"] == json.loads((CHECKPOINT / "vit_config.json").read_text())["image_size"] == 140
    vae = json.loads((folder / "config.json").read_text())["vae_config"]
    assert vae == json.loads((CHECKPOINT / "config.json").read_text())["vae_config"]
    published = official_json(BAGEL_7B_MOT)
    assert (
        published["vit_config.json"]["image_size"] == 980
        and published["config.json"]["vae_config"]["resolution"] == 256
    )


def test_random_model_generates_edits_and_answers(folder):
    bagel = Bagel.from_pretrained(folder, device="cpu")
    generated = bagel.generate("a fox", size=(64, 48), num_timesteps=5, seed=1, think=True, max_think_token_n=5)
    edited = bagel.edit(generated.image, "in snow", num_timesteps=5, seed=1)
    for result in (generated, edited):
        assert torch.isfinite(result.latents).all() and 0.1 < result.latents.std() < 100
        low, high = zip(*result.image.getextrema(), strict=True)
        assert min(high) - max(low) > 20  # neither constant nor saturated
    assert isinstance(bagel.chat("what is it?", generated.image, max_think_token_n=5), str)


@pytest.mark.parametrize("config", [BAGEL_7B_MOT, TINY, ODD], ids=["published", "tiny", "non-default values"])
def test_configuration_round_trips_through_json(config, tmp_path):
    for name, content in official_json(config).items():
        (tmp_path / name).write_text(json.dumps(content))
    assert BagelConfig.from_folder(tmp_path) == config


def test_published_model_has_14_billion_parameters_and_29_gb():
    shapes = {stem: [slot.shape for slot in slots.values()] for stem, slots in
              BagelModel.allocate(BAGEL_7B_MOT, (0, 0), "meta", torch.bfloat16).weight_slots().items()}  # fmt: skip
    count = {stem: sum(torch.Size(shape).numel() for shape in shapes[stem]) for stem in shapes}
    assert 14.6e9 < count["ema"] < 14.8e9 and 29.1e9 < 2 * count["ema"] < 29.6e9
    assert 8.3e7 < count["ae"] < 8.5e7


def test_insufficient_disk_space_is_detected_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=29_000_000_000))
    with pytest.raises(ValueError, match=r"must have 29\.\d GB free, got 29\.0 GB"):
        make_random_checkpoint(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("existed", [True, False], ids=["in an empty folder", "in a new folder"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interruption_leaves_no_files(tmp_path, monkeypatch, error, existed):
    def fail(*_):
        raise error

    folder = tmp_path / "model"
    if existed:
        folder.mkdir()
    monkeypatch.setattr("bagel_rt.models.bagel.random_checkpoint.sincos_table", fail)
    with pytest.raises(error):
        make_random_checkpoint(folder, TINY, tokenizer=CHECKPOINT)
    assert folder.exists() == existed and (not existed or os.listdir(folder) == [])


@pytest.mark.parametrize(
    "config, message",
    [
        pytest.param(
            replace(TINY, llm=replace(TINY.llm, vocab_size=365)),
            "vocab_size must be at least 366, .* of the tokenizer in checkpoint, got 365",
            id="small vocabulary",
        ),
        pytest.param(
            replace(TINY, llm=replace(TINY.llm, head_dim=32)), "head_dim must be 16, got 32", id="free head size"
        ),
    ],
)
def test_rejects_configurations_that_json_cannot_express(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_random_checkpoint(tmp_path / "model", config, tokenizer=CHECKPOINT)
    assert os.listdir(tmp_path) == []


def test_command_writes_a_usable_model(tmp_path):
    def run(*args):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        return result

    result = run("make-random-checkpoint", tmp_path / "m", "--like", CHECKPOINT, "--seed", 2, "--json")
    assert result.stderr.splitlines()[-1] == "random weights: 100% of 0.0 GB"  # not a terminal
    quiet = run("make-random-checkpoint", tmp_path / "q", "--like", CHECKPOINT, "--seed", 2, "--json", "--no-progress")
    assert quiet.stderr == ""
    assert (tmp_path / "m" / "ema.safetensors").is_file()  # one file, as the official code expects
    report = json.loads(result.stdout)
    assert (report["folder"], report["seed"]) == (str(tmp_path / "m"), 2) and report["bytes"] > 2_900_000
    run("generate", "x", "-o", tmp_path / "x.png", "--model", tmp_path / "m", "--num-timesteps", 3)
    assert (tmp_path / "x.png").stat().st_size > 1000
