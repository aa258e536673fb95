"""Weights in several files: reading an index and its shards, and writing them."""

import json
import os
import weakref

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_checkpoint import FILE, REMEDY, destinations, refused

from bagel_rt.checkpoint.read import (
    CheckpointError,
    find_weights,
    load_weights,
)
from bagel_rt.checkpoint.write import save_sharded


def sharded(folder, weight_map, stem="ema"):
    """Shards first.safetensors (a) and second.safetensors (b), and an index of this weight map."""
    save_file({"a": FILE["a"]}, folder / "first.safetensors")
    save_file({"b": FILE["b"]}, folder / "second.safetensors")
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


HONEST = {"a": "first.safetensors", "b": "second.safetensors"}
NAMES_SHARD = "allowed: .safetensors files beside it"
BAD_INDEX = [
    pytest.param({}, "weight_map is missing or empty; allowed: tensor name -> shard file", id="that-is-empty"),
    pytest.param(["first.safetensors"], "weight_map is missing or empty", id="that-is-a-list"),
    pytest.param(
        HONEST | {"b": "third.safetensors"}, "the shard third.safetensors is missing", id="of-a-missing-shard"
    ),
    pytest.param(HONEST | {"b": "first.safetensors"}, "first.safetensors lacks b", id="of-a-tensor-its-shard-lacks"),
    pytest.param(
        {"a": "first.safetensors", "c": "second.safetensors"}, "lacks c, which the index places", id="off-by-c"
    ),
    pytest.param(HONEST | {"b": "../second.safetensors"}, NAMES_SHARD, id="that-climbs-out-of-the-folder"),
    pytest.param(HONEST | {"b": "/etc/second.safetensors"}, NAMES_SHARD, id="with-an-absolute-path"),
    pytest.param(HONEST | {"b": "sub/second.safetensors"}, NAMES_SHARD, id="with-a-subfolder"),
    pytest.param(HONEST | {"b": "..\\second.safetensors"}, NAMES_SHARD, id="that-climbs-with-backslashes"),
    pytest.param(HONEST | {"b": "s\0.safetensors"}, NAMES_SHARD, id="with-a-NUL"),
    pytest.param(HONEST | {"b": "second.bin"}, "names the shard 'second.bin'", id="of-pickles"),
    pytest.param(HONEST | {"b": ".."}, NAMES_SHARD, id="of-the-parent-folder"),
    pytest.param(HONEST | {"b": 2}, "names the shard 2; allowed", id="of-numbers"),
    pytest.param(HONEST | {"b": "x" * 300 + ".safetensors"}, "is missing", id="of-an-endless-name"),
    pytest.param(HONEST | {"b": "\ud800.safetensors"}, r"'\ud800.safetensors' is missing", id="of-half-a-character"),
]


@pytest.mark.parametrize("weight_map, message", BAD_INDEX)
def test_bad_index_is_refused(tmp_path, weight_map, message):
    refused(sharded(tmp_path, weight_map), destinations(FILE), message)


def test_shard_with_tensors_that_the_index_does_not_know_is_refused(tmp_path):
    index = sharded(tmp_path, HONEST)
    save_file(FILE, tmp_path / "second.safetensors")
    refused(index, destinations(FILE), "second.safetensors holds a, which the index does not place there", REMEDY)


def test_truncated_shard_is_named(tmp_path):
    index = sharded(tmp_path, HONEST)
    os.truncate(tmp_path / "second.safetensors", os.path.getsize(tmp_path / "second.safetensors") - 1)
    with pytest.raises(CheckpointError, match=r"second.safetensors is truncated: .* but b ends at byte"):
        load_weights(index, destinations(FILE), progress=False)


def test_index_that_is_not_json_is_refused(tmp_path):
    index = tmp_path / "ema.safetensors.index.json"
    index.write_text("weight_map")
    refused(index, destinations(FILE), "is not JSON in UTF-8")


