"""Bad input to ``Bagel``: refused before any work, naming the value and what is allowed."""

import numpy as np
import pytest
import torch
from PIL import Image

from bagel_rt import Bagel

REFUSED = {
    "scale that is negative": (dict(cfg_text_scale=-1), "cfg_text_scale must be a number from 0 to 100, got -1"),
    "scale that is not finite": (dict(cfg_img_scale=float("nan")), "cfg_img_scale must be .* got nan"),
    "scale that is text": (dict(cfg_text_scale="4"), "cfg_text_scale must be .* got '4'"),
    "interval above one": (dict(cfg_interval=(0.4, 1.5)), r"cfg_interval must be .* got \(0.4, 1.5\)"),
    "interval that is reversed": (dict(cfg_interval=(0.9, 0.1)), "low <= high"),
    "interval of one number": (dict(cfg_interval=(0.4,)), "cfg_interval must be"),
    "interval that is a number": (dict(cfg_interval=0.4), "cfg_interval must be .* got 0.4"),
    "renorm the official app lists and its model rejects": (
        dict(cfg_renorm_type="local"),
        "cfg_renorm_type must be global, channel or text_channel, got 'local'",
    ),
    "renorm minimum above one": (dict(cfg_renorm_min=2), "cfg_renorm_min must be .* got 2"),
    "shift of zero": (dict(timestep_shift=0), "timestep_shift must be .* got 0"),
    "one timestep": (dict(num_timesteps=1), "num_timesteps must be an integer from 2 to 1000, got 1"),
    "fractional timesteps": (dict(num_timesteps=10.0), "num_timesteps must be .* got 10.0"),
    "too many timesteps": (dict(num_timesteps=10**9), "num_timesteps must be .* got 1000000000"),
    "no thinking tokens": (dict(max_think_token_n=0), "max_think_token_n must be .* got 0"),
    "sampling that is no flag": (dict(do_sample="yes"), "do_sample must be true or false, got 'yes'"),
    "negative top_k": (dict(top_k=-1), "top_k must be an integer from 0"),
    "top_p of zero": (dict(top_p=0), "top_p must be .* got 0"),
    "top_p above one": (dict(top_p=1.5), "top_p must be .* got 1.5"),
    "a list for one prompt": (dict(cfg_text_scale=[3.0, 4.0]), r"cfg_text_scale must be .* got \[3.0, 4.0\]"),
    "temperature of zero": (dict(text_temperature=0), "text_temperature must be .* got 0.*do_sample=False"),
    "size that is no multiple": (dict(size=(100, 96)), "multiples of 16 from 16 to 256, got 96x100"),
    "size beyond the position table": (dict(size=(64, 1024)), "got 1024x64"),
    "size of zero": (dict(size=(0, 64)), "got 64x0"),
    "size of three numbers": (dict(size=(64, 64, 3)), "size must be"),
    "size that is fractional": (dict(size=(64.0, 64)), "size must be"),
    "negative seed": (dict(seed=-1), "seed must be an integer from 0"),
    "seed too large": (dict(seed=2**63), "seed must be .* got 9223372036854775808"),
    "fractional seed": (dict(seed=1.5), "seed must be .* got 1.5"),
    "seeds for other prompts": (dict(seed=[1, 2]), "one per prompt"),
    "noise of another shape": (
        dict(noise=torch.zeros(3, 64), size=(32, 32)),
        r"noise: tensors of shape \[\(3, 64\)\] were given",
    ),
    "noise that is not finite": (
        dict(noise=torch.full((4, 64), torch.nan), size=(32, 32)),
        "holds NaN",
    ),
    "noise that is not a tensor": (dict(noise=np.zeros((4, 64)), size=(32, 32)), "noise: give a torch tensor"),
    "more noise than is drawn": (dict(noise=[torch.zeros(4, 64)] * 2, size=(32, 32)), "noise: tensors of shape"),
    "negative prompt that is no text": (dict(negative_prompt=3), "a text is a int"),
    "negative prompts for one prompt": (dict(negative_prompt=["a"]), "a text is a list"),
    "thinking that is no flag": (dict(think="yes"), "think must be true or false, got 'yes'"),
}


