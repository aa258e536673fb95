"""``bagel-rt``: every usage error is one line before any work, and names the option and the remedy."""

import os
import re
import shutil

import pytest
from commands import run
from conftest import CHECKPOINT, PACK
from PIL import Image


@pytest.fixture(autouse=True)
def model(monkeypatch):
    monkeypatch.setenv("BAGEL_RT_MODEL", str(CHECKPOINT))


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (90, 70)).save(path)
    return path


OUT = ("-o", "{tmp}/out.png")
DRAW = ("generate", "x", *OUT)
USAGE_ERRORS = {
    "no command": ((), "Missing command"),
    "an unknown command": (("draw", "x"), "No such command 'draw'. See bagel-rt --help."),
    "an unknown option": ((*DRAW, "--cfg-scale", "4"), "No such option: --cfg-scale (Possible options: --cfg-img"),
    "no prompt": (("generate", *OUT), "Missing argument 'PROMPT'. See bagel-rt generate --help."),
    "an empty prompt": (
        ("generate", "a", "", *OUT),
        "PROMPT must be a text with at least one visible character, got ''.",
    ),
    "a blank question": (("chat", " \t"), "visible character, got ' \\t'. Ask a question."),
    "a blank instruction": (("edit", "{photo}", "\u200b", *OUT), "Describe the change."),
    "a blank text": (("interleave", " ", *OUT), "visible character"),
    "a prompt that is not UTF-8": (("generate", "caf\udce9", *OUT), "must be text in UTF-8, got 'caf\\udce9'."),
    "no output": (("generate", "x"), "Missing option '--output'"),
    "an unquoted prompt": (
        ("edit", "{photo}", "make", "it", "blue", *OUT),
        "(it blue). Put a prompt of several words in",
    ),
    "an empty output": (("generate", "x", "-o", ""), "--output must be a path, got ''."),
    "an empty model": (("chat", "x", "--model", ""), "--model must be a path, got ''."),
    "an empty image": (("chat", "x", "--image", ""), "--image must be a path, got ''."),
    "an output of an unknown format": (
        ("generate", "x", "-o", "{tmp}/out.tif"),
        "must be a file name that ends in .png",
    ),
    "an output in a missing folder": (("generate", "x", "-o", "{tmp}/no/out.png"), "/no first."),
    "an output in a file": (("generate", "x", "-o", "{photo}/out.png"), "photo.png is a file."),
    "an output that is a folder": (("generate", "x", "-o", "{tmp}/folder.png"), "folder.png. This is a folder."),
    "an output that is not writable": (("generate", "x", "-o", "/proc/out.png"), "/proc/out.png. No such file"),
    "an output that exists": (
        ("generate", "x", "-o", "{photo}"),
        "photo.png. This one exists; --overwrite replaces it.",
    ),
    "an output that is the input": (("edit", "{photo}", "x", "-o", "{photo}"), "--overwrite replaces it."),
    "a numbered output that exists": (("generate", "a", "b", "-o", "{tmp}/old.png"), "old-2.png. This one exists"),
    "an image of a round that exists": (("interleave", "a", "-o", "{tmp}/old.png"), "old-2.png. This one exists"),
    "a sheet that exists": (("eval", "--sheet", "{photo}"), "--sheet must be a new file"),
    "a report that is no JSON": (
        ("eval", "--report", "{tmp}/a.txt"),
        "--report must be a file name that ends in .json",
    ),
    "a quality for PNG": ((*DRAW, "--quality", "80"), "--quality must be left out for PNG, got 80."),
    "a quality out of range": ((*DRAW, "--quality", "101"), "--quality must be an integer from 1 to 100, got 101."),
    "several images to stdout": (("generate", "a", "b", "-o", "-"), "--output must be a file name, got '-'."),
    "rounds to stdout": (("interleave", "a", "-o", "-"), "--output must be a file name, got '-'."),
    "image and report to stdout": (("generate", "a", "-o", "-", "--json"), "stdout is for the report"),
    "two inputs from stdin": (("edit", "-", "-", *OUT), "- must be given once at most, got 2."),
    "a prompt and an image from stdin": (("chat", "-", "--image", "-"), "- must be given once at most, got 2."),
    "a text and an image from stdin": (("interleave", "text:-", "image:-", *OUT), "- must be given once at most"),
    "an output with too long a name": (("generate", "x", "-o", "{tmp}/" + "n" * 300 + ".png"), "too long"),
    "an invalid number": ((*DRAW, "--cfg-text-scale", "big"), "--cfg-text-scale must be a number, got 'big'."),
    "a scale out of range": ((*DRAW, "--cfg-text-scale", "101"), "must be a number from 0 to 100, got 101.0"),
    "a scale that is not finite": ((*DRAW, "--cfg-img-scale", "nan"), "must be a number from 0 to 100, got nan"),
    "half an interval": ((*DRAW, "--cfg-interval", "0.4"), "--cfg-interval"),
    "a reversed interval": ((*DRAW, "--cfg-interval", "1", "0"), "low <= high"),
    "an unknown renormalization": ((*DRAW, "--cfg-renorm-type", "local"), "'local'"),
    "a schedule without steps": ((*DRAW, "--num-timesteps", "1"), "must be an integer from 2 to 1000, got 1"),
    "a temperature of zero": (
        ("chat", "x", "--text-temperature", "0"),
        "got 0.0. Turn --do-sample off",
    ),
    "a negative seed": ((*DRAW, "--seed", "-1"), "--seed must be an integer from 0"),
    "a size that is no size": ((*DRAW, "--size", "512"), "--size must be WIDTHxHEIGHT, such as 1024x768, got '512'."),
    "a size off the grid": ((*DRAW, "--size", "64x100"), "multiples of 16 from 16 to 256, got 64x100"),
    "a size and a side": ((*DRAW, "--size", "64x64", "--width", "64"), "--size must be left out with --width"),
    "a width off the grid": ((*DRAW, "--width", "100"), "multiples of 16 from 16 to 256, got 100x"),
    "a height of zero": ((*DRAW, "--height", "0"), "multiples of 16 from 16 to 256, got"),
    "a width past the position table": ((*DRAW, "--width", "272"), "from 16 to 256, got 272x"),
    "an unknown device": (("chat", "x", "--device", "tpu"), "must be cpu, cuda or cuda:N, got 'tpu'."),
    "an unavailable device": (("chat", "x", "--device", "cuda:99"), "--device must be cpu or one of the"),
    "an unknown dtype": (
        ("chat", "x", "--dtype", "int8"),
        "--dtype must be float32, bfloat16, float16, fp32, bf16 or fp16, got 'int8'.",
    ),
    "an image that is missing": (("edit", "{tmp}/no.png", "x", *OUT), "no.png: no such file"),
    "prompt and image exchanged": (("edit", "make it night", "{photo}", *OUT), "make it night: no such file"),
    "an image that is a text": (("chat", "x", "--image", "{tmp}/note.txt"), "note.txt: not an image"),
    "an image that is a folder": (("chat", "x", "--image", "{tmp}"), "is not a file"),
    "a part that looks like a missing image": (("interleave", "a", "b.png", *OUT), "write text:b.png"),
    "a part that must be an image": (("interleave", "a", "image:b", *OUT), "b: no such file"),
    "no rounds": (("interleave", "a", *OUT, "--max-rounds", "0"), "must be an integer from 1 to 16, got 0."),
    "too many rounds": (
        ("interleave", "a", *OUT, "--max-rounds", "99"),
        "--max-rounds must be an integer from 1 to 16,",
    ),
    "rounds that are no number": (("interleave", "a", *OUT, "--max-rounds", "1_0"), "must be an integer, got '1_0'."),
    "a port that is no number": (("serve", "--port", "http"), "--port must be an integer, got 'http'."),
    "a queue without room": (("serve", "--queue", "0"), "--queue must be an integer >= 1, got 0."),
    "a request for no images": (("memory", "--batch", "0"), "--batch must be an integer from 1 to 64, got 0."),
    "an estimate for negative memory": (("memory", "--available", "-1"), "--available must be a number from 0"),
    "an unknown task": (("memory", "--task", "draw"), "--task must be generate, edit or chat, got 'draw'."),
    "a folder that is not a conformance pack": (("conformance", "{tmp}"), "is not a conformance pack"),
    "an unknown case": (("conformance", str(PACK), "--case", "99"), "--case must match one of 00_"),
    "a folder that is not empty": (("make-random-checkpoint", "{tmp}"), "must be a new or empty folder"),
    "a folder that is a file": (("make-random-checkpoint", "{photo}"), "must be a new or empty folder"),
    "an invalid model to copy": (("make-random-checkpoint", "{tmp}/new", "--like", "{tmp}"), "llm_config.json"),
    "a seed below zero": (("make-random-checkpoint", "{tmp}/new", "--seed", "-1"), "--seed must be an integer from 0"),
    "info about a model that is missing": (("info", "--model", "{tmp}/no"), "/no: no such folder"),
    "an estimate for a model on the Hub": (("memory", "--model", "a/b"), "hf download a/b --local-dir b"),
}


