import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_rt.checkpoint import files, find, header, mismatch, read, write
from bagel_rt.checkpoint.find import find_weights
from bagel_rt.checkpoint.header import read_header
from bagel_rt.checkpoint.read import WeightSlot, check_weights, load_weights
from bagel_rt.errors import CheckpointError
from bagel_rt.models.bagel import config

CONFORMANCE = Path(__file__).parents[1] / "conformance" / "bagel" / "checkpoint"
REMEDY = "Fix the file, or download it again from the published model folder."
UNTOUCHED = -7.0


def make_slots(tensors, dtype=None):
    """A new slot for every tensor, filled with UNTOUCHED."""
    return {
        name: WeightSlot(torch.full(t.shape, UNTOUCHED, dtype=dtype or t.dtype), tuple(t.shape))
        for name, t in tensors.items()
    }


def assert_rejected(path, slots, *parts, ignore=()):
    """Loading raises a message that contains all ``parts``, and copies nothing."""
    with pytest.raises(CheckpointError) as error:
        load_weights(path, slots, ignore, progress=False)
    for part in (str(path), *parts):
        assert part in str(error.value)
    assert str(error.value).replace("\n", "").isprintable() and len(str(error.value)) < 4000
    for slot in slots.values():
        assert (slot.view == UNTOUCHED).all()
    return str(error.value)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem, count", [("ema", 139), ("ae", 180)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loads_conformance_weights_bit_for_bit(stem, count, dtype):
    path = find_weights(CONFORMANCE, stem)
    expected = load_file(path)
    slots = make_slots(expected, dtype)
    load_weights(path, slots, progress=False)
    assert len(expected) == count
    for name, tensor in expected.items():
        assert torch.equal(slots[name].view, tensor.to(dtype)), name


