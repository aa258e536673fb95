"""Sharded weights: load an index with its shards, and save them."""

import json
import os
import weakref

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_checkpoint import FILE, REMEDY, assert_rejected, make_slots

from bagel_rt.checkpoint.find import find_weights
from bagel_rt.checkpoint.read import load_weights
from bagel_rt.checkpoint.write import save_weights
from bagel_rt.errors import CheckpointError


def sharded(folder, weight_map, stem="ema"):
    """Shards first.safetensors (a) and second.safetensors (b), and an index of this weight map."""
    save_file({"a": FILE["a"]}, folder / "first.safetensors")
    save_file({"b": FILE["b"]}, folder / "second.safetensors")
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


WEIGHT_MAP = {"a": "first.safetensors", "b": "second.safetensors"}
NAMES_SHARD = "a shard must be a .safetensors file in the same folder, got"
BAD_INDEX = [
    pytest.param({}, "weight_map must map tensor names to shard files, got {}", id="empty"),
    pytest.param(["first.safetensors"], "weight_map must map tensor names", id="list"),
    pytest.param(WEIGHT_MAP | {"b": "third.safetensors"}, "shard third.safetensors is missing", id="missing-shard"),
    pytest.param(WEIGHT_MAP | {"b": "first.safetensors"}, "first.safetensors: missing tensor b", id="wrong-shard"),
    pytest.param(
        {"a": "first.safetensors", "c": "second.safetensors"}, "missing tensor c, which the index", id="wrong-name"
    ),
    pytest.param(WEIGHT_MAP | {"b": "../second.safetensors"}, NAMES_SHARD, id="parent-path"),
    pytest.param(WEIGHT_MAP | {"b": "/etc/second.safetensors"}, NAMES_SHARD, id="absolute-path"),
    pytest.param(WEIGHT_MAP | {"b": "sub/second.safetensors"}, NAMES_SHARD, id="subfolder"),
    pytest.param(WEIGHT_MAP | {"b": "..\\second.safetensors"}, NAMES_SHARD, id="backslashes"),
    pytest.param(WEIGHT_MAP | {"b": "s\0.safetensors"}, NAMES_SHARD, id="nul-byte"),
    pytest.param(WEIGHT_MAP | {"b": "second.bin"}, f"{NAMES_SHARD} 'second.bin'", id="pickle"),
    pytest.param(WEIGHT_MAP | {"b": ".."}, NAMES_SHARD, id="parent-folder"),
    pytest.param(WEIGHT_MAP | {"b": 2}, f"{NAMES_SHARD} 2.", id="number"),
    pytest.param(WEIGHT_MAP | {"b": "x" * 300 + ".safetensors"}, "is missing", id="endless-name"),
    pytest.param(WEIGHT_MAP | {"b": "\ud800.safetensors"}, r"'\ud800.safetensors' is missing", id="lone-surrogate"),
]


@pytest.mark.parametrize("weight_map, message", BAD_INDEX)
def test_rejects_a_bad_index(tmp_path, weight_map, message):
    assert_rejected(sharded(tmp_path, weight_map), make_slots(FILE), message)


def test_rejects_a_shard_with_tensors_not_in_the_index(tmp_path):
    index = sharded(tmp_path, WEIGHT_MAP)
    save_file(FILE, tmp_path / "second.safetensors")
    assert_rejected(
        index, make_slots(FILE), "second.safetensors: unexpected tensor a, which the index does not list", REMEDY
    )


def test_error_names_the_truncated_shard(tmp_path):
    index = sharded(tmp_path, WEIGHT_MAP)
    os.truncate(tmp_path / "second.safetensors", os.path.getsize(tmp_path / "second.safetensors") - 1)
    with pytest.raises(CheckpointError, match=r"second.safetensors is truncated: it has \d+ of \d+ bytes"):
        load_weights(index, make_slots(FILE), progress=False)


def test_rejects_an_index_that_is_not_json(tmp_path):
    index = tmp_path / "ema.safetensors.index.json"
    index.write_text("weight_map")
    assert_rejected(index, make_slots(FILE), "is not JSON in UTF-8")


def test_loads_shards_that_are_symbolic_links(tmp_path):
    (tmp_path / "blobs").mkdir(), (tmp_path / "snapshot").mkdir()
    save_file(FILE, tmp_path / "blobs/1234")
    (tmp_path / "snapshot/one.safetensors").symlink_to("../blobs/1234")
    index = tmp_path / "snapshot/ema.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(FILE, "one.safetensors")}))
    slots = make_slots(FILE)
    load_weights(index, slots, progress=False)
    assert all(torch.equal(slots[name].view, tensor) for name, tensor in FILE.items())


def unindexed(folder, *numbers):
    """Shards 1 (a) and 2 (b) of two, without an index."""
    for number in numbers:
        name = "ab"[number - 1]
        save_file({name: FILE[name]}, folder / f"ema-0000{number}-of-00002.safetensors")
    return folder / f"ema-0000{numbers[0]}-of-00002.safetensors"


