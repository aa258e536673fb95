"""Every entrance to the model gets images upright and scaled to 8 bits by the range of their mode."""

import io

import numpy as np
import pytest
from conftest import CHECKPOINT
from PIL import Image

from bagel_rt.models.bagel.contexts import GuidanceContexts
from bagel_rt.serve.decoder import read_image


@pytest.fixture
def seen(monkeypatch):
    """The images that reach the model."""
    images = []
    add_image = GuidanceContexts.add_image

    def record(self, image):
        images.append(image)
        return add_image(self, image)

    monkeypatch.setattr(GuidanceContexts, "add_image", record)
    return images


def photo() -> bytes:
    """A landscape photo whose EXIF orientation says that it is a portrait, with red at the top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.new("RGB", (96, 64), "blue")
    stored.paste("red", (0, 0, 48, 64))
    stored.save(out := io.BytesIO(), "JPEG", exif=exif)
    return out.getvalue()


def assert_upright(image: Image.Image) -> None:
    assert image.size == (64, 96)
    assert image.getpixel((32, 10))[0] > 200 and image.getpixel((32, 86))[2] > 200


def test_python_api_turns_photos_upright(bagel, seen, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo())
    bagel.chat("what is it?", [path, str(path), photo(), Image.open(path)], max_think_token_n=1)
    bagel.interleave([path, "what is it?"], max_rounds=1, max_think_token_n=1)
    assert len(seen) == 5
    for image in seen:
        assert_upright(image)
    assert bagel.edit(photo(), "brighter", num_timesteps=2).image.size == (64, 96)


def test_server_turns_uploads_upright():
    assert_upright(read_image(photo(), 1 << 20))


def test_cli_turns_photos_upright(seen, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from bagel_rt.cli import app

    (tmp_path / "photo.jpg").write_bytes(photo())
    monkeypatch.setenv("BAGEL_RT_MODEL", str(CHECKPOINT))
    arguments = ["edit", tmp_path / "photo.jpg", "brighter", "-o", tmp_path / "out.png", "--num-timesteps", 2]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert_upright(seen[0])


def test_16_bit_array_reaches_the_model_as_8_bits(bagel, seen):
    bagel.chat("what is it?", np.full((64, 64), 32000, np.uint16), max_think_token_n=1)
    assert np.array(seen[0]).tolist() == [[125] * 64] * 64


def test_image_without_a_defined_range_is_rejected_at_the_call(bagel):
    with pytest.raises(ValueError, match="got int32, which does not define the value of white"):
        bagel.stream("what is it?", Image.new("I", (64, 64), 70000))  # before the first next()
