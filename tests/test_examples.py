"""The example scripts run on the embedded model and write the files that their docstrings name."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
WRITTEN = {
    "text_to_image": ["star.png"],
    "edit": ["after.png", "before.png"],
    "ask": ["answer.txt", "shapes.png"],
    "interleave": ["star.png", "story.md"],
    "batch": [f"batch-{number}.png" for number in (1, 2, 3, 4)],
    "openai_client": ["server.png"],
}


def run(name: str, *arguments: str) -> None:
    """Run an example as the command line does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def check(folder: Path, names: list[str]) -> None:
    """The files are there; images have the size of the embedded model and more than one color."""
    assert sorted(path.name for path in folder.iterdir() if path.name in names) == sorted(names)
    for path in (folder / name for name in names):
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.size == (128, 128) and image.convert("RGB").getcolors(1) is None
        else:
            assert path.read_text(encoding="utf-8").strip()


def test_every_example_is_tested():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(WRITTEN)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_example_writes_its_files(name, tmp_path, monkeypatch):
    if name == "openai_client":
        for module, extra in (("fastapi", "serve"), ("openai", "test")):
            pytest.importorskip(module, reason=f"the extra [{extra}] is not installed")
    monkeypatch.chdir(tmp_path)
    run(name)
    check(tmp_path, WRITTEN[name])


def test_writes_to_the_given_folder(tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(tmp_path)
    run("text_to_image", str(there))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    check(there, WRITTEN["text_to_image"])


@pytest.mark.slow
def test_batch_example_reports_cancellation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("batch")
    assert "image 49/49" in (said := capsys.readouterr().out) and "cancelled" in said
