import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_rt.checkpoint import files, read, write
from bagel_rt.checkpoint.read import (
    CheckpointError,
    WeightSlot,
    check_weights,
    find_weights,
    load_weights,
    read_header,
)
from bagel_rt.models.bagel import config

CONFORMANCE = Path(__file__).parents[1] / "conformance" / "bagel" / "checkpoint"
REMEDY = "Correct the file, or take it from the published model folder again."
UNTOUCHED = -7.0


def destinations(tensors, dtype=None):
    """A fresh destination for every tensor, full of UNTOUCHED."""
    return {
        name: WeightSlot(torch.full(t.shape, UNTOUCHED, dtype=dtype or t.dtype), tuple(t.shape))
        for name, t in tensors.items()
    }


def refused(path, targets, *parts, ignore=()):
    """The checkpoint is refused with a message that has all ``parts``, and nothing was copied."""
    with pytest.raises(CheckpointError) as error:
        load_weights(path, targets, ignore, progress=False)
    for part in (str(path), *parts):
        assert part in str(error.value)
    assert str(error.value).replace("\n", "").isprintable() and len(str(error.value)) < 4000
    for target in targets.values():
        assert (target.view == UNTOUCHED).all()
    return str(error.value)


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem, count", [("ema", 139), ("ae", 180)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conformance_weights_arrive_bit_for_bit(stem, count, dtype):
    path = find_weights(CONFORMANCE, stem)
    expected = load_file(path)
    targets = destinations(expected, dtype)
    load_weights(path, targets, progress=False)
    assert len(expected) == count
    for name, tensor in expected.items():
        assert torch.equal(targets[name].view, tensor.to(dtype)), name