def test_shards_may_be_links_as_in_download_caches(tmp_path):
    (tmp_path / "blobs").mkdir(), (tmp_path / "snapshot").mkdir()
    save_file(FILE, tmp_path / "blobs/1234")
    (tmp_path / "snapshot/one.safetensors").symlink_to("../blobs/1234")
    index = tmp_path / "snapshot/ema.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(FILE, "one.safetensors")}))
    targets = destinations(FILE)
    load_weights(index, targets, progress=False)
    assert all(torch.equal(targets[name].view, tensor) for name, tensor in FILE.items())


SAVED = {
    "w1": torch.arange(6.0).view(2, 3),
    "w2": torch.arange(8, dtype=torch.bfloat16),
    "w3": torch.tensor(3.0, dtype=torch.float64),
    "w4": torch.ones(30, dtype=torch.float16)[::3],
    "w5": torch.empty(0, 4),
}


def announced(tensors, made=None):
    return [(name, lambda t=t: t if made is None else made, tuple(t.shape), t.dtype) for name, t in tensors.items()]


@pytest.mark.parametrize("limit, shards", [(1 << 30, 1), (40, 2), (24, 3), (1, 5)])
def test_saved_shards_load_here_and_in_the_safetensors_package(tmp_path, limit, shards):
    index = save_sharded(tmp_path / "new", "ema", announced(SAVED), limit)
    files = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert files == [f"ema-{k:05}-of-{shards:05}.safetensors" for k in range(1, shards + 1)] + [index.name]
    assert find_weights(tmp_path / "new", "ema") == index
    targets = destinations(SAVED)
    load_weights(index, targets, progress=False)
    assert json.loads(index.read_text())["metadata"]["total_size"] == 24 + 16 + 8 + 20
    for name, file in json.loads(index.read_text())["weight_map"].items():
        assert torch.equal(targets[name].view, SAVED[name])
        assert (index.parent / file).read_bytes()[0] % 8 == 0  # the header's length: tensors start aligned
        with safe_open(index.parent / file, "pt") as theirs:
            assert torch.equal(theirs.get_tensor(name), SAVED[name]) and theirs.metadata() == {"format": "pt"}


def test_saving_makes_each_tensor_once_and_holds_one_at_a_time(tmp_path):
    calls, alive, most = [], set(), 0

    def make(i):
        nonlocal most
        memory = np.ones(4, dtype=np.float32)  # lives as long as any tensor over it
        calls.append(i)
        alive.add(i)
        weakref.finalize(memory, alive.remove, i)
        most = max(most, len(alive))
        return torch.from_numpy(memory)

    save_sharded(tmp_path, "ema", [(f"w{i}", lambda i=i: make(i), (4,), torch.float32) for i in range(6)], 48)
    assert calls == list(range(6)) and most == 1


@pytest.mark.parametrize(
    "tensors, message",
    [
        pytest.param([], "there are no tensors to save", id="nothing"),
        pytest.param(
            announced(SAVED) + announced({"w1": SAVED["w2"]}), "w1 is .*; allowed: each name once", id="a-name-twice"
        ),
        pytest.param(
            announced({"w": torch.ones(2).int()}), "w is torch.int32; allowed: .* BF16, F16, F32", id="integers"
        ),
        pytest.param(
            announced(FILE, torch.ones(9)), r"a is \[9\] torch.float32, announced as \[2, 3\]", id="another-shape"
        ),
        pytest.param(announced(FILE, FILE["a"].half()), "a is .* torch.float16, announced as", id="another-dtype"),
    ],
)
def test_saving_what_was_not_announced_leaves_no_file(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        save_sharded(tmp_path, "ema", tensors, 1 << 30)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_saving_leaves_whole_shards_and_the_old_index(tmp_path):
    index = save_sharded(tmp_path, "ema", announced(FILE), 24)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail():
        raise KeyboardInterrupt

    changed = {name: tensor * 2 for name, tensor in FILE.items()}
    tensors = announced({"a": changed["a"]}) + [("b", fail, (4,), torch.float32)]
    with pytest.raises(KeyboardInterrupt):
        save_sharded(tmp_path, "ema", tensors, 24)
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert after.keys() == before.keys() and len(after) == 3
    assert [name for name in after if after[name] != before[name]] == ["ema-00001-of-00002.safetensors"]
    load_weights(index, destinations(FILE), progress=False)
