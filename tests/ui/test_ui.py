"""The parts of the page: controls, gallery, thoughts, examples; and errors of users."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from conftest import CHECKPOINT
from PIL import Image

gr = pytest.importorskip("gradio", reason="the extra [ui] is not installed")

from typer.testing import CliRunner  # noqa: E402

from bagel_rt.cli import app  # noqa: E402
from bagel_rt.models.bagel.config import BAGEL_7B_MOT  # noqa: E402
from bagel_rt.models.bagel.settings import MAX_INPUTS, TASKS, resolve_settings  # noqa: E402
from bagel_rt.request import ImageResult  # noqa: E402
from bagel_rt.ui import gallery as gallery_module  # noqa: E402
from bagel_rt.ui.chat_tab import _problem  # noqa: E402
from bagel_rt.ui.controls import CONTROL_TEXTS, Controls, preset_sizes, resolve_seed  # noqa: E402
from bagel_rt.ui.examples import EDITED, FOLDER, GENERATED, Examples  # noqa: E402
from bagel_rt.ui.gallery import Gallery  # noqa: E402
from bagel_rt.ui.jobs import View  # noqa: E402
from bagel_rt.ui.theme import status  # noqa: E402
from bagel_rt.ui.thoughts import split_thought  # noqa: E402
from bagel_rt.ui.uploads import open_upload  # noqa: E402


@pytest.mark.parametrize("task", TASKS)
def test_every_hyperparameter_has_a_control_with_its_default_and_an_explanation(task):
    parts = [part for part in TASKS[task] if part is not None]
    with gr.Blocks():
        controls = Controls(TASKS[task], prefix="x")
        controls.build("max_think_token_n")
        controls.build_rest()
    names = {field.name for part in parts for field in fields(part)}
    assert controls.components.keys() == (names - {"cfg_interval"}) | (
        {"from", "to"} if "cfg_interval" in names else set()
    )
    for name in names:
        title, info = CONTROL_TEXTS[name]
        control = controls.components["from" if name == "cfg_interval" else name]
        assert info == control.info and title in control.label and name in control.label
    values = {control: control.preprocess(control.value) for control in controls.components.values()}
    assert resolve_settings(task, controls.read(values)) == TASKS[task]


def test_aspect_ratios_equal_the_official_app():
    official = {"1:1": (1024, 1024), "4:3": (768, 1024), "3:4": (1024, 768), "16:9": (576, 1024), "9:16": (1024, 576)}
    assert preset_sizes(BAGEL_7B_MOT) == official


def test_missing_or_negative_seed_is_random():
    assert resolve_seed(7) == 7 and resolve_seed(0) == 0
    assert len({resolve_seed(seed) for seed in (-1, None, -1.0)}) == 3


@pytest.mark.parametrize(
    "text, expected",
    [
        ("blue", ("", "blue")),
        ("<think>two sq", ("two sq", "")),
        ("<think>\nsquares\n</think>\nblue", ("squares", "blue")),
        ("<answer>blue</answer>", ("", "blue")),
    ],
)
def test_thought_and_answer_are_split(text, expected):
    assert split_thought(text) == expected


def made(seed, thought=None):
    return ImageResult(Image.new("RGB", (8, 8)), seed, {"num_timesteps": 5}, torch.zeros(1), thought)


def gallery_of(folder, *pages, **source):
    gallery = Gallery(folder, source)
    for page in pages:
        gallery.enter(page)
    return gallery


def test_image_files_hold_their_parameters(tmp_path):
    path = gallery_of(tmp_path, "page", model="tiny").add("page", made(7, "a plan"), "a cat", prompt="a cat")
    parameters = json.loads(Image.open(path).text["parameters"])
    assert parameters == {"model": "tiny", "seed": 7, "prompt": "a cat", "num_timesteps": 5, "thought": "a plan"}


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_files_of_a_page_are_bounded_and_deleted_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery_module, "KEPT", 3)
    gallery = gallery_of(tmp_path, "page", "other")
    for seed in range(5):
        gallery.add("page", made(seed), "a")
    gallery.add("other", made(9), "b")
    assert [caption for _, caption in gallery.images("page")] == ["a · seed 4", "a · seed 3", "a · seed 2"]
    assert files(tmp_path) == [f"bagel-seed-{seed}.png" for seed in (2, 3, 4, 9)]
    gallery.preview("page", "draw", made(0).image)
    gallery.leave("page")
    assert files(tmp_path) == ["bagel-seed-9.png"] and len(list(tmp_path.iterdir())) == 1


def test_previews_have_unique_paths_and_few_are_kept(tmp_path):
    gallery = gallery_of(tmp_path, "../../page")
    paths = {gallery.preview("../../page", "draw", Image.new("RGB", (2000, 1000))) for _ in range(9)}
    assert len(paths) == 9 and all(Path(path).is_relative_to(tmp_path) for path in paths)
    kept = list(tmp_path.rglob("*.jpg"))
    assert len(kept) == 3 and max(Image.open(kept[0]).size) < 1000
    again = Image.new("RGB", (8, 8))
    assert gallery.preview("../../page", "draw", again) == gallery.preview("../../page", "draw", again)


def test_page_may_leave_between_two_previews(tmp_path):
    gallery, image = gallery_of(tmp_path, "page"), Image.new("RGB", (8, 8))
    assert gallery.preview("page", "draw", image)
    gallery.leave("page")
    gallery.leave("page")
    assert gallery.preview("page", "draw", image) is gallery.preview("page", "draw", Image.new("RGB", (8, 8))) is None
    assert gallery.add("page", made(7), "a") is None and gallery.images("page") == []
    assert not list(tmp_path.iterdir())
    gallery.enter("page")  # only the connection was lost
    assert gallery.add("page", made(8), "a") and len(gallery.images("page")) == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda gallery, image: gallery.preview("page", "draw", image.image),
        lambda gallery, image: gallery.add("page", image, "a"),
    ],
)
def test_page_may_leave_while_a_file_is_written(tmp_path, monkeypatch, write):
    gallery, save = gallery_of(tmp_path, "page"), Image.Image.save
    gallery.preview("page", "draw", made(1).image)

    def leaving(self, *args, **kwargs):
        gallery.leave("page")
        save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", leaving)
    assert write(gallery, made(2)) is None
    assert not list(tmp_path.iterdir())


def test_uploads_are_checked_before_decoding(tmp_path):
    Image.new("1", (5000, 5000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="^large.png must have .* got 5000x5000"):
        open_upload(str(tmp_path / "large.png"))
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(ValueError, match="^a.png: not an image"):
        open_upload(str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="^gone.png has expired"):
        open_upload(tmp_path / "gone.png")


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: stored a quarter turn to the left
    stored = Image.new("RGB", (48, 16), "blue")
    stored.paste("red", (0, 0, 16, 16))  # stored on the left, shown at the top
    stored.save(tmp_path / "photo.png", exif=exif)
    seen = open_upload(tmp_path / "photo.png")
    assert seen.size == (16, 48) and seen.getpixel((8, 4)) == (255, 0, 0) and seen.getpixel((8, 40)) == (0, 0, 255)


def test_damaged_exif_is_ignored(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "photo.png", exif=b"Exif\0\0no such thing")
    assert open_upload(tmp_path / "photo.png").size == (8, 4)


def test_status_escapes_markup():
    shown = status(View("failed", error="<script>x</script>"))
    assert "<script>" not in shown and "&lt;script&gt;" in shown


def test_examples_match_their_stored_parameters(tmp_path):
    made_here = {path.stem for path in FOLDER.iterdir()}
    assert made_here == {*GENERATED, *EDITED}
    for name, (*_, text, seed) in (*GENERATED.items(), *EDITED.items()):
        with Image.open(FOLDER / f"{name}.png") as image:
            parameters = json.loads(image.text["parameters"])
            assert image.size == (128, 128) and parameters["prompt"] == text and parameters["seed"] == seed
    shown = Examples(tmp_path, small=True)
    assert all(Path(row[-1]).is_relative_to(tmp_path) for row in (*shown.draw, *shown.edit))
    assert {len(row) for row in Examples(tmp_path, small=False).edit} == {2}


def test_conversation_length_is_limited():
    assert "nothing to send" in _problem([("user", [])])
    turns = [("user", ["a"]), ("assistant", ["b"])] * (MAX_INPUTS // 2)
    assert _problem(turns) is None
    assert f"at most {MAX_INPUTS} texts and images, got {MAX_INPUTS + 1}" in _problem([*turns, ("user", ["c"])])


def test_missing_gradio_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bagel_rt.ui.app", None)
    result = CliRunner().invoke(app, ["ui"])
    assert result.exit_code == 2 and "pip install 'bagel_rt[ui]'" in result.output


def test_taken_port_is_found_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("bagel_rt.pipeline.Bagel.from_pretrained", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(app, ["ui", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2 and "cannot bind" in result.output


def test_command_serves_until_interrupted_and_leaves_no_files(tmp_path):
    command = [sys.executable, "-m", "bagel_rt.cli", "ui", "--port", "0", "--device", "cpu", "--model", str(CHECKPOINT)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            url = re.search(r"http://\S+", process.stdout.readline()).group().rstrip(";")
            assert url.startswith("http://127.0.0.1:") and not url.endswith((":0", ":0/"))
            with urlopen(url) as answer:
                assert "bagel_rt" in answer.read().decode()
            assert files(tmp_path)
            process.send_signal(signal.SIGINT)
            assert process.wait(300) == 0
        finally:
            process.kill()
    assert not files(tmp_path)