REFUSED_LISTS = {
    "too few": (
        dict(cfg_text_scale=[3.0]),
        r"cfg_text_scale must be .* or a list of 2, one per prompt, got \[3.0\]",
    ),
    "a bad entry": (dict(cfg_renorm_min=[0.0, 3.0]), "cfg_renorm_min must be a number from 0 to 1, got 3.0"),
    "an interval of three": (
        dict(cfg_interval=[0.1, 0.2, 0.3]),
        r"cfg_interval must be .* got \[0.1, 0.2, 0.3\]",
    ),
    "thinking of others": (dict(think=[True]), r"think must be .* or a list of 2, one per prompt, got \[True\]"),
    "thinking that is no flag": (dict(think=[True, 1]), "think must be true or false, got 1"),
    "negative prompts for others": (dict(negative_prompt=["a"] * 3), "negative_prompt must be .* or a list of 2"),
    "intervals for others": (dict(cfg_interval=[(0.1, 0.2)] * 3), "or a list of 2, one per prompt"),
}


@pytest.mark.parametrize("options, message", REFUSED_LISTS.values(), ids=REFUSED_LISTS)
def test_a_batch_refuses_lists_that_do_not_fit_it(bagel, options, message):
    with pytest.raises(ValueError, match=message):
        bagel.generate(["a boat", "a house"], size=(16, 16), **options)


def test_two_numbers_in_a_list_are_one_interval(bagel):
    results = bagel.generate(["a", "b"], size=(16, 16), seed=1, num_timesteps=2, cfg_interval=[0.2, 0.8])
    assert [result.parameters["cfg_interval"] for result in results] == [(0.2, 0.8)] * 2


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_generate_refuses(bagel, options, message):
    used = bagel.cache.slots - bagel.cache.free_slots
    with pytest.raises(ValueError, match=message):
        bagel.generate("a boat", **options)
    assert bagel.cache.slots - bagel.cache.free_slots == used


WRONG_CALLS = {
    "an unknown hyper-parameter": (
        lambda b: b.generate("a", cfg_scale=3),
        TypeError,
        "unknown hyper-parameter cfg_scale",
    ),
    "an image hyper-parameter in a chat": (lambda b: b.chat("a", num_timesteps=3), TypeError, "num_timesteps"),
    "a prompt that is no text": (lambda b: b.generate(3), ValueError, "prompt"),
    "an empty batch": (lambda b: b.generate([]), ValueError, "1 to 64"),
    "a batch that is too large": (lambda b: b.generate(["a"] * 65), ValueError, "1 to 64"),
    "a batch with a number": (lambda b: b.generate(["a", 3]), ValueError, "an entry is a int"),
    "sizes for other prompts": (lambda b: b.generate(["a", "b"], size=[(16, 16)]), ValueError, "one per prompt"),
    "a prompt longer than the model's positions": (lambda b: b.generate("ab " * 20000), ValueError, "32768"),
    "a prompt of many megabytes": (lambda b: b.chat("a" * 10**8), ValueError, "characters"),
    "an image that does not exist": (lambda b: b.edit("no-such.png", "a"), FileNotFoundError, "no-such.png"),
    "bytes that are no image": (lambda b: b.edit(b"hello", "a"), ValueError, "5 bytes: not an image"),
    "an image that is a number": (lambda b: b.edit(3, "a"), ValueError, "int"),
    "an instruction that is no text": (lambda b: b.edit(Image.new("RGB", (8, 8)), None), ValueError, "prompt"),
    "an edit without an image": (lambda b: b.edit([], "a"), ValueError, "image"),
    "too many images": (lambda b: b.chat("a", [Image.new("RGB", (8, 8))] * 65), ValueError, "at most 64"),
    "no rounds": (lambda b: b.interleave(["a"], max_rounds=0), ValueError, "max_rounds must be .* got 0"),
    "no inputs": (lambda b: b.interleave([]), ValueError, "inputs"),
    "an input that is a number": (lambda b: b.interleave(["a", 5]), ValueError, "int"),
    "a folder that is not there": (
        lambda b: Bagel.from_pretrained("no-such-folder"),
        FileNotFoundError,
        "no-such-folder",
    ),
    "a backend that does not exist": (lambda b: Bagel.from_pretrained(backend="fast"), ValueError, "backend='fast'"),
    "a GPU that is not here": (
        lambda b: Bagel.from_pretrained(device="cuda:99"),
        ValueError,
        "device is cuda:99, but torch sees",
    ),
    "a device that does not exist": (lambda b: Bagel.from_pretrained(device="gpu"), ValueError, "device is 'gpu'"),
    "a dtype that is no float": (lambda b: Bagel.from_pretrained(dtype=torch.int8), ValueError, "int8"),
}


@pytest.mark.parametrize("call, error, message", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_refuses(bagel, call, error, message):
    with pytest.raises(error, match=message):
        call(bagel)