@pytest.mark.parametrize("staging", [1, 100, 1000, 1 << 20], ids=lambda n: f"{n}-byte-pieces")
def test_strided_repeated_and_odd_shapes_arrive_through_any_buffer(tmp_path, monkeypatch, staging):
    monkeypatch.setattr(read, "_STAGING", staging)
    g = torch.Generator().manual_seed(0)
    shapes = {
        "gate": (5, 24),
        "up": (5, 24),
        "q_norm": (8,),
        "scalar": (),
        "none": (0, 3),
        "flat": (3, 0),
        "conv": (7, 2, 3),
    }
    tensors = {name: torch.randn(shape, generator=g).to(torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "ema.safetensors")
    gate_up, heads = torch.full((10, 24), UNTOUCHED), torch.full((6, 8), UNTOUCHED, dtype=torch.float64)
    targets = destinations(tensors, torch.float32) | {
        "gate": WeightSlot(gate_up[0::2], (5, 24)),
        "up": WeightSlot(gate_up[1::2], (5, 24)),
        "q_norm": WeightSlot(heads[1:5], (8,)),
    }
    load_weights(tmp_path / "ema.safetensors", targets, progress=False)
    assert torch.equal(gate_up.view(5, 2, 24), torch.stack([tensors["gate"], tensors["up"]], 1).float())
    assert torch.equal(heads[1:5], tensors["q_norm"].double().expand(4, 8))
    assert (heads[0] == UNTOUCHED).all() and (heads[5] == UNTOUCHED).all()
    for name in ("scalar", "none", "flat", "conv"):
        assert torch.equal(targets[name].view, tensors[name].float()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_every_float_dtype_is_converted(tmp_path, dtype):
    save_file({"w": torch.tensor([1.5, -2.0, 0.25], dtype=dtype)}, tmp_path / "ema.safetensors")
    targets = destinations({"w": torch.empty(3)})
    load_weights(tmp_path / "ema.safetensors", targets, progress=False)
    assert targets["w"].view.tolist() == [1.5, -2.0, 0.25]


def test_parameters_and_inference_tensors_can_be_destinations(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "ema.safetensors")
    parameter = torch.nn.Parameter(torch.zeros(2))
    with torch.inference_mode():
        frozen = torch.zeros(2)
    targets = {"a": WeightSlot(parameter, (2,)), "b": WeightSlot(frozen, (2,))}
    load_weights(tmp_path / "ema.safetensors", targets, progress=False)
    assert parameter.tolist() == frozen.tolist() == [1, 1] and parameter.requires_grad


def test_ignored_names_are_matched_as_shell_patterns_with_case(tmp_path):
    tensors = {"w": torch.ones(2), "a.rotary_emb.inv_freq": torch.ones(3), "step": torch.tensor([3])}
    save_file(tensors, tmp_path / "ema.safetensors")
    targets = destinations({"w": torch.empty(2)})
    refused(tmp_path / "ema.safetensors", targets, "step [1] has no place", ignore=("*.inv_freq", "STEP"))
    load_weights(tmp_path / "ema.safetensors", targets, ("*.inv_freq", "st?p"), progress=False)
    assert targets["w"].view.tolist() == [1, 1]


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar_counts_bytes_on_stderr_and_can_be_silenced(tmp_path, capsys, progress):
    save_file({"w": torch.ones(250, 4)}, tmp_path / "ema.safetensors")
    load_weights(tmp_path / "ema.safetensors", destinations({"w": torch.empty(250, 4)}), progress=progress)
    out, err = capsys.readouterr()
    assert out == "" and ("ema.safetensors: 100%" in err and "4.00k/4.00k" in err) == progress == bool(err)


@pytest.mark.parametrize("shape, view", [((3,), (2, 4)), ((2, 4), (4,)), ((2, 1, 4), (2, 4))], ids=str)
def test_destination_must_take_the_announced_shape(shape, view):
    with pytest.raises(ValueError, match="does not broadcast to"):
        WeightSlot(torch.empty(view), shape)


def test_check_needs_no_memory_for_the_destinations():
    targets = {
        name: WeightSlot(torch.empty(tensor.shape, device="meta"), tensor.shape)
        for name, tensor in read_header(CONFORMANCE / "ae.safetensors").items()
    }
    assert check_weights(CONFORMANCE / "ae.safetensors", targets).keys() == targets.keys()
    targets["decoder.conv_in.bias"] = WeightSlot(torch.empty(1 << 50, device="meta"), (1 << 50,))
    with pytest.raises(CheckpointError, match=r"decoder.conv_in.bias has shape \[32\], expected \[1125899906842624\]"):
        check_weights(CONFORMANCE / "ae.safetensors", targets)


# --- what does not fit ------------------------------------------------------------------------------------------------

FILE = {"a": torch.ones(2, 3), "b": torch.ones(4)}
MISFITS = [
    pytest.param({"a": FILE["a"]}, "ema.safetensors lacks b, expected with shape [4]", id="a-missing-tensor"),
    pytest.param(FILE | {"c": torch.ones(5)}, "ema.safetensors: c [5] has no place in the model", id="an-extra-tensor"),
    pytest.param(FILE | {"b": torch.ones(3)}, "ema.safetensors: b has shape [3], expected [4]", id="a-wrong-shape"),
    pytest.param(FILE | {"a": torch.ones(3, 2)}, "a has shape [3, 2], expected [2, 3]", id="a-transposed-tensor"),
    pytest.param(FILE | {"b": torch.ones(1)}, "b has shape [1], expected [4]", id="one-value-is-not-broadcast-unasked"),
    pytest.param(FILE | {"b": torch.ones(4).int()}, "b has dtype I32, allowed: BF16, F16, F32, F64", id="integers"),
    pytest.param(FILE | {"b": torch.ones(4, dtype=torch.float8_e4m3fn)}, "b has dtype F8_E4M3", id="8-bit-floats"),
    pytest.param(
        FILE | {"\x1b[2J\n": torch.ones(1)}, r"'\x1b[2J\n' [1] has no place", id="a-name-that-drives-terminals"
    ),
]


@pytest.mark.parametrize("tensors, message", MISFITS)
def test_misfit_is_named_before_anything_is_copied(tmp_path, tensors, message):
    path = tmp_path / "ema.safetensors"
    save_file(tensors, path)
    refused(path, destinations(FILE), message, "Take the configuration and the weights from the same model folder.")


def test_all_misfits_are_listed_in_one_error(tmp_path):
    save_file({"a": torch.ones(7), "c": torch.ones(5)}, tmp_path / "ema.safetensors")
    message = refused(tmp_path / "ema.safetensors", destinations(FILE))
    assert "a has shape [7]" in message and "lacks b" in message and "c [5] has no place" in message


def test_hundreds_of_misfits_are_all_listed_and_an_endless_list_is_cut(tmp_path, monkeypatch):
    names = [f"w{i}" for i in range(300)]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "ema.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_weights(tmp_path / "ema.safetensors", destinations(FILE), progress=False)
    assert all(f": {name} [1] has no place" in str(error.value) for name in names)
    monkeypatch.setattr("bagel_rt.checkpoint.read._LISTED", 20)
    message = refused(tmp_path / "ema.safetensors", destinations(FILE), "and 282 more")
    assert message.count("\n") == 22  # 20 misfits, the rest's number, the remedy


# --- files that are not what they say ---------------------------------------------------------------------------------


def packed(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = packed({"a": entry(0, 24, shape=[2, 3]), "b": entry(24, 40)}, bytes(40))
ZIP = b"PK\x03\x04" + bytes(60)
PICKLE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + bytes(60)
DISAGREE = "allowed: dtype, shape and two data_offsets that agree with them"
CORRUPT = [
    pytest.param(b"", "has 0 bytes and claims a header of 0", id="an-empty-file"),
    pytest.param(GOOD[:7], "is truncated or not a safetensors file: it has 7 bytes", id="less-than-a-header-length"),
    pytest.param(GOOD[:50], "is truncated or not a safetensors file: it has 50 bytes", id="cut-inside-the-header"),
    pytest.param(GOOD[:-1], f"is truncated: it has {len(GOOD) - 1} bytes, but b ends", id="cut-inside-the-last-tensor"),
    pytest.param(GOOD[:-30], f"but a ends at byte {len(GOOD) - 16}", id="cut-inside-the-first-tensor"),
    pytest.param(GOOD + b"\0", f"its tensors end at byte {len(GOOD)}", id="bytes-after-the-last-tensor"),
    pytest.param(packed({}, length=1 << 62), "claims a header of 4611686018427387904", id="a-header-of-4-exabytes"),
    pytest.param(
        packed({}, length=(1 << 64) - 1), "claims a header of 18446744073709551615", id="a-header-of-all-ones"
    ),
    pytest.param(packed({}, length=3), "claims a header of 3; allowed", id="a-header-one-byte-past-the-end"),
    pytest.param(packed({}, length=0), "claims a header of 0; allowed", id="a-header-of-no-bytes"),
    pytest.param(packed(b"not json"), "the header is not JSON in UTF-8", id="a-header-that-is-not-JSON"),
    pytest.param(packed(b'{"\xff": 0}'), "the header is not JSON in UTF-8", id="a-header-that-is-not-UTF-8"),
    pytest.param(packed(b"[" * 99_999), "the header is not JSON in UTF-8", id="a-header-of-brackets"),
    pytest.param(packed([]), "the header holds a JSON list; allowed: an object", id="a-header-that-is-a-list"),
    pytest.param(
        packed({"a": entry(0, 24), "b": entry(20, 36)}, bytes(36)), "b starts at byte", id="overlapping-tensors"
    ),
    pytest.param(
        packed({"a": entry(0, 24), "b": entry(0, 24)}, bytes(24)), "neither gaps nor", id="tensors-sharing-bytes"
    ),
    pytest.param(packed({"a": entry(0, 24), "b": entry(28, 44)}, bytes(44)), "neither gaps nor", id="a-gap-in-between"),
    pytest.param(packed({"a": entry(8, 32)}, bytes(32)), "a starts at byte", id="a-gap-at-the-start"),
    pytest.param(packed({"a": entry(24, 0, shape=[6])}, bytes(24)), DISAGREE, id="an-end-before-its-start"),
    pytest.param(
        packed({"a": entry(24, 0, "I64", [3])}, bytes(24)), DISAGREE, id="an-end-before-its-start-in-integers"
    ),
    pytest.param(packed({"a": entry(-24, 0)}, bytes(24)), DISAGREE, id="a-negative-offset"),
    pytest.param(packed({"a": entry(0, 24, shape=[7])}, bytes(24)), DISAGREE, id="a-shape-of-other-size"),
    pytest.param(packed({"a": entry(0, 24, "F64", [6])}, bytes(24)), DISAGREE, id="a-dtype-of-other-size"),
    pytest.param(packed({"a": entry(0, 24, shape=[-2, -3])}, bytes(24)), DISAGREE, id="negative-dimensions"),
    pytest.param(packed({"a": entry(0, 24, shape=[6.0])}, bytes(24)), DISAGREE, id="a-fractional-dimension"),
    pytest.param(packed({"a": entry(0, 24, shape=[6, True])}, bytes(24)), DISAGREE, id="a-bool-dimension"),
    pytest.param(packed({"a": entry(0, 24, shape="6")}, bytes(24)), DISAGREE, id="a-shape-in-a-string"),
    pytest.param(packed({"a": entry(0, 24, shape=[6] + [1] * 8)}, bytes(24)), DISAGREE, id="nine-dimensions"),
    pytest.param(packed({"a": entry(0, 24, shape=[9] * 10**6)}, bytes(24)), DISAGREE, id="a-million-dimensions"),
    pytest.param(packed({"a": entry(0, 24, 7)}, bytes(24)), DISAGREE, id="a-dtype-that-is-a-number"),
    pytest.param(packed({"a": {"dtype": "F32", "shape": [6]}}, bytes(24)), DISAGREE, id="no-offsets"),
    pytest.param(packed({"a": entry(0, 24) | {"data_offsets": [0, 24, 24]}}, bytes(24)), DISAGREE, id="three-offsets"),
    pytest.param(packed({"a": 3}), DISAGREE, id="an-entry-that-is-a-number"),
]


@pytest.mark.parametrize("content, message", CORRUPT)
def test_corrupt_file_is_refused(tmp_path, content, message):
    path = tmp_path / "ema.safetensors"
    path.write_bytes(content)
    refused(path, destinations(FILE), message, REMEDY)


def test_the_file_that_the_corrupt_ones_vary_is_good(tmp_path):
    (tmp_path / "ema.safetensors").write_bytes(GOOD)
    targets = destinations(FILE)
    load_weights(tmp_path / "ema.safetensors", targets, progress=False)
    assert not targets["a"].view.any() and not targets["b"].view.any()


def test_header_of_17_mb_is_refused_unread(tmp_path):
    path = tmp_path / "ema.safetensors"
    path.write_bytes(packed(b"", length=17 << 20))
    os.truncate(path, 18 << 20)
    refused(path, destinations(FILE), "claims a header of 17825792; allowed: up to 16777216, inside the file", REMEDY)


@pytest.mark.parametrize(
    "name, content",
    [
        pytest.param("ema.safetensors", ZIP, id="a-zip-renamed-safetensors"),
        pytest.param("ema.safetensors", PICKLE, id="a-pickle-renamed-safetensors"),
        pytest.param("ema.pt", ZIP, id="a-pt-file"),
        pytest.param("ema.bin", b"(lp0\n.", id="a-text-pickle"),
    ],
)
def test_pickle_is_refused_unopened(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    remedy = "is a pickle: it can run code when it is opened, and is refused. Convert it to safetensors."
    refused(tmp_path / name, destinations(FILE), remedy)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["a-folder", "a-fifo"])
def test_something_that_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "ema.safetensors")
    refused(tmp_path / "ema.safetensors", destinations(FILE), "is not a file. Put the published file there.")


@pytest.mark.parametrize("name", ["ema.safetensors", "ema.safetensors.index.json"])
def test_missing_file_is_refused(tmp_path, name):
    refused(
        tmp_path / name, destinations(FILE), "cannot be read: No such file or directory. Put the published file there."
    )


def test_file_that_shrinks_after_the_check_is_an_error_not_a_crash(tmp_path, monkeypatch):
    path = tmp_path / "ema.safetensors"
    path.write_bytes(GOOD)

    def check_then_shrink(*arguments):
        stored = check_weights(*arguments)
        os.truncate(path, len(GOOD) - 1)
        return stored

    monkeypatch.setattr(read, "check_weights", check_then_shrink)
    with pytest.raises(CheckpointError, match="was changed while it was read: b is cut off"):
        load_weights(path, destinations(FILE), progress=False)


@pytest.mark.parametrize("module", [files, read, write, config])
def test_no_module_that_reads_files_can_unpickle(module):
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load")
    assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


# --- which file is taken ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "present, taken",
    [
        pytest.param(["ema.safetensors", "model.safetensors.index.json"], 0, id="published-folder-with-a-stale-index"),
        pytest.param(["ema.safetensors", "ema.safetensors.index.json"], 0, id="one-file-before-an-index"),
        pytest.param(["ema.safetensors.index.json", "model.safetensors"], 0, id="ema-shards-before-model"),
        pytest.param(["model.safetensors"], 0, id="model-alone"),
        pytest.param(["model.safetensors.index.json", "ema.bin"], 0, id="model-index-alone"),
    ],
)
def test_weights_are_found_in_order(tmp_path, present, taken):
    for name in present:
        (tmp_path / name).touch()
    assert find_weights(str(tmp_path), "ema") == tmp_path / present[taken]


def test_folder_without_weights_is_refused_with_what_was_looked_for(tmp_path):
    looked_for = (
        "none of ema.safetensors, ema.safetensors.index.json, model.safetensors, model.safetensors.index.json. D"
    )
    with pytest.raises(CheckpointError, match=looked_for):
        find_weights(tmp_path, "ema")


def test_language_weights_do_not_stand_in_for_the_autoencoder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="none of ae.safetensors, ae.safetensors.index.json. Download"):
        find_weights(tmp_path, "ae")


