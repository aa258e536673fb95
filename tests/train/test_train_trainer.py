"""The training loop: steps, stopping and resuming, export and validation."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from bagel_rt.errors import CheckpointError
from bagel_rt.pipeline import Bagel
from bagel_rt.train.export import save_checkpoint
from bagel_rt.train.objective import training_losses
from bagel_rt.train.packing import DropRates, Noised, Sample, SpecialTokens, Text, ViT
from bagel_rt.train.trainer import Trainer, TrainingSettings

CHECKPOINT = Path(__file__).parents[1] / "conformance" / "bagel" / "checkpoint"
TOKENS = SpecialTokens(353, 354, 361, 362)
SETTINGS = TrainingSettings(
    steps=6, tokens=60, learning_rate=3e-3, warmup_steps=2, drop=DropRates(0.5, 0.5, 0.5), seed=7
)


@pytest.fixture(scope="module")
def model():
    return Bagel.from_pretrained(CHECKPOINT, device="cpu").model


def draw(rng):
    def grid(features):
        return torch.from_numpy(rng.standard_normal((6, features), dtype=np.float32)), 2, 3

    text = rng.integers(0, 300, 4).tolist()
    if rng.random() < 0.5:
        return Sample([Text(text, droppable=True), Noised(*grid(64))])
    return Sample([ViT(*grid(588), droppable=True), Text([3, 4]), Text(text, loss=True)])


def trainer(model, folder, settings=SETTINGS, draw=draw):
    return Trainer(model, TOKENS, draw, settings, folder)


def everything(trainer):
    return {name: tensor.clone() for name, tensor in trainer._tensors().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# Steps


def test_defaults_are_the_official_settings(model, tmp_path):
    group = trainer(model, tmp_path)._optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-15, 0.0)
    assert TrainingSettings(steps=1).drop == DropRates(text=0.1, vit=0.5, clean=0.1)
    assert not TrainingSettings(steps=1).ce_reweighting


@pytest.mark.parametrize("micro_batches, reweighting", [(1, False), (3, False), (1, True)])
def test_step_matches_torch_adamw(model, tmp_path, micro_batches, reweighting):
    settings = replace(
        SETTINGS,
        micro_batches=micro_batches,
        clip=0.1,
        ce_weight=0.25,
        mse_weight=2.0,
        ce_reweighting=reweighting,
        timestep_shift=3.0,
    )
    run = trainer(model, tmp_path, settings)
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in run.parameters.trained().items()}
    optimizer = torch.optim.AdamW(leaves.values(), betas=(0.9, 0.95), eps=1e-15, weight_decay=0)
    average = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    clear = {name: torch.ones_like(leaf, dtype=torch.bool) for name, leaf in leaves.items()}
    for step in range(3):
        current = run.parameters.model(run.parameters.leaves | leaves)
        losses = [training_losses(current, *run.data(step, micro_batch), 3.0) for micro_batch in range(micro_batches)]
        ces = [loss.ce_reweighted if reweighting else loss.ce for loss in losses]
        total = sum(0.25 * ce + 2 * loss.mse for ce, loss in zip(ces, losses, strict=True)) / micro_batches
        gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            leaf.grad = gradient * min(1.0, 0.1 / float(norm + 1e-6))
            clear[name] &= gradient.abs() > 1e-4 * norm  # AdamW amplifies gradients that are only rounding errors
        optimizer.param_groups[0]["lr"] = rate = 3e-3 * min(1, (step + 1) / 2)
        optimizer.step()
        record = run.train_step()
        assert record["norm"] == pytest.approx(float(norm), rel=1e-5)
        assert record["rate"] == pytest.approx(rate)
        assert record["ce"] == pytest.approx(sum(float(ce.detach()) for ce in ces) / micro_batches, rel=1e-5)
        decay, compared = (1 + step) / (10 + step), 0
        for name, leaf in leaves.items():
            trained = run.parameters.leaves[name].detach()
            torch.testing.assert_close(trained[clear[name]], leaf.detach()[clear[name]], rtol=1e-5, atol=1e-5)
            compared += int(clear[name].sum())
            leaf.data.copy_(trained)
            average[name] = decay * average[name] + (1 - decay) * trained
            torch.testing.assert_close(run._average[name], average[name], rtol=1e-6, atol=1e-6)
        assert compared > 1000


def test_learning_rate_warms_up_stays_and_decays():
    settings = TrainingSettings(steps=10, learning_rate=1.0, warmup_steps=4, decay_steps=2)
    rates = [settings.learning_rate_at(step) for step in range(10)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5]


def test_ema_decay_is_small_at_first():
    settings = TrainingSettings(steps=10, ema=0.9)
    assert [settings.ema_at(step) for step in (0, 90, 10**6)] == [0.1, 0.9, 0.9]


def test_data_depends_only_on_seed_step_and_micro_batch(model, tmp_path):
    one, other = trainer(model, tmp_path / "one"), trainer(model, tmp_path / "other")
    other.train_step()
    for step in (0, 4):
        (batch, latents, noise), (same, same_latents, same_noise) = one.data(step), other.data(step)
        assert torch.equal(latents, same_latents) and torch.equal(noise, same_noise)
        assert torch.equal(batch.packed_text_ids, same.packed_text_ids)
        assert torch.equal(batch.packed_timesteps, same.packed_timesteps)
    assert len({tuple(one.data(step)[0].packed_text_ids.tolist()) for step in range(5)}) == 5
    other = trainer(model, tmp_path / "a", replace(SETTINGS, seed=8))
    assert not any(torch.equal(data[2][:2], one.data(0)[2][:2]) for data in (other.data(0), one.data(0, micro_batch=1)))


def test_parallel_micro_batches_are_deterministic(model, tmp_path):
    runs = [trainer(model, tmp_path / name, replace(SETTINGS, micro_batches=4)) for name in "ab"]
    for _ in range(3):
        records = [run.train_step() | {"seconds": 0} for run in runs]
        assert records[0] == records[1]
    assert_equal(*map(everything, runs))


def test_trains_on_batches_without_images(model, tmp_path):
    run = trainer(model, tmp_path, draw=lambda rng: Sample([Text([1, 2, 3, 4], loss=True)]))
    first = [run.train_step() for _ in range(6)]
    assert first[-1]["ce"] < first[0]["ce"] and first[0]["mse"] == 0


def test_overfits_one_image(model, tmp_path):
    image = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    settings = TrainingSettings(steps=80, tokens=60, learning_rate=5e-3, warmup_steps=5)
    run = trainer(model, tmp_path, settings, lambda rng: Sample([Text([1, 2], loss=True), Noised(image, 2, 3)]))
    assert run.run(progress=False)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first, last = (np.mean([record["mse"] for record in micro_batch]) for micro_batch in (records[:5], records[-5:]))
    assert last < first / 2
    assert records[-1]["ce"] < 0.1


# Stopping and resuming


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_resumed_run_equals_uninterrupted_run(model, tmp_path, bfloat16):
    settings = replace(SETTINGS, bfloat16=bfloat16)
    whole = trainer(model, tmp_path / "whole", settings)
    assert whole.run(progress=False)
    first = trainer(model, tmp_path / "micro_batches", replace(settings, steps=2))
    assert first.run(progress=False)
    second = trainer(model, tmp_path / "micro_batches", settings)
    assert second.step == 2
    assert_equal(everything(first), everything(second))
    assert second.run(progress=False)
    assert_equal(everything(second), everything(whole))
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "micro_batches")]
    kept = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    assert kept[0] == kept[1] and [record["step"] for record in kept[0]] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_saves_and_resuming_truncates_the_log(model, tmp_path):
    def interrupted(rng):
        if run.step == 3:
            raise KeyboardInterrupt
        return draw(rng)

    run = trainer(model, tmp_path, draw=interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run(progress=False)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 4}\n')  # a step after the last save
    resumed = trainer(model, tmp_path)
    assert resumed.step == 3
    assert_equal(everything(run), everything(resumed))
    assert resumed.run(progress=False)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_partial_step_is_not_saved(model, tmp_path, monkeypatch):
    run = trainer(model, tmp_path, replace(SETTINGS, steps=2))
    run.run(progress=False)
    before = everything(run)
    again = trainer(model, tmp_path)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(again, "_update_average", interrupted)
    with pytest.raises(KeyboardInterrupt):
        again.run(progress=False)
    resumed = trainer(model, tmp_path)
    assert resumed.step == 2
    assert_equal(everything(resumed), before)


def test_run_stops_at_the_time_limit(model, tmp_path):
    run = trainer(model, tmp_path)
    assert run.run(seconds=0.0, progress=False) is False
    assert run.step == 0 and (tmp_path / "state.safetensors").exists()


def test_failed_save_keeps_the_previous_state(model, tmp_path, monkeypatch):
    run = trainer(model, tmp_path)
    run.train_step()
    run.save()
    before = everything(run)
    run.train_step()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        run.save()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("state*")] == ["state.safetensors"]
    assert_equal(everything(trainer(model, tmp_path)), before)


# Export


def test_export_has_averaged_weights_in_bfloat16(model, tmp_path):
    run = trainer(model, tmp_path / "run")
    run.run(progress=False)
    averaged = run.averaged()
    save_checkpoint(averaged, tmp_path / "model", CHECKPOINT)
    read = Bagel.from_pretrained(tmp_path / "model", device="cpu").model
    assert read.config == model.config
    for stem, places in averaged.weight_slots().items():
        for name, place in places.items():
            expected = place.view.to(torch.bfloat16).float() if stem == "ema" else place.view
            assert torch.equal(read.weight_slots()[stem][name].view, expected), name
    with safe_open(tmp_path / "model" / "ema.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 - not iterable
    assert not torch.equal(read.weights.lm_head, model.weights.lm_head)
    save_checkpoint(read, tmp_path / "model", tmp_path / "model")  # overwrites its own folder


def test_export_rejects_missing_tokenizer_files(model, tmp_path):
    with pytest.raises(CheckpointError, match="must contain merges.txt, tokenizer.json"):
        save_checkpoint(model, tmp_path / "model", tmp_path)
    assert not (tmp_path / "model").exists()


def test_export_rejects_non_finite_weights(model, tmp_path):
    run = trainer(model, tmp_path / "run")
    run._average["lm_head"][0, 0] = math.nan
    with pytest.raises(CheckpointError, match="language_model.lm_head.weight must be finite"):
        save_checkpoint(run.averaged(), tmp_path / "model", CHECKPOINT)
    assert not (tmp_path / "model").exists()


# Validation


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0, got 0.0"),
        ({"ema": 1.5}, "ema must be a number from 0 to 1, got 1.5"),
        ({"clip": math.nan}, "clip must be a number > 0, got nan"),
    ],
)
def test_rejects_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_rejects_state_of_other_settings(model, tmp_path):
    trainer(model, tmp_path).save()
    with pytest.raises(CheckpointError, match="learning_rate must be 0.003 to resume .*, got 0.001"):
        trainer(model, tmp_path, replace(SETTINGS, learning_rate=1e-3))
    assert trainer(model, tmp_path, replace(SETTINGS, steps=100, decay_steps=5)).step == 0


def test_rejects_file_that_is_not_a_state(model, tmp_path):
    (tmp_path / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is not a training state"):
        trainer(model, tmp_path)


def test_non_finite_loss_stops_the_run(model, tmp_path):
    def broken(rng):
        return Sample([Noised(torch.full((6, 64), math.nan), 2, 3)])

    run = trainer(model, tmp_path, draw=broken)
    before = everything(run)
    with pytest.raises(RuntimeError, match="non-finite"):
        run.run(progress=False)
    assert_equal(everything(run), before)
