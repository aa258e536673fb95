"""Recorded behaviour of the official code, case by case, through the same function as ``bagel-rt conformance``."""

from importlib import import_module

import pytest
import torch
from conftest import CHECKPOINT, PACK

from bagel_rt import Bagel
from bagel_rt.conformance import find_cases, run_case
from bagel_rt.conformance.compare import agree, compare

UNSUPPORTED = {"50_taylorseer_t2i", "51_taylorseer_edit"}


@pytest.fixture(scope="module")
def bagel():
    return Bagel.from_pretrained(CHECKPOINT, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("case", find_cases(PACK), ids=lambda case: case.name)
def test_case(bagel, case):
    report = run_case(bagel, PACK, case)
    failed = [f"{c.name}: {c.error:.1e} > {c.tolerance:.0e} {c.note}" for c in report.comparisons if not c.passed]
    assert not failed, "\n".join(failed)
    assert report.passed != bool(report.skipped)
    assert (case.name in UNSUPPORTED) == bool(report.skipped)


def test_the_pack_is_whole():
    assert len(find_cases(PACK)) == 38


@pytest.mark.parametrize("break_it", ["attention scale", "norm epsilon", "expert of the markers", "rope theta"])
def test_a_wrong_model_fails(bagel, break_it, monkeypatch):
    model = bagel.model
    if break_it == "attention scale":
        module = import_module("bagel_rt.kernels.attention")  # the package has the function under this name
        monkeypatch.setattr(module, "check_scale", lambda op, scale, D: 1.01 * D**-0.5)
    elif break_it == "norm epsilon":
        monkeypatch.setattr(model.transformer, "config", _changed(model.config.llm, rms_norm_eps=1e-4))
    elif break_it == "rope theta":
        monkeypatch.setattr(model.rope, "theta", 9e5)
    else:
        swapped = [
            _changed(layer, input_norm=type(layer.input_norm)(*reversed(layer.input_norm)))
            for layer in model.weights.layers
        ]
        monkeypatch.setattr(model.transformer, "layers", swapped)
    report = run_case(bagel, PACK, PACK / "cases" / "20_edit_text_channel")
    assert report.comparisons and not report.passed


def _changed(instance, **fields):
    from dataclasses import replace

    return replace(instance, **fields)


def test_comparisons_notice_what_they_should():
    want = torch.tensor([1.0, -2.0])
    assert compare("x", want + 9e-5, want).passed and not compare("x", want + 2e-4, want).passed
    assert not compare("x", torch.zeros(3), want).passed and "shape" in compare("x", torch.zeros(3), want).note
    assert not compare("x", torch.tensor([float("nan"), -2.0]), want).passed
    assert not compare("i", torch.tensor([1]), torch.tensor([2])).passed
    assert agree("a", [1, 2], [1, 2]).passed and not agree("a", [1, 2], [1, 3]).passed


@pytest.fixture
def copied(tmp_path):
    import shutil

    case = tmp_path / "cases" / "32_und_text_only"
    shutil.copytree(PACK / "cases" / case.name, case)
    return tmp_path, case


def test_a_case_without_its_tensors_fails(bagel, copied):
    pack, case = copied
    (case / "tensors.safetensors").unlink()
    report = run_case(bagel, pack, case)
    assert not report.passed and "tensors.safetensors" in report.comparisons[0].name


def test_a_case_whose_meta_is_broken_fails_and_does_not_stop_the_run(bagel, copied):
    pack, case = copied
    (case / "meta.json").write_text("{")
    assert not run_case(bagel, pack, case).passed


def test_a_failure_by_nan_is_the_worst(bagel, copied):
    from safetensors.torch import load_file, save_file

    pack, case = copied
    golden = load_file(case / "tensors.safetensors")
    golden["u00_text.hidden"][0, 0] = float("nan")
    save_file(golden, case / "tensors.safetensors")
    report = run_case(bagel, pack, case)
    assert not report.passed and report.worst.name == "u00_text.hidden"
