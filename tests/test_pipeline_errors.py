"""Invalid arguments of ``Bagel``: rejected before any computation, with the allowed values in the message."""

import numpy as np
import pytest
import torch
from PIL import Image

from bagel_rt import Bagel

INVALID_OPTIONS = {
    "negative scale": (dict(cfg_text_scale=-1), "cfg_text_scale must be a number from 0 to 100, got -1"),
    "NaN scale": (dict(cfg_img_scale=float("nan")), "cfg_img_scale must be .* got nan"),
    "string scale": (dict(cfg_text_scale="4"), "cfg_text_scale must be .* got '4'"),
    "interval beyond 1": (dict(cfg_interval=(0.4, 1.5)), r"cfg_interval must be .* got \(0.4, 1.5\)"),
    "reversed interval": (dict(cfg_interval=(0.9, 0.1)), "low <= high"),
    "interval of one number": (dict(cfg_interval=(0.4,)), "cfg_interval must be"),
    "number as interval": (dict(cfg_interval=0.4), "cfg_interval must be .* got 0.4"),
    "renorm that the official app lists but its model rejects": (
        dict(cfg_renorm_type="local"),
        "cfg_renorm_type must be global, channel or text_channel, got 'local'",
    ),
    "renorm minimum above 1": (dict(cfg_renorm_min=2), "cfg_renorm_min must be .* got 2"),
    "shift of zero": (dict(timestep_shift=0), "timestep_shift must be .* got 0"),
    "one timestep": (dict(num_timesteps=1), "num_timesteps must be an integer from 2 to 1000, got 1"),
    "fractional timesteps": (dict(num_timesteps=10.0), "num_timesteps must be .* got 10.0"),
    "too many timesteps": (dict(num_timesteps=10**9), "num_timesteps must be .* got 1000000000"),
    "zero thinking tokens": (dict(max_think_token_n=0), "max_think_token_n must be .* got 0"),
    "string as do_sample": (dict(do_sample="yes"), "do_sample must be true or false, got 'yes'"),
    "negative top_k": (dict(top_k=-1), "top_k must be an integer from 0"),
    "top_p of zero": (dict(top_p=0), "top_p must be .* got 0"),
    "top_p above one": (dict(top_p=1.5), "top_p must be .* got 1.5"),
    "list for a single prompt": (dict(cfg_text_scale=[3.0, 4.0]), r"cfg_text_scale must be .* got \[3.0, 4.0\]"),
    "temperature of zero": (dict(text_temperature=0), "text_temperature must be .* got 0.*do_sample off"),
    "size off the stride": (
        dict(size=(100, 96)),
        r"multiples of 16 from 16 to 256, got 96x100. As an argument it is \(height, width\)",
    ),
    "size beyond the position table": (dict(size=(64, 1024)), "got 1024x64"),
    "size of zero": (dict(size=(0, 64)), "got 64x0"),
    "size of three numbers": (dict(size=(64, 64, 3)), "size must be"),
    "fractional size": (dict(size=(64.0, 64)), "size must be"),
    "negative seed": (dict(seed=-1), "seed must be an integer from 0"),
    "seed too large": (dict(seed=2**63), "seed must be .* got 9223372036854775808"),
    "fractional seed": (dict(seed=1.5), "seed must be .* got 1.5"),
    "two seeds for one prompt": (dict(seed=[1, 2]), "one per prompt"),
    "noise of the wrong shape": (
        dict(noise=torch.zeros(3, 64), size=(32, 32)),
        r"noise must have tensors of shape \[\(4, 64\)\], got \[\(3, 64\)\]",
    ),
    "NaN noise": (dict(noise=torch.full((4, 64), torch.nan), size=(32, 32)), "noise must be finite, got NaN"),
    "array as noise": (dict(noise=np.zeros((4, 64)), size=(32, 32)), "noise must be a torch.Tensor or a list"),
    "too many noise tensors": (dict(noise=[torch.zeros(4, 64)] * 2, size=(32, 32)), "noise must have tensors"),
    "number as negative prompt": (dict(negative_prompt=3), "a text must be a str, got 3"),
    "negative prompts for one prompt": (dict(negative_prompt=["a"]), r"a text must be a str, got \['a'\]"),
    "string as think": (dict(think="yes"), "think must be true or false, got 'yes'"),
}


