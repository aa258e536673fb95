"""Every case of the conformance pack, and how failures are reported."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import CHECKPOINT, PACK
from PIL import Image
from safetensors.torch import load_file, save_file

from bagel_rt import Bagel
from bagel_rt.conformance import find_cases, run_case
from bagel_rt.conformance.bagel.training import every_nth_row
from bagel_rt.conformance.compare import compare_tensors, compare_values
from bagel_rt.kernels import qk_norm_rope

UNSUPPORTED = {"50_taylorseer_t2i", "51_taylorseer_edit"}


@pytest.fixture(scope="module")
def bagel():
    return Bagel.from_pretrained(CHECKPOINT, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("case", find_cases(PACK), ids=lambda case: case.name)
def test_case_passes_or_is_unsupported(bagel, case):
    report = run_case(bagel, PACK, case)
    failed = [f"{c.name}: {c.error:.1e} > {c.tolerance:.0e} {c.note}" for c in report.comparisons if not c.passed]
    assert not failed, "\n".join(failed)
    assert report.passed != bool(report.skipped)
    assert (case.name in UNSUPPORTED) == bool(report.skipped)


def test_pack_has_all_cases():
    assert len(find_cases(PACK)) == 38


# Small errors in a model must fail


def fails(bagel) -> bool:
    report = run_case(bagel, PACK, PACK / "cases" / "20_edit_text_channel")
    return bool(report.comparisons) and not report.passed


def test_wrong_attention_scale_fails(bagel, monkeypatch):
    # Scaling the queries scales the attention scores.
    monkeypatch.setattr("bagel_rt.models.bagel.transformer.qk_norm_rope", lambda *args: 1.01 * qk_norm_rope(*args))
    assert fails(bagel)


def test_wrong_norm_epsilon_fails(bagel, monkeypatch):
    monkeypatch.setattr(bagel.model.transformer, "config", replace(bagel.model.config.llm, rms_norm_eps=1e-4))
    assert fails(bagel)


def test_wrong_rope_theta_fails(bagel, monkeypatch):
    monkeypatch.setattr(bagel.model.rope, "theta", 9e5)
    assert fails(bagel)


def test_swapped_experts_fail(bagel, monkeypatch):
    swapped = [
        replace(layer, input_norm=type(layer.input_norm)(*reversed(layer.input_norm)))
        for layer in bagel.model.weights.layers
    ]
    monkeypatch.setattr(bagel.model.transformer, "layers", swapped)
    assert fails(bagel)


# Comparisons


def test_tensors_pass_within_the_tolerance():
    recorded = torch.tensor([1.0, -2.0])  # the tolerance is relative to the largest magnitude, 2
    assert compare_tensors("x", recorded + 9e-5, recorded).passed
    assert not compare_tensors("x", recorded + 2e-4, recorded).passed


def test_another_shape_fails_with_both_shapes_in_the_note():
    comparison = compare_tensors("x", torch.zeros(3), torch.zeros(2))
    assert not comparison.passed and comparison.note == "shape (3,), recorded (2,)"


def test_nan_fails():
    assert not compare_tensors("x", torch.tensor([float("nan"), -2.0]), torch.tensor([1.0, -2.0])).passed


def test_integers_must_be_equal():
    assert not compare_tensors("x", torch.tensor([1]), torch.tensor([2])).passed
    assert compare_values("x", [1, 2], [1, 2]).passed and not compare_values("x", [1, 2], [1, 3]).passed


# What packs may write in another way


def edit_meta(case, change) -> None:
    path = case / "meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


@pytest.fixture
def copy_case(tmp_path):
    """Copies a case, and the images, into a pack of its own."""

    def copy(name):
        shutil.copytree(PACK / "images", tmp_path / "images", dirs_exist_ok=True)
        return tmp_path, shutil.copytree(PACK / "cases" / name, tmp_path / "cases" / name)

    return copy


def test_order_of_keys_does_not_matter(bagel, copy_case):
    for name, key in (("00_tokenizer", "special_token_ids"), ("10_t2i_nocfg_shift1", "outputs")):
        pack, case = copy_case(name)

        def reverse(meta, key=key):
            reversed_keys = [dict(reversed(part.items())) for part in (meta[key] if key == "outputs" else [meta[key]])]
            meta[key] = reversed_keys if key == "outputs" else reversed_keys[0]

        edit_meta(case, reverse)
        assert run_case(bagel, pack, case).passed, name


@pytest.mark.parametrize("stride", [1, 5, 11, 37])
def test_hidden_rows_may_be_recorded_in_any_stride(stride, bagel, copy_case):
    pack, case = copy_case("60_train_packed")
    golden = load_file(case / "tensors.safetensors")
    golden["last_hidden_rows"] = golden["last_hidden_rows"][::stride].contiguous()  # of every seventh row
    save_file(golden, case / "tensors.safetensors")
    report = run_case(bagel, pack, case)
    assert report.passed, report.worst


def testevery_nth_row_finds_the_stride_that_lengths_leave_open():
    rows = torch.arange(100.0)[:, None]  # strides 10 and 11 both leave 10 rows
    for stride in (1, 7, 10, 11, 60, 100):
        assert torch.equal(every_nth_row(rows, rows[::stride]), rows[::stride])


def test_images_are_converted_as_by_the_official_code(bagel, copy_case):
    pack, case = copy_case("30_und_basic")
    Image.open(pack / "images/a.png").convert("RGB").save(pack / "images/rgb.png")
    image = Image.open(pack / "images/rgb.png")
    levels = image.convert("L")
    Image.merge("LA", (levels, levels)).save(pack / "images/a.png")  # the official code drops the alpha channel
    with_alpha = run_case(bagel, pack, case)
    levels.save(pack / "images/a.png")
    without = run_case(bagel, pack, case)
    assert [(item.name, item.error) for item in with_alpha.comparisons] == [
        (item.name, item.error) for item in without.comparisons
    ]


# Damaged cases


@pytest.fixture
def copied_case(tmp_path):
    case = tmp_path / "cases" / "32_und_text_only"
    shutil.copytree(PACK / "cases" / case.name, case)
    return tmp_path, case


def test_case_without_tensors_fails(bagel, copied_case):
    pack, case = copied_case
    (case / "tensors.safetensors").unlink()
    report = run_case(bagel, pack, case)
    assert not report.passed and "tensors.safetensors" in report.comparisons[0].name


def test_case_with_invalid_meta_fails_without_an_exception(bagel, copied_case):
    pack, case = copied_case
    (case / "meta.json").write_text("{")
    assert not run_case(bagel, pack, case).passed


def test_nan_is_the_worst_comparison(bagel, copied_case):
    pack, case = copied_case
    golden = load_file(case / "tensors.safetensors")
    golden["u00_text.hidden"][0, 0] = float("nan")
    save_file(golden, case / "tensors.safetensors")
    report = run_case(bagel, pack, case)
    assert not report.passed and report.worst.name == "u00_text.hidden"


def test_uncompared_tensor_fails(bagel, copied_case):
    pack, case = copied_case
    golden = load_file(case / "tensors.safetensors")
    save_file(golden | {"extra": torch.zeros(1)}, case / "tensors.safetensors")
    report = run_case(bagel, pack, case)
    assert not report.passed and report.worst.note == "['extra'], recorded []"
