"""Prompts, seeds, sizes and dtypes as users pass them."""

import json

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT
from PIL import Image

from bagel_rt import Bagel
from bagel_rt.models.bagel.workload import resolve_dtype
from bagel_rt.request import as_size, is_visible, resolve_seeds

PHOTO = Image.new("RGB", (32, 32), "red")
INVISIBLE = {
    "empty": "",
    "spaces": " \t\n\u00a0\u3000",
    "zero-width characters": "\u200b\u200d\ufeff\u2060",
    "control characters": "\x00\x07\x7f",
    "direction marks": "\u200e\u202e\u2069",
    "combining marks": "\u0301\ufe0f\u034f",
    "blank letters": "\u3164\u115f\uffa0\u2800",
    "soft hyphens and tags": "\u00ad\U000e0061",
}
CALLS = {
    "generate": (lambda b, text: b.generate(text), "Describe the image"),
    "generate a batch": (lambda b, text: b.generate(["a", text]), "Describe the image"),
    "edit": (lambda b, text: b.edit(PHOTO, text), "Describe the change"),
    "chat": (lambda b, text: b.chat(text), "Ask a question"),
    "stream": (lambda b, text: b.stream(text), "Ask a question"),
    "chat with an image": (lambda b, text: b.chat(text, PHOTO), "Ask a question"),
    "interleave": (lambda b, text: b.interleave([text, text]), "Add a text or an image"),
}
INTEGERS = [np.int64(7), np.uint8(7), np.array(7), torch.tensor(7), torch.tensor(7, dtype=torch.uint8)]
NOT_INTEGERS = [True, np.True_, torch.tensor(True), np.array(True), 7.0, np.float32(7), torch.tensor(7.0), "7"]


@pytest.mark.parametrize("text", INVISIBLE.values(), ids=INVISIBLE)
@pytest.mark.parametrize("call, remedy", CALLS.values(), ids=CALLS)
def test_rejects_a_prompt_without_visible_characters(bagel, call, remedy, text):
    with pytest.raises(ValueError, match=f"at least one visible character, got .*{remedy}"):
        call(bagel, text)


@pytest.mark.parametrize("text", ["a", ".", "0", "\u200bx", "\U0001f680", "e\u0301", "\u732b", "$", "\U000f0001"])
def test_accepts_a_prompt_with_a_visible_character(text):
    assert is_visible(text)


def test_interleave_accepts_an_image_without_text(bagel):
    assert bagel.interleave([PHOTO, ""], max_rounds=1, max_think_token_n=2)


@pytest.mark.parametrize("seed", INTEGERS, ids=repr)
def test_integers_of_numpy_and_torch_are_seeds(bagel, seed):
    result = bagel.generate("a", size=(32, 32), num_timesteps=2, seed=seed)
    assert result.seed == 7 and type(result.seed) is int
    assert (result.latents == bagel.generate("a", size=(32, 32), num_timesteps=2, seed=7).latents).all()
    assert resolve_seeds([seed, None], 2)[0] == 7


def test_array_of_seeds_has_one_per_prompt():
    assert resolve_seeds(np.arange(3), 3) == resolve_seeds(torch.arange(3), 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="seed must be one value for all prompts or a list of 2"):
        resolve_seeds(np.arange(3), 2)


@pytest.mark.parametrize("seed", NOT_INTEGERS, ids=repr)
def test_rejects_seeds_that_are_not_integers(seed):
    with pytest.raises(ValueError, match="seed must be an integer from 0 to 9223372036854775807, got"):
        resolve_seeds(seed, 1)


@pytest.mark.parametrize("side", INTEGERS, ids=repr)
def test_integers_of_numpy_and_torch_are_sides(bagel, side):
    size = bagel.check_size((side * 16, np.int32(32)))
    assert size == (112, 32) and all(type(side) is int for side in size)


def test_arrays_and_torch_sizes_are_sizes():
    assert as_size(np.array([32, 64])) == as_size(torch.Size([32, 64])) == as_size(torch.tensor([32, 64])) == (32, 64)


@pytest.mark.parametrize("size", [*NOT_INTEGERS, (True, 32), (32.0, 32), "32x32", np.ones(2), np.eye(2)], ids=repr)
def test_rejects_sizes_that_are_not_two_integers(bagel, size):
    with pytest.raises(ValueError, match=r"size must be a pair of integers \(height, width\) in pixels, got"):
        bagel.check_size(size)


def test_hyperparameters_of_numpy_and_torch_become_built_in(bagel):
    numbers = {"num_timesteps": np.int64(2), "cfg_text_scale": np.float32(1.5), "timestep_shift": torch.tensor(2.0)}
    result = bagel.generate("a", size=(32, 32), cfg_interval=(np.float32(0.5), 1), **numbers)
    written = json.loads(json.dumps(result.parameters))
    assert [written[name] for name in numbers] == [2, 1.5, 2.0] and written["cfg_interval"] == [0.5, 1.0]


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtype_may_be_a_name(name):
    assert Bagel.from_pretrained(CHECKPOINT, device="cpu", dtype=name).model.dtype is torch.bfloat16


def test_dtypes_have_short_names():
    assert [resolve_dtype(name) for name in ("fp32", "fp16", "bf16")] == [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", ["fp8", "half", torch.float64, "", 16])
def test_rejects_other_dtypes(dtype):
    with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16 or float16 \(fp32, bf16 or fp16\), got"):
        resolve_dtype(dtype)