INVALID_LISTS = {
    "too few values": (
        dict(cfg_text_scale=[3.0]),
        r"cfg_text_scale must be .* or a list of 2, one per prompt, got \[3.0\]",
    ),
    "invalid entry": (dict(cfg_renorm_min=[0.0, 3.0]), "cfg_renorm_min must be a number from 0 to 1, got 3.0"),
    "interval of three numbers": (
        dict(cfg_interval=[0.1, 0.2, 0.3]),
        r"cfg_interval must be .* got \[0.1, 0.2, 0.3\]",
    ),
    "too few think flags": (dict(think=[True]), r"think must be .* or a list of 2, one per prompt, got \[True\]"),
    "number as think flag": (dict(think=[True, 1]), "think must be true or false, got 1"),
    "too many negative prompts": (dict(negative_prompt=["a"] * 3), "negative_prompt must be .* or a list of 2"),
    "too many intervals": (dict(cfg_interval=[(0.1, 0.2)] * 3), "or a list of 2, one per prompt"),
}


@pytest.mark.parametrize("options, message", INVALID_LISTS.values(), ids=INVALID_LISTS)
def test_generate_rejects_invalid_lists_for_a_batch(bagel, options, message):
    with pytest.raises(ValueError, match=message):
        bagel.generate(["a boat", "a house"], size=(16, 16), **options)


def test_list_of_two_numbers_is_one_interval(bagel):
    results = bagel.generate(["a", "b"], size=(16, 16), seed=1, num_timesteps=2, cfg_interval=[0.2, 0.8])
    assert [result.parameters["cfg_interval"] for result in results] == [(0.2, 0.8)] * 2


@pytest.mark.parametrize("options, message", INVALID_OPTIONS.values(), ids=INVALID_OPTIONS)
def test_generate_rejects_invalid_options(bagel, options, message):
    used = bagel.cache.slots - bagel.cache.free_slots
    with pytest.raises(ValueError, match=message):
        bagel.generate("a boat", **options)
    assert bagel.cache.slots - bagel.cache.free_slots == used


INVALID_CALLS = {
    "unknown hyper-parameter": (
        lambda b: b.generate("a", cfg_scale=3),
        TypeError,
        "unknown hyper-parameter cfg_scale",
    ),
    "image hyper-parameter in a chat": (lambda b: b.chat("a", num_timesteps=3), TypeError, "num_timesteps"),
    "number as prompt": (lambda b: b.generate(3), ValueError, "prompt"),
    "empty batch": (lambda b: b.generate([]), ValueError, "1 to 64"),
    "batch of 65": (lambda b: b.generate(["a"] * 65), ValueError, "1 to 64"),
    "number in a batch": (lambda b: b.generate(["a", 3]), ValueError, "an entry of prompt must be of type str, got 3"),
    "too few sizes": (lambda b: b.generate(["a", "b"], size=[(16, 16)]), ValueError, "one per prompt"),
    "prompt beyond the positions": (lambda b: b.generate("ab " * 20000), ValueError, "must take at most 32768"),
    "prompt of 100 megabytes": (lambda b: b.chat("a" * 10**8), ValueError, "characters"),
    "missing image file": (lambda b: b.edit("no-such.png", "a"), FileNotFoundError, "no-such.png"),
    "bytes that are not an image": (lambda b: b.edit(b"hello", "a"), ValueError, "5 bytes: not an image"),
    "number as image": (lambda b: b.edit(3, "a"), ValueError, "int"),
    "None as instruction": (lambda b: b.edit(Image.new("RGB", (8, 8)), None), ValueError, "prompt"),
    "edit without images": (lambda b: b.edit([], "a"), ValueError, "number of images must be .* from 1 to 64, got 0"),
    "65 images": (lambda b: b.chat("a", [Image.new("RGB", (8, 8))] * 65), ValueError, "from 0 to 64, got 65"),
    "zero rounds": (lambda b: b.interleave(["a"], max_rounds=0), ValueError, "max_rounds must be .* got 0"),
    "no inputs": (lambda b: b.interleave([]), ValueError, "inputs"),
    "number as input": (lambda b: b.interleave(["a", 5]), ValueError, "Image, ndarray, Path, bytes, got 5"),
    "missing folder": (
        lambda b: Bagel.from_pretrained("no-such-folder"),
        FileNotFoundError,
        "no-such-folder",
    ),
    "unknown backend": (lambda b: Bagel.from_pretrained(backend="fast"), ValueError, "backend must be .* got 'fast'"),
    "missing GPU": (
        lambda b: Bagel.from_pretrained(device="cuda:99"),
        ValueError,
        "device must be cpu or one of the .* GPUs that torch sees, got 'cuda:99'",
    ),
    "unknown device": (
        lambda b: Bagel.from_pretrained(device="gpu"),
        ValueError,
        "device must be cpu, cuda or cuda:N, got 'gpu'",
    ),
    "integer dtype": (lambda b: Bagel.from_pretrained(dtype=torch.int8), ValueError, "dtype must be .* got torch.int8"),
}


@pytest.mark.parametrize("call, error, message", INVALID_CALLS.values(), ids=INVALID_CALLS)
def test_rejects_invalid_calls(bagel, call, error, message):
    with pytest.raises(error, match=message):
        call(bagel)