@pytest.mark.parametrize("first", [1, 2])
def test_loads_shards_without_an_index(tmp_path, first):
    slots = make_slots(FILE)
    load_weights(unindexed(tmp_path, first, 3 - first), slots, progress=False)
    assert all(torch.equal(slots[name].view, tensor) for name, tensor in FILE.items())


def test_error_names_the_missing_shards_without_an_index(tmp_path):
    cause = "1 of 2 shards are missing. Download the missing shards."
    assert_rejected(unindexed(tmp_path, 1), make_slots(FILE), cause, "shard ema-00002-of-00002.safetensors is missing")


def test_rejects_a_tensor_in_two_shards_without_an_index(tmp_path):
    path = unindexed(tmp_path, 1, 2)
    save_file(FILE, tmp_path / "ema-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="a is in both ema-00001-of-00002.safetensors and ema-00002"):
        load_weights(path, make_slots(FILE), progress=False)


SAVED = {
    "w1": torch.arange(6.0).view(2, 3),
    "w2": torch.arange(8, dtype=torch.bfloat16),
    "w3": torch.tensor(3.0, dtype=torch.float64),
    "w4": torch.ones(30, dtype=torch.float16)[::3],
    "w5": torch.empty(0, 4),
}


def declared(tensors, actual=None):
    """Entries for save_weights; every function returns ``actual`` instead of its tensor, if it is set."""
    return [(name, lambda t=t: t if actual is None else actual, tuple(t.shape), t.dtype) for name, t in tensors.items()]


@pytest.mark.parametrize("limit, shards", [(1 << 30, 1), (40, 2), (24, 3), (1, 5)])
def test_saved_shards_load_here_and_with_the_safetensors_package(tmp_path, limit, shards):
    index = save_weights(tmp_path / "new", "ema", declared(SAVED), limit)
    files = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert files == [f"ema-{k:05}-of-{shards:05}.safetensors" for k in range(1, shards + 1)] + [index.name]
    assert find_weights(tmp_path / "new", "ema") == index
    slots = make_slots(SAVED)
    load_weights(index, slots, progress=False)
    assert json.loads(index.read_text())["metadata"]["total_size"] == 24 + 16 + 8 + 20
    for name, file in json.loads(index.read_text())["weight_map"].items():
        assert torch.equal(slots[name].view, SAVED[name])
        assert (index.parent / file).read_bytes()[
            0
        ] % 8 == 0  # the header length is a multiple of 8, which aligns the tensors
        with safe_open(index.parent / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), SAVED[name]) and shard.metadata() == {"format": "pt"}


def test_saves_a_single_file_without_a_limit(tmp_path):
    path = save_weights(tmp_path, "ema", declared(SAVED))
    assert list(tmp_path.iterdir()) == [path] and path.name == "ema.safetensors"
    slots = make_slots(SAVED)
    load_weights(path, slots, progress=False)
    assert all(torch.equal(slots[name].view, tensor) for name, tensor in SAVED.items())


def test_saving_creates_each_tensor_once_and_keeps_one_in_memory(tmp_path):
    calls, alive, peak = [], set(), 0

    def make(i):
        nonlocal peak
        memory = np.ones(4, dtype=np.float32)  # kept alive by the tensor that shares it
        calls.append(i)
        alive.add(i)
        weakref.finalize(memory, alive.remove, i)
        peak = max(peak, len(alive))
        return torch.from_numpy(memory)

    save_weights(tmp_path, "ema", [(f"w{i}", lambda i=i: make(i), (4,), torch.float32) for i in range(6)], 48)
    assert calls == list(range(6)) and peak == 1


@pytest.mark.parametrize(
    "tensors, message",
    [
        pytest.param([], "tensors must not be empty", id="nothing"),
        pytest.param(declared(SAVED) + declared({"w1": SAVED["w2"]}), "must be unique, got w1", id="duplicate-name"),
        pytest.param(declared({"w": torch.ones(2).int()}), "dtype of w must be .*, got torch.int32", id="integers"),
        pytest.param(declared(FILE, torch.ones(9)), r"a must be \[2, 3\] .* got \[9\]", id="wrong-shape"),
        pytest.param(declared(FILE, FILE["a"].half()), "as declared, got .* torch.float16", id="wrong-dtype"),
    ],
)
def test_failed_saving_leaves_no_file(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        save_weights(tmp_path, "ema", tensors, 1 << 30)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_saving_leaves_complete_shards_and_the_old_index(tmp_path):
    index = save_weights(tmp_path, "ema", declared(FILE), 24)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail():
        raise KeyboardInterrupt

    changed = {name: tensor * 2 for name, tensor in FILE.items()}
    tensors = declared({"a": changed["a"]}) + [("b", fail, (4,), torch.float32)]
    with pytest.raises(KeyboardInterrupt):
        save_weights(tmp_path, "ema", tensors, 24)
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert after.keys() == before.keys() and len(after) == 3
    assert [name for name in after if after[name] != before[name]] == ["ema-00001-of-00002.safetensors"]
    load_weights(index, make_slots(FILE), progress=False)