@pytest.mark.parametrize("name", ["ema.bin", "pytorch_model.pt", "ema.ckpt", "x.pth"])
def test_pickle_beside_nothing_else_is_refused_by_name(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"{name}: a pickle can run code when it is opened, and is refused. Down"):
        find_weights(tmp_path, "ema")


# --- memory -----------------------------------------------------------------------------------------------------------

# 600 MB of float32 zeros in a sparse file, one tensor of 320 MB among them, go into bfloat16. To read or map the file
# whole, or that tensor whole, would exceed the allowance of 150 MB beyond the destinations.
MEMORY = """
import resource, sys, torch
from pathlib import Path
from bagel_rt.checkpoint.read import WeightSlot, load_weights, read_header
path = Path(sys.argv[1])
ones = {name: torch.ones(t.shape, dtype=torch.bfloat16) for name, t in read_header(path).items()}
targets = {name: WeightSlot(tensor, tuple(tensor.shape)) for name, tensor in ones.items()}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
load_weights(path, targets, progress=False)
print(peak() - before)
assert not any(tensor.view(torch.int64).count_nonzero() for tensor in ones.values())
"""


def test_loading_600_mb_takes_less_than_150_mb_beyond_the_destinations(tmp_path):
    path, mb = tmp_path / "ema.safetensors", 1 << 20
    header, end = {}, 0
    for name, shape in [("huge", [10 * 1024, 8 * 1024])] + [(f"w{i}", [512, 7 * 1024]) for i in range(20)]:
        header[name] = entry(end, end + 4 * shape[0] * shape[1], "F32", shape)
        end = header[name]["data_offsets"][1]
    path.write_bytes(packed(header))
    os.truncate(path, os.path.getsize(path) + end)
    assert end == 600 * mb
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, path], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 150