@pytest.mark.parametrize("args, message", USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_usage_error_is_one_line_before_any_work(args, message, tmp_path, photo, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("bagel_rt.models.bagel.model.BagelModel.from_folder", load)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "old-2.png").touch()
    before = sorted(tmp_path.rglob("*"))
    result = run(*(arg.format(tmp=tmp_path, photo=photo) for arg in args))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.fullmatch(r"bagel-rt: error: .*\n", result.stderr) and message in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "damage, message",
    [
        pytest.param(shutil.rmtree, "no such folder", id="no folder"),
        pytest.param(lambda at: (at / "llm_config.json").unlink(), "llm_config.json is missing", id="no config"),
        pytest.param(lambda at: (at / "ema.safetensors").unlink(), "must contain ema.safetensors", id="no weights"),
        pytest.param(lambda at: os.truncate(at / "ae.safetensors", 1000), "ae.safetensors", id="cut weights"),
        pytest.param(lambda at: (at / "config.json").write_text("{"), "is not JSON", id="broken config"),
        pytest.param(lambda at: [(at / name).unlink() for name in ("tokenizer.json", "vocab.json")],
                     "vocab.json", id="no tokenizer"),
    ],
)  # fmt: skip
def test_damaged_model_folder_exits_with_2(damage, message, tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    damage(tmp_path / "model")
    result = run("chat", "hello", "--model", tmp_path / "model")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("bagel-rt: error: ") and message in result.stderr
    assert "Traceback" not in result.stderr
