"""``bagel-rt``: prompts and images from stdin, images to stdout, image formats, and hints on stderr."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from commands import good, run
from conftest import CHECKPOINT
from PIL import Image

from bagel_rt.files import QUALITY, save_image, write_image

SMALL = ("--size", "48x32", "--num-timesteps", "3", "--device", "cpu", "--seed", "5")
USER_COMMENT = 0x9286


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setenv("BAGEL_RT_MODEL", str(CHECKPOINT))


@pytest.fixture
def encoded_photo(photo):
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()


def comment_of(image):
    comment = image.getexif().get_ifd(0x8769)[USER_COMMENT]
    assert comment.startswith(b"ASCII\0\0\0")
    return json.loads(comment[8:])


# stdin


def test_prompt_is_read_from_stdin(model, bagel, tmp_path):
    printed = good("generate", "-", "-o", tmp_path / "a.png", *SMALL, input="ein Käfig 🦊\r\n\n".encode())
    assert printed == f"{tmp_path}/a.png: 48x32, seed 5\n"
    image = Image.open(tmp_path / "a.png")
    assert json.loads(image.text["parameters"])["prompt"] == "ein Käfig 🦊"
    assert (
        good("chat", "-", "--max-think-token-n", 6, input=b"hello\n") == bagel.chat("hello", max_think_token_n=6) + "\n"
    )


def test_byte_order_mark_on_stdin_is_no_text(model, tmp_path):
    report = json.loads(good("chat", "-", "--max-think-token-n", 2, "--json", input="\ufeffhello".encode()))
    assert report["parameters"]["prompt"] == "hello"


def test_image_is_read_from_stdin(model, bagel, photo, encoded_photo, tmp_path):
    out = tmp_path / "a.png"
    good("edit", "-", "night", "-o", out, "--num-timesteps", 3, "--seed", 1, "--device", "cpu", input=encoded_photo)
    expected = bagel.edit(photo, "night", num_timesteps=3, seed=1).image
    assert (np.asarray(Image.open(out)) == np.asarray(expected)).all()
    assert json.loads(Image.open(out).text["parameters"])["images"] == ["-"]
    short = ("--max-think-token-n", 6)
    answer = bagel.chat("what?", [photo], max_think_token_n=6)
    assert good("chat", "what?", "--image", "-", *short, input=encoded_photo) == answer + "\n"
    good("interleave", "image:-", "what?", "-o", out.with_name("b.png"), *short, input=encoded_photo)


@pytest.mark.parametrize(
    "arguments, content, message",
    [
        (("chat", "-"), b"caf\xe9", "stdin must be text in UTF-8, got the byte 0xe9 at position 3. Convert the text."),
        (
            ("interleave", "-", "-o", "x.png"),
            b"\x89PNG",
            "stdin must be text in UTF-8, got the byte 0x89 at position 0.",
        ),
        (("edit", "-", "x", "-o", "x.png"), b"", "stdin must be an image, got no bytes."),
        (("edit", "-", "x", "-o", "x.png"), b"GIF8 or not", "not an image in one of the formats PNG, JPEG,"),
        (("chat", "-"), b"x" * (1 << 22 | 1), "stdin must have at most 4194304 bytes, got more."),
    ],
    ids=["latin-1", "an image as a text", "nothing", "no image", "too much"],
)
def test_invalid_stdin_is_a_usage_error(model, arguments, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, input=content)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("bagel-rt: error: ") and message in result.stderr
    assert os.listdir(tmp_path) == []


# stdout


def test_image_is_written_to_stdout_and_texts_to_stderr(model, bagel):
    result = run("generate", "a cat", "-o", "-", *SMALL)
    assert (result.exit_code, result.stderr) == (0, "stdout: 48x32, seed 5\n")
    image = Image.open(io.BytesIO(result.stdout_bytes))
    expected = bagel.generate("a cat", size=(32, 48), num_timesteps=3, seed=5).image
    assert image.format == "PNG" and (np.asarray(image) == np.asarray(expected)).all()
    assert json.loads(image.text["parameters"])["prompt"] == "a cat"


@pytest.mark.slow
def test_images_go_through_a_pipe(tmp_path):
    command = [sys.executable, "-m", "bagel_rt.cli"]
    generate = [*command, "generate", "a red star", "-o", "-", "--num-timesteps", "3"]
    edit = [*command, "edit", "-", "make the star blue", "-o", str(tmp_path / "b.webp"), "--num-timesteps", "3"]
    with subprocess.Popen(generate, stdout=subprocess.PIPE) as first:
        assert subprocess.run(edit, stdin=first.stdout, timeout=120).returncode == 0
        assert first.wait(60) == 0
    assert Image.open(tmp_path / "b.webp").format == "WEBP"


def test_read_only_file_is_not_replaced(tmp_path, monkeypatch):
    out = tmp_path / "a.png"
    out.touch()
    monkeypatch.setattr("os.access", lambda path, mode: path != out)  # root may write to any file
    result = run("generate", "a", "-o", out, "--overwrite")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"bagel-rt: error: --output must be a writable file, got {out}. This one is read-only.\n"


def test_all_images_are_written_before_a_closed_pipe_ends_the_command(model, tmp_path):
    command = [sys.executable, "-m", "bagel_rt.cli", "generate", "a", "b", "-o", str(tmp_path / "x.png"), *SMALL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1 and sorted(os.listdir(tmp_path)) == ["x-1.png", "x-2.png"]


# Formats


@pytest.mark.parametrize("name, image_format", [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")])
def test_suffix_selects_the_format(model, bagel, name, image_format, tmp_path):
    good("generate", "a cät", "-o", tmp_path / name, *SMALL)
    image = Image.open(tmp_path / name)
    assert (image.format, image.size) == (image_format, (48, 32))
    parameters = comment_of(image)
    assert (parameters["prompt"], parameters["seed"], parameters["num_timesteps"]) == ("a cät", 5, 3)
    expected = bagel.generate("a cät", size=(32, 48), num_timesteps=3, seed=5).image
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 20  # noise compresses badly


def test_quality_is_passed_on(model, tmp_path):
    sizes = []
    for quality in (5, QUALITY, 100):
        out = tmp_path / f"{quality}.jpg"
        good("generate", "a cat", "-o", out, *SMALL, "--quality", quality)
        sizes.append(out.stat().st_size)
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]
    good("generate", "a cat", "-o", tmp_path / "default.jpg", *SMALL)
    assert (tmp_path / "default.jpg").stat().st_size == sizes[1]


def test_jpeg_without_room_for_the_parameters_is_still_written(tmp_path, photo, caplog):
    write_image(photo, tmp_path / "a.jpg", {"thought": "x" * 70_000})
    assert Image.open(tmp_path / "a.jpg").size == photo.size
    assert "the image has no parameters: their 70015 bytes exceed" in caplog.text


def test_save_image_writes_to_any_file(photo):
    buffer = io.BytesIO()
    save_image(photo, buffer, "WEBP", {"prompt": "ü\0"})
    assert comment_of(Image.open(buffer)) == {"prompt": "ü\0"}


# Hints


def test_prompt_outside_the_world_of_the_embedded_model_gets_a_hint(tmp_path, monkeypatch):
    monkeypatch.delenv("BAGEL_RT_MODEL", raising=False)
    out = tmp_path / "a.png"
    result = run("generate", "a red boat", "-o", out, "--num-timesteps", 2)
    assert result.exit_code == 0 and result.stdout.startswith(f"{out}: 128x128, seed ")
    assert result.stderr == (
        'bagel-rt: hint: The demo model only knows colored shapes, such as "two small blue stars on black", not '
        '"boat". For other prompts, use --model with a downloaded checkpoint.\n'
    )
    assert 'not "sky"' in run("edit", out, "add a sky", "-o", tmp_path / "b.png", "--num-timesteps", 2).stderr
    good("chat", "What color is the star?", "--image", out, "--max-think-token-n", 2)


def test_other_models_give_no_hint(model):
    good("chat", "a red boat", "--max-think-token-n", 2)
