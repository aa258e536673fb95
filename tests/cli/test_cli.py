"""``bagel-rt``: results on stdout and in files, failures, progress and help."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import WIDE, good, run
from conftest import CHECKPOINT, PACK
from PIL import Image
from typer.testing import CliRunner

from bagel_rt import Bagel, ImageResult, __version__
from bagel_rt.cli import app
from bagel_rt.models.bagel.settings import TASKS

SMALL = ("--width", "48", "--height", "32", "--num-timesteps", "3", "--device", "cpu")


def process(*args):
    command = [sys.executable, "-m", "bagel_rt.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def pixels(source):
    return np.asarray(Image.open(source) if isinstance(source, Path) else source)


@pytest.fixture(autouse=True)
def model(monkeypatch):
    """The commands take the model of the fixture ``bagel``, which is faster than the embedded one."""
    monkeypatch.setenv("BAGEL_RT_MODEL", str(CHECKPOINT))


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(path)
    return path


# Failures


def test_failure_is_one_line_and_keeps_the_old_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory\nand forty lines of C++")

    out = tmp_path / "out.png"
    out.write_text("old")
    monkeypatch.setattr(Bagel, "generate", fail)
    result = run("generate", "x", "-o", out, "--overwrite", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"bagel-rt: error: RuntimeError: CUDA out of memory \(.*BAGEL_RT_DEBUG.*\)\n", result.stderr)
    assert out.read_text() == "old" and os.listdir(tmp_path) == ["out.png"]
    assert "in fail" in run("generate", "x", "-o", out, "--overwrite", env={"BAGEL_RT_DEBUG": "1"}).stderr


def test_full_disk_leaves_no_partial_image(tmp_path, monkeypatch):
    def fill_up(image, file, **_):
        file.write(b"\x89PNG")
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out.png"
    out.write_text("old")
    monkeypatch.setattr(Image.Image, "save", fill_up)
    result = run("generate", "x", "-o", out, "--overwrite", *SMALL)
    assert result.exit_code == 1 and "No space left" in result.stderr
    assert out.read_text() == "old" and os.listdir(tmp_path) == ["out.png"]


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_leaves_no_file(tmp_path):
    out = tmp_path / "out.png"
    arguments = ["generate", "x", "-o", str(out), "--num-timesteps", "1000", "--progress", "--device", "cpu"]
    command = [sys.executable, "-m", "bagel_rt.cli", *arguments]
    restore_interrupts = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a job in the background ignores it
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=restore_interrupts)
    seen = b""
    while b"image:" not in seen:
        byte = worker.stderr.read(1)
        assert byte, seen
        seen += byte
    worker.send_signal(signal.SIGINT)
    stdout, stderr = worker.communicate(timeout=60)
    assert (worker.returncode, stdout) == (130, b"")
    assert b"Traceback" not in stderr
    assert os.listdir(tmp_path) == []


# Images


def test_generate_writes_the_image_of_the_library(bagel, tmp_path):
    out = tmp_path / "a.png"
    printed = good("generate", "a cat", "-o", out, *SMALL, "--seed", 5, "--negative-prompt", "dog")
    assert printed == f"{out}: 48x32, seed 5\n"
    expected = bagel.generate("a cat", size=(32, 48), num_timesteps=3, seed=5, negative_prompt="dog")
    assert (pixels(out) == pixels(expected.image)).all()


def test_png_parameters_reproduce_the_image(tmp_path):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    options = (*SMALL, "--negative-prompt", "dull", "--cfg-interval", 0.1, 0.9, "--cfg-renorm-type", "channel")
    options += ("--timestep-shift", 2.5, "--think", "--max-think-token-n", 6, "--do-sample")
    good("generate", "ein Käfig 🦊", "-o", first, *options)
    image = Image.open(first)
    parameters = json.loads(image.text["parameters"])
    assert image.text["Software"] == f"bagel_rt {__version__}"
    source = {name: parameters.pop(name) for name in ("task", "version", "model")}
    assert source == {"task": "generate", "version": __version__, "model": "checkpoint"}
    assert str(tmp_path) not in str(image.text) and str(CHECKPOINT) not in str(image.text)
    assert parameters.pop("thought")
    prompt, options = parameters.pop("prompt"), []
    for name, value in parameters.items():
        flag = "--" + name.replace("_", "-")
        options += (
            [flag] * value if isinstance(value, bool) else [flag, *value] if type(value) is list else [flag, value]
        )
    good("generate", prompt, "-o", second, "--device", "cpu", *options)
    assert (pixels(first) == pixels(second)).all()
    assert Image.open(second).text == image.text


def test_reported_defaults_are_the_official_ones(tmp_path, photo):
    report = json.loads(
        good("edit", photo, "x", "-o", tmp_path / "a.png", "--device", "cpu", "--num-timesteps", 3, "--json")
    )
    parameters = report["outputs"][0]["parameters"]
    official = asdict(TASKS["edit"].image) | {"num_timesteps": 3}
    assert parameters.items() >= json.loads(json.dumps(official)).items()


def test_several_prompts_write_numbered_images_with_consecutive_seeds(bagel, tmp_path):
    report = json.loads(good("generate", "a", "b", "-o", tmp_path / "x.png", *SMALL, "--seed", 7, "--json"))
    assert sorted(os.listdir(tmp_path)) == ["x-1.png", "x-2.png"]
    assert [(output["path"], output["seed"]) for output in report["outputs"]] == [
        (str(tmp_path / "x-1.png"), 7),
        (str(tmp_path / "x-2.png"), 8),
    ]
    expected = bagel.generate("b", size=(32, 48), num_timesteps=3, seed=8)
    assert np.abs(pixels(tmp_path / "x-2.png").astype(int) - pixels(expected.image)).max() <= 1  # alone, not in a batch


def test_random_seed_is_reported_and_differs(tmp_path):
    outputs = (tmp_path / "1.png", tmp_path / "2.png")
    reports = [json.loads(good("generate", "a", "-o", output, *SMALL, "--json")) for output in outputs]
    assert len({report["outputs"][0]["seed"] for report in reports}) == 2


def test_missing_side_defaults_to_that_of_the_model(tmp_path):
    good("generate", "a", "-o", tmp_path / "x.png", "--height", 32, "--num-timesteps", 2, "--device", "cpu")
    assert Image.open(tmp_path / "x.png").size == (128, 32)


def test_edit_takes_images_in_order_and_overwrites_its_input_on_request(bagel, tmp_path, photo):
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 80), "teal").save(other)
    original = Image.open(photo).copy()
    arguments = ("edit", photo, "mix", "--image", other, "-o", photo, "--num-timesteps", 3, "--seed", 1)
    good(*arguments, "--device", "cpu", "--overwrite")
    expected = bagel.edit([original, Image.open(other)], "mix", num_timesteps=3, seed=1)
    assert (pixels(photo) == pixels(expected.image)).all()
    assert json.loads(Image.open(photo).text["parameters"])["images"] == ["photo.png", "other.png"]


def test_output_has_default_permissions(tmp_path):
    good("generate", "a", "-o", tmp_path / "x.PNG", *SMALL)
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.PNG").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Texts


def test_chat_prints_the_answer_of_the_library(bagel, photo):
    printed = good("chat", "what is it?", "--image", photo, "--max-think-token-n", 12, "--device", "cpu")
    assert printed == bagel.chat("what is it?", [photo], max_think_token_n=12) + "\n"
    assert len(printed) > 3


def test_chat_json_has_seed_and_parameters(bagel):
    options = ("--do-sample", "--text-temperature", 2, "--max-think-token-n", 12, "--device", "cpu")
    report = json.loads(good("chat", "hm", "--json", *options))
    decoding = {"max_think_token_n": 12, "do_sample": True, "text_temperature": 2.0, "top_k": 0, "top_p": 1.0}
    assert report["parameters"] == {"prompt": "hm", "images": [], "think": False} | decoding
    expected = bagel.chat("hm", seed=report["seed"], **decoding)
    assert report["outputs"] == [{"type": "text", "text": expected}]
    assert report["seconds"] > 0 and report["load_seconds"] > 0


def test_chat_prints_each_piece_before_the_next_is_generated(monkeypatch):
    def stream(self, prompt, images, **_):
        yield "one "
        assert sys.stdout.buffer.getvalue() == b"one "
        yield "two"
        assert sys.stdout.buffer.getvalue() == b"one two"

    monkeypatch.setattr(Bagel, "stream", stream)
    assert good("chat", "count") == "one two\n"


def test_interleave_keeps_the_order_of_texts_and_images(monkeypatch, tmp_path, photo):
    received = {}
    image = ImageResult(Image.new("RGB", (4, 2)), 9, {"num_timesteps": 3}, torch.zeros(1))

    def interleave(self, inputs, **options):
        received.update(options, inputs=inputs)
        return ["first", image, "then", image, "done"]

    monkeypatch.setattr(Bagel, "interleave", interleave)
    out = tmp_path / "out.png"
    parts = ("look:", photo, f"text:{photo}", f"image:{photo}", "text:image:x", "no such file.png")
    arguments = ("interleave", *parts, "-o", out, "--seed", 9, "--max-rounds", 2, "--height", 64)
    printed = good(*arguments)
    assert printed.splitlines() == [
        "first", f"{tmp_path}/out-1.png: 4x2, seed 9", "then", f"{tmp_path}/out-2.png: 4x2, seed 9", "done"
    ]  # fmt: skip
    texts = [part if isinstance(part, str) else part.size for part in received["inputs"]]
    assert texts == ["look:", (90, 70), str(photo), (90, 70), "image:x", "no such file.png"]
    assert (received["think"], received["max_rounds"], received["size"], received["seed"]) == (True, 2, (64, 128), 9)

    outputs = json.loads(good(*arguments, "--json", "--no-think", "--overwrite"))["outputs"]
    assert [output["type"] for output in outputs] == ["text", "image", "text", "image", "text"]
    assert outputs[3]["path"] == f"{tmp_path}/out-2.png" and not received["think"]
    parameters = json.loads(Image.open(tmp_path / "out-2.png").text["parameters"])["parts"]
    assert parameters == ["look:", "photo.png", str(photo), "photo.png", "image:x", "no such file.png"]


def test_interleave_runs_on_the_real_model(tmp_path, photo):
    report = json.loads(good("interleave", photo, "why?", "-o", tmp_path / "o.png", "--max-think-token-n", 8, "--json"))
    assert [output["type"] for output in report["outputs"]] == ["text"]


# Progress


def test_progress_bars_are_off_by_default_without_a_terminal(tmp_path):
    arguments = ("generate", "x", "-o", tmp_path / "x.png", *SMALL, "--think", "--max-think-token-n", 4)
    result = run(*arguments, "--progress", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)
    for bar in ("ema.safetensors:", "ae.safetensors:", "text:", "image:"):
        assert bar in result.stderr
    assert "0/3 " in result.stderr and "0/2 " in result.stderr  # three timesteps make two steps
    good(*arguments, "--overwrite")  # nothing on stderr


# Help


@pytest.mark.parametrize("command", TASKS)
def test_help_shows_every_hyper_parameter_and_its_default_for_the_task(command):
    page = good(command, "--help", env=WIDE)
    options = re.split(r"\n│ (?=[* ]*--)", page)
    for part in filter(None, TASKS[command]):
        for field in fields(part):
            flag, value = "--" + field.name.replace("_", "-"), getattr(part, field.name)
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            shown = {"True": flag[2:], "False": "no-" + flag[2:]}.get(shown, shown)
            (option,) = [option for option in options if option.startswith(f"{flag} ")]
            assert f"[default: {shown}]" in option
    assert ("--cfg-text-scale" in page) == (TASKS[command].image is not None)


def test_help_names_options_and_shows_the_limits_of_the_server():
    assert "With --do-sample: " in good("chat", "--help", env=WIDE) and "do_sample" not in good("chat", "--help")
    assert re.search(r"Requests in the queue[^[]*\[default: \(64\)\]", good("serve", "--help", env=WIDE))


def test_help_and_version_do_not_import_torch():
    script = (
        "import sys\nfrom bagel_rt.cli import app\ntry: app({!r})\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    for arguments in (["--help"], ["generate", "--help"], ["--version"], ["generate", "x", "-o", "x.tif"]):
        subprocess.run([sys.executable, "-c", script.format(arguments)], check=True, capture_output=True)


def test_the_module_runs_as_a_program(tmp_path):
    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"bagel_rt {__version__}\n", "")
    done = process("generate", "x", "-o", tmp_path / "x.png", *SMALL, "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["outputs"][0]["path"] == str(tmp_path / "x.png")
    done = process("generate", "x", "-o", tmp_path / "no" / "x.png")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_closed_pipe_causes_no_traceback():
    command = [sys.executable, "-m", "bagel_rt.cli", "conformance", str(PACK), "--case", "0[0-2]*"]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    worker.stdout.close()
    assert worker.stderr.read() == b""
    assert worker.wait(timeout=60) == 1


def test_characters_missing_from_the_terminal_are_escaped(monkeypatch):
    monkeypatch.setattr(Bagel, "stream", lambda *_, **__: iter(["naïve 🦊"]))
    result = CliRunner(charset="latin-1").invoke(app, ["chat", "x"])
    assert (result.exit_code, result.stdout) == (0, "naïve \\U0001f98a\n")