@pytest.mark.parametrize("staging", [1, 100, 1000, 1 << 20], ids=lambda n: f"{n}-byte-staging")
def test_loads_strided_broadcast_and_odd_shapes_with_any_staging_size(tmp_path, monkeypatch, staging):
    monkeypatch.setattr(read, "_STAGING_BYTES", staging)
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
    slots = make_slots(tensors, torch.float32) | {
        "gate": WeightSlot(gate_up[0::2], (5, 24)),
        "up": WeightSlot(gate_up[1::2], (5, 24)),
        "q_norm": WeightSlot(heads[1:5], (8,)),
    }
    load_weights(tmp_path / "ema.safetensors", slots, progress=False)
    assert torch.equal(gate_up.view(5, 2, 24), torch.stack([tensors["gate"], tensors["up"]], 1).float())
    assert torch.equal(heads[1:5], tensors["q_norm"].double().expand(4, 8))
    assert (heads[0] == UNTOUCHED).all() and (heads[5] == UNTOUCHED).all()
    for name in ("scalar", "none", "flat", "conv"):
        assert torch.equal(slots[name].view, tensors[name].float()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_converts_every_float_dtype(tmp_path, dtype):
    save_file({"w": torch.tensor([1.5, -2.0, 0.25], dtype=dtype)}, tmp_path / "ema.safetensors")
    slots = make_slots({"w": torch.empty(3)})
    load_weights(tmp_path / "ema.safetensors", slots, progress=False)
    assert slots["w"].view.tolist() == [1.5, -2.0, 0.25]


def test_loads_into_parameters_and_inference_tensors(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "ema.safetensors")
    parameter = torch.nn.Parameter(torch.zeros(2))
    with torch.inference_mode():
        frozen = torch.zeros(2)
    slots = {"a": WeightSlot(parameter, (2,)), "b": WeightSlot(frozen, (2,))}
    load_weights(tmp_path / "ema.safetensors", slots, progress=False)
    assert parameter.tolist() == frozen.tolist() == [1, 1] and parameter.requires_grad


def test_ignore_matches_case_sensitive_shell_patterns(tmp_path):
    tensors = {"w": torch.ones(2), "a.rotary_emb.inv_freq": torch.ones(3), "step": torch.tensor([3])}
    save_file(tensors, tmp_path / "ema.safetensors")
    slots = make_slots({"w": torch.empty(2)})
    assert_rejected(
        tmp_path / "ema.safetensors", slots, "unexpected tensor step of shape [1]", ignore=("*.inv_freq", "STEP")
    )
    load_weights(tmp_path / "ema.safetensors", slots, ("*.inv_freq", "st?p"), progress=False)
    assert slots["w"].view.tolist() == [1, 1]


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar_counts_bytes_on_stderr_and_is_optional(tmp_path, capsys, progress):
    save_file({"w": torch.ones(250, 4)}, tmp_path / "ema.safetensors")
    load_weights(tmp_path / "ema.safetensors", make_slots({"w": torch.empty(250, 4)}), progress=progress)
    out, err = capsys.readouterr()
    assert out == "" and ("ema.safetensors: 100%" in err and "4.00k/4.00k" in err) == progress == bool(err)


@pytest.mark.parametrize("shape, view", [((3,), (2, 4)), ((2, 4), (4,)), ((2, 1, 4), (2, 4))], ids=str)
def test_rejects_a_shape_that_does_not_broadcast_to_the_view(shape, view):
    with pytest.raises(ValueError, match="shape must broadcast to"):
        WeightSlot(torch.empty(view), shape)


def test_check_works_on_meta_tensors():
    slots = {
        name: WeightSlot(torch.empty(tensor.shape, device="meta"), tensor.shape)
        for name, tensor in read_header(CONFORMANCE / "ae.safetensors").items()
    }
    assert check_weights(CONFORMANCE / "ae.safetensors", slots).keys() == slots.keys()
    slots["decoder.conv_in.bias"] = WeightSlot(torch.empty(1 << 50, device="meta"), (1 << 50,))
    with pytest.raises(CheckpointError, match=r"decoder.conv_in.bias must be \[1125899906842624\], got \[32\]"):
        check_weights(CONFORMANCE / "ae.safetensors", slots)


# --- tensors that do not match ----------------------------------------------------------------------------------------

FILE = {"a": torch.ones(2, 3), "b": torch.ones(4)}
LACKS, SHAPES = "has only 1 of the 2 tensors", "has 1 tensor of other shapes than the model"
EXTRA = "has 1 tensor beyond those of the model"
MISMATCHES = [
    pytest.param({"a": FILE["a"]}, LACKS, "missing tensor b of shape [4]", id="missing-tensor"),
    pytest.param(FILE | {"c": torch.ones(5)}, EXTRA, "unexpected tensor c of shape [5]", id="extra-tensor"),
    pytest.param(FILE | {"b": torch.ones(3)}, SHAPES, "shape of b must be [4], got [3]", id="wrong-shape"),
    pytest.param(FILE | {"a": torch.ones(3, 2)}, SHAPES, "of a must be [2, 3], got [3, 2]", id="transposed-tensor"),
    pytest.param(FILE | {"b": torch.ones(1)}, SHAPES, "shape of b must be [4], got [1]", id="no-implicit-broadcast"),
    pytest.param(FILE | {"\x1b[2J\n": torch.ones(1)}, EXTRA, r"tensor '\x1b[2J\n' of", id="terminal-escape"),
    pytest.param({"c": torch.ones(5)}, "contains none of the 2 tensors", "missing tensor a", id="another-model"),
]


@pytest.mark.parametrize("tensors, cause, detail", MISMATCHES)
def test_reports_a_mismatch_before_copying(tmp_path, tensors, cause, detail):
    path = tmp_path / "ema.safetensors"
    save_file(tensors, path)
    remedy = "Use the configuration and the weights of the same model folder, or download the published weights: hf"
    assert_rejected(path, make_slots(FILE), cause, detail, remedy)


def test_error_lists_a_few_tensors_of_every_kind_of_mismatch(tmp_path):
    extra = {f"w{i}": torch.ones(1) for i in range(300)}
    save_file({"a": torch.ones(7)} | extra, tmp_path / "ema.safetensors")
    message = assert_rejected(tmp_path / "ema.safetensors", make_slots(FILE))
    assert message.splitlines()[1:] == [
        "  missing tensor b of shape [4]",
        "  shape of a must be [2, 3], got [7]",
        "  unexpected tensor w0 of shape [1]",
        "  unexpected tensor w1 of shape [1]",
        "  and 298 more unexpected",
    ]


# --- corrupt files ----------------------------------------------------------------------------------------------------


def packed(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = packed({"a": entry(0, 24, shape=[2, 3]), "b": entry(24, 40)}, bytes(40))
ZIP = b"PK\x03\x04" + bytes(60)
PICKLE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + bytes(60)
DISAGREE = "must be a dtype, a shape and two data_offsets that match them"
CORRUPT = [
    pytest.param(GOOD + b"\0", f"its tensors end at byte {len(GOOD)}", id="bytes-after-the-last-tensor"),
    pytest.param(packed({}, length=1 << 62), "header length of 4611686018427387904", id="header-of-4-exabytes"),
    pytest.param(packed({}, length=(1 << 64) - 1), "header length of 18446744073709551615", id="header-of-all-ones"),
    pytest.param(packed({}, length=0), "got a header length of 0.", id="header-of-no-bytes"),
    pytest.param(packed(b"not json"), "the header is not JSON in UTF-8", id="header-that-is-not-JSON"),
    pytest.param(packed(b'{"\xff": 0}'), "the header is not JSON in UTF-8", id="header-that-is-not-UTF-8"),
    pytest.param(packed(b"[" * 99_999), "the header is not JSON in UTF-8", id="header-of-brackets"),
    pytest.param(packed([]), "the header must be a JSON object, got list", id="header-that-is-a-list"),
    pytest.param(
        packed({"a": entry(0, 24), "b": entry(20, 36)}, bytes(36)), "b must start at byte", id="overlapping-tensors"
    ),
    pytest.param(
        packed({"a": entry(0, 24), "b": entry(0, 24)}, bytes(24)), "without gap or overlap", id="tensors-sharing-bytes"
    ),
    pytest.param(
        packed({"a": entry(0, 24), "b": entry(28, 44)}, bytes(44)), "without gap or overlap", id="gap-in-between"
    ),
    pytest.param(packed({"a": entry(8, 32)}, bytes(32)), "a must start at byte", id="gap-at-the-start"),
    pytest.param(packed({"a": entry(24, 0, shape=[6])}, bytes(24)), DISAGREE, id="end-before-its-start"),
    pytest.param(packed({"a": entry(24, 0, "I64", [3])}, bytes(24)), DISAGREE, id="end-before-its-start-in-integers"),
    pytest.param(packed({"a": entry(-24, 0)}, bytes(24)), DISAGREE, id="negative-offset"),
    pytest.param(packed({"a": entry(0, 24, shape=[7])}, bytes(24)), DISAGREE, id="shape-of-other-size"),
    pytest.param(packed({"a": entry(0, 24, "F64", [6])}, bytes(24)), DISAGREE, id="dtype-of-other-size"),
    pytest.param(packed({"a": entry(0, 24, shape=[-2, -3])}, bytes(24)), DISAGREE, id="negative-dimensions"),
    pytest.param(packed({"a": entry(0, 24, shape=[6.0])}, bytes(24)), DISAGREE, id="fractional-dimension"),
    pytest.param(packed({"a": entry(0, 24, shape=[6, True])}, bytes(24)), DISAGREE, id="bool-dimension"),
    pytest.param(packed({"a": entry(0, 24, shape="6")}, bytes(24)), DISAGREE, id="shape-in-a-string"),
    pytest.param(packed({"a": entry(0, 24, shape=[6] + [1] * 8)}, bytes(24)), DISAGREE, id="nine-dimensions"),
    pytest.param(packed({"a": entry(0, 24, shape=[9] * 10**6)}, bytes(24)), DISAGREE, id="million-dimensions"),
    pytest.param(packed({"a": entry(0, 24, 7)}, bytes(24)), DISAGREE, id="dtype-that-is-a-number"),
    pytest.param(packed({"a": {"dtype": "F32", "shape": [6]}}, bytes(24)), DISAGREE, id="no-offsets"),
    pytest.param(packed({"a": entry(0, 24) | {"data_offsets": [0, 24, 24]}}, bytes(24)), DISAGREE, id="three-offsets"),
    pytest.param(packed({"a": 3}), DISAGREE, id="entry-that-is-a-number"),
]


@pytest.mark.parametrize("content, message", CORRUPT)
def test_rejects_a_corrupt_file(tmp_path, content, message):
    path = tmp_path / "ema.safetensors"
    path.write_bytes(content)
    assert_rejected(path, make_slots(FILE), message, REMEDY)


@pytest.mark.parametrize(
    "size", [len(GOOD) - 1, len(GOOD) - 30, 135, 7], ids=["last-tensor", "first-tensor", "header", "length"]
)
def test_rejects_a_truncated_file(tmp_path, size):
    path = tmp_path / "ema.safetensors"
    path.write_bytes(GOOD[:size])
    expected = len(GOOD) - (40 if size < 136 else 0)  # without the header, the size of the tensors is unknown
    cause = f"is truncated: it has {size} of {expected} bytes. The download did not finish; download it again"
    assert_rejected(path, make_slots(FILE), cause, f"hf download ByteDance-Seed/BAGEL-7B-MoT --local-dir {tmp_path}")


OTHER_CONTENTS = {
    "empty-file": (b"", "is empty. Download it again."),
    "web-page": (b"<!DOCTYPE html>\n<html><head><title>Sign in", "is a web page, such as an error or login page"),
    "web-page-in-lower-case": (b"\n <html lang=en>", "is a web page"),
    "lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9", "is a Git LFS pointer"),
    "text": (b"Entry not found", "is a text file, not a safetensors file. It starts with 'Entry not found'."),
    "json-error": (b'{"error":"Invalid credentials"}', "is a text file, not a safetensors file"),
    "zeros": (bytes(100), "contains only zeros at its start. The download did not finish; download it again"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(60), "is a GGUF file, a format that is not supported"),
}


@pytest.mark.parametrize("content, cause", OTHER_CONTENTS.values(), ids=OTHER_CONTENTS)
def test_error_says_what_was_saved_in_place_of_weights(tmp_path, content, cause):
    path = tmp_path / "ema.safetensors"
    path.write_bytes(content)
    assert len(assert_rejected(path, make_slots(FILE), cause).splitlines()) == 1


@pytest.mark.parametrize("kind", ["empty-file", "web-page", "lfs-pointer"])
def test_error_says_what_was_saved_in_place_of_json(tmp_path, kind):
    content, cause = OTHER_CONTENTS[kind]
    (tmp_path / "llm_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"llm_config.json {cause}"):
        files.read_json(tmp_path / "llm_config.json")


def test_loads_the_file_that_the_corrupt_ones_are_made_from(tmp_path):
    (tmp_path / "ema.safetensors").write_bytes(GOOD)
    slots = make_slots(FILE)
    load_weights(tmp_path / "ema.safetensors", slots, progress=False)
    assert not slots["a"].view.any() and not slots["b"].view.any()


def test_rejects_a_header_of_17_mb_without_reading_it(tmp_path):
    path = tmp_path / "ema.safetensors"
    path.write_bytes(packed(b"", length=17 << 20))
    os.truncate(path, 18 << 20)
    assert_rejected(path, make_slots(FILE), "must have at most 16777216 bytes", "header length of 17825792", REMEDY)


@pytest.mark.parametrize(
    "name, content",
    [
        pytest.param("ema.safetensors", ZIP, id="zip-renamed-safetensors"),
        pytest.param("ema.safetensors", PICKLE, id="pickle-renamed-safetensors"),
        pytest.param("ema.pt", ZIP, id="pt-file"),
        pytest.param("ema.bin", b"(lp0\n.", id="text-pickle"),
    ],
)
def test_rejects_a_pickle_without_loading_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    remedy = "pickles can execute code when loaded and are not supported. Convert it to safetensors."
    assert_rejected(tmp_path / name, make_slots(FILE), remedy)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "fifo"])
def test_rejects_a_path_that_is_not_a_regular_file(tmp_path, make):
    make(tmp_path / "ema.safetensors")
    assert_rejected(tmp_path / "ema.safetensors", make_slots(FILE), "is not a file. Put the published file there.")


@pytest.mark.parametrize("name", ["ema.safetensors", "ema.safetensors.index.json"])
def test_rejects_a_missing_file(tmp_path, name):
    assert_rejected(
        tmp_path / name, make_slots(FILE), "cannot be read: No such file or directory. Put the published file there."
    )


def test_raises_if_the_file_shrinks_after_the_check(tmp_path, monkeypatch):
    path = tmp_path / "ema.safetensors"
    path.write_bytes(GOOD)

    def check_then_shrink(*arguments):
        stored = check_weights(*arguments)
        os.truncate(path, len(GOOD) - 1)
        return stored

    monkeypatch.setattr(read, "check_weights", check_then_shrink)
    with pytest.raises(CheckpointError, match="changed while it was being read: b is truncated"):
        load_weights(path, make_slots(FILE), progress=False)


@pytest.mark.parametrize("module", [files, find, header, mismatch, read, write, config])
def test_modules_that_read_files_do_not_unpickle(module):
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load")
    assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


# --- memory -----------------------------------------------------------------------------------------------------------

# 600 MB of float32 zeros in a sparse file, one tensor of 320 MB among them, go into bfloat16. To read or map the file
# whole, or that tensor whole, would exceed the limit of 150 MB beyond the slots.
MEMORY = """
import resource, sys, torch
from pathlib import Path
from bagel_rt.checkpoint.header import read_header
from bagel_rt.checkpoint.read import WeightSlot, load_weights
path = Path(sys.argv[1])
ones = {name: torch.ones(t.shape, dtype=torch.bfloat16) for name, t in read_header(path).items()}
slots = {name: WeightSlot(tensor, tuple(tensor.shape)) for name, tensor in ones.items()}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
load_weights(path, slots, progress=False)
print(peak() - before)
assert not any(tensor.view(torch.int64).count_nonzero() for tensor in ones.values())
"""


def test_loading_600_mb_uses_less_than_150_mb_beyond_the_slots(tmp_path):
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
