"""Image conversion and resizing against recorded pixels and sizes, and errors for invalid images."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PACK
from hypothesis import given
from hypothesis import strategies as st
from image_files import encoded, pixels, raw_png
from PIL import Image
from safetensors.torch import load_file

from bagel_rt.errors import NonFiniteError
from bagel_rt.models.bagel.images import (
    FORMATS,
    MAX_IMAGE_PIXELS,
    MAX_IMAGE_SIDE,
    ResizeRule,
    image_to_tensor,
    open_image,
    tensor_to_image,
    to_rgb,
)

CASE = PACK / "cases" / "01_image_transforms"
META = json.loads((CASE / "meta.json").read_text())
GOLDEN = load_file(CASE / "tensors.safetensors")
PNG = (PACK / "images" / "a.png").read_bytes()
VAE, VIT = ResizeRule(128, 64, 16), ResizeRule(140, 56, 14)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, without the pixels."""
    return raw_png(width, height, b"\0" * 9)


# Recorded results


def test_converted_images_match_the_recorded_pixels():
    results = {}
    for row in META["pixel_cases"]:
        source = open_image(PACK / row["image"])
        assert (source.mode, list(source.size)) == (row["mode"], row["in_wh"])
        rgb = to_rgb(source)
        for_vae = VAE.resize(rgb)
        for_vit = VIT.resize(for_vae)
        assert list(for_vae.size) == row["after_vae_resize_wh"]
        assert list(for_vit.size) == row["after_vit_resize_of_vae_resized_wh"]
        assert list(image_to_tensor(for_vae).shape) == row["vae_tensor_chw"]
        letter = Path(row["image"]).stem
        results |= {f"{letter}.rgb_u8": pixels(rgb), f"{letter}.vit_tensor": image_to_tensor(for_vit)}
        results |= {f"{letter}.vae_resized_u8": pixels(for_vae), f"{letter}.vit_resized_u8": pixels(for_vit)}
    for name, tensor in GOLDEN.items():
        assert torch.equal(results[name], tensor), name


@pytest.mark.parametrize("img_num, rows", [(1, "rows"), (3, "rows_img_num_3")], ids=["one-image", "three-images"])
@pytest.mark.parametrize("name", META["size_rules"])
def test_output_sizes_match_the_record(name, rows, img_num):
    table = META["size_rules"][name]
    rule = ResizeRule(table["max_size"], table["min_size"], table["stride"], table["max_pixels"])
    for row in table[rows]:
        assert list(rule.output_size(*row["in_wh"], img_num)) == row["out_wh"], row


@pytest.mark.parametrize("case", ["10_t2i_nocfg_shift1", "20_edit_text_channel"])
def test_decoder_output_becomes_the_recorded_png(case):
    folder = PACK / "cases" / case
    decoded = load_file(folder / "tensors.safetensors")["i00.image_float"]
    with Image.open(folder / "output_0.png") as expected:
        assert torch.equal(pixels(tensor_to_image(decoded[0])), pixels(expected))


# Rules


def test_default_max_pixels_is_the_official_one():
    assert ResizeRule(1024, 512, 16).max_pixels == META["size_rules"]["bagel_vae(1024,512,16)"]["max_pixels"]


@pytest.mark.parametrize("side, expected", [(24, 32), (40, 32), (56, 64), (23, 16)])
def test_half_strides_round_to_even(side, expected):
    rule = ResizeRule(64, 16, 16)
    assert rule.output_size(side, side) == (expected, expected)


def test_pixel_budget_scales_both_sides_by_the_ratio_of_areas():
    assert ResizeRule(100, 10, 10, 5000).output_size(100, 100) == (50, 50)


rules = st.builds(
    lambda stride, low, high, pixels: ResizeRule(stride * (low + high), stride * low, stride, pixels),
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 40), st.integers(1, 4_000_000),
)  # fmt: skip


@given(rules, st.integers(1, 1 << 16), st.integers(1, 1 << 16), st.integers(1, 9))
def test_output_size_is_a_multiple_of_the_stride_and_symmetric(rule, width, height, img_num):
    size = rule.output_size(width, height, img_num)
    assert all(side % rule.stride == 0 and rule.stride <= side <= rule.max_size for side in size)
    assert rule.output_size(height, width, img_num) == size[::-1]


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 51)])
    assert pixels(to_rgb(image)).tolist() == [[[10, 20, 30], [255] * 3, [204] * 3]]


def test_transparent_color_of_a_file_becomes_white():
    gray = Image.new("L", (2, 1), 7)
    gray.putpixel((1, 0), 90)
    marked = open_image(encoded(gray, transparency=7))
    assert marked.mode == "L" and pixels(to_rgb(marked)).tolist() == [[[255] * 3, [90] * 3]]


def test_round_trip_through_a_tensor_loses_at_most_one_level():
    # The tensor is exact; truncation on the way back may lower a level by one, as in the official code.
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    tensor = image_to_tensor(ramp)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 16, 16) and tensor.is_contiguous()
    expected = torch.arange(256, dtype=torch.float64) / 255 * 2 - 1
    torch.testing.assert_close(tensor[1].flatten().double(), expected, rtol=0, atol=1e-7)
    lost = pixels(ramp).int() - pixels(tensor_to_image(tensor)).int()
    assert set(lost.unique().tolist()) <= {0, 1}


def test_levels_are_clamped_and_truncated():
    values = torch.tensor([-9.0, -1.0, 0.0, 0.999, 1.0, 1e9]).expand(3, 1, 6)
    assert pixels(tensor_to_image(values))[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


def test_levels_of_a_bfloat16_tensor_are_computed_in_float32():
    tensor = torch.linspace(-1, 1, 768).reshape(3, 16, 16).bfloat16()
    assert torch.equal(pixels(tensor_to_image(tensor)), pixels(tensor_to_image(tensor.float())))


# Opening


@pytest.mark.parametrize("kind", FORMATS)
def test_opens_every_supported_format_from_bytes_and_path(kind, tmp_path):
    image = Image.new("RGB", (5, 3), "red")
    path = tmp_path / "image"
    path.write_bytes(encoded(image, kind))
    for source in (path, str(path), path.read_bytes()):
        opened = open_image(source)
        assert opened.size == (5, 3) and opened.convert("RGB").getpixel((1, 1))[0] > 250


def test_returns_a_pil_image_as_it_is():
    lazy = Image.open(io.BytesIO(PNG))
    assert open_image(lazy) is lazy
    image = Image.new("RGB", (2, 2))
    assert open_image(image) is image


def test_opens_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert to_rgb(open_image(animation)).getpixel((0, 0)) == (255, 0, 0)


INVALID_SOURCES = {
    "empty-bytes": (b"", "the image of 0 bytes: not an image in one of the formats PNG"),
    "text": (b"hello", "the image of 5 bytes: not an image in one of the formats PNG"),
    "format-that-runs-ghostscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "half-a-file": (PNG[: len(PNG) // 2], "truncated or damaged"),
    "only-a-header": (png_claiming(64, 64), "truncated or damaged"),
    "zero-width": (png_claiming(0, 5), "got 0x5|not an image"),
    "too-many-pixels": (png_claiming(8193, 8192), "1 to 67108864 pixels .* got 8193x8192"),
    "decompression-bomb": (png_claiming(60000, 60000), "cannot be opened: .*decompression bomb"),
    "too-wide": (png_claiming(MAX_IMAGE_SIDE + 1, 1), "sides up to 65536, got 65537x1"),
    "empty-image": (Image.new("RGB", (0, 3)), "the RGB image must have .* got 0x3"),
    "none": (None, "must be a PIL image, an array, a path or encoded bytes, got NoneType"),
}


@pytest.mark.parametrize("source, message", INVALID_SOURCES.values(), ids=INVALID_SOURCES)
def test_open_rejects_invalid_sources(source, message):
    with pytest.raises(ValueError, match=message):
        open_image(source)


def test_open_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.png: no such file. Give the path"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(FileNotFoundError, match="^data:image/png.{186}: no such file"):
        open_image("data:image/png" + ";base64,iVBORw0KGgo" * 9999)
    with pytest.raises(ValueError, match=f"{tmp_path} is not a file"):
        open_image(str(tmp_path))
    (tmp_path / "half.jpg").write_bytes(encoded(Image.new("RGB", (99, 99)), "JPEG")[:400])
    with pytest.raises(ValueError, match="half.jpg .* Save or download it again"):
        open_image(tmp_path / "half.jpg")


def test_too_large_an_image_is_rejected_before_decoding(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="must have 1 to"):
        open_image(png_claiming(MAX_IMAGE_PIXELS // 8192 + 1, 8192))


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged files
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_file_gives_an_image_or_a_value_error(kind, damage):
    data = bytearray(encoded(Image.new("P", (7, 5)) if kind == "GIF" else Image.new("RGB", (7, 5), "teal"), kind))
    for index, value in damage:
        data[index % len(data)] = value
    try:
        image = open_image(bytes(data))
    except ValueError as error:
        assert "the image of" in str(error)
    else:
        assert to_rgb(image).mode == "RGB"


INVALID_CALLS = {
    "stride-above-minimum": (lambda: ResizeRule(64, 8, 16), "1 <= stride <= min_size"),
    "minimum-above-maximum": (lambda: ResizeRule(32, 64, 16), "min_size <= max_size"),
    "zero-max-pixels": (lambda: ResizeRule(64, 32, 16, 0), "max_pixels >= 1"),
    "zero-width": (lambda: VAE.output_size(0, 5), "got 0, 5 and 1"),
    "zero-images": (lambda: VAE.output_size(5, 5, 0), "got 5, 5 and 0"),
    "resize-of-a-palette-image": (lambda: VAE.resize(Image.new("P", (9, 9))), "mode must be RGB, got P. Convert it"),
    "gray-image-to-tensor": (lambda: image_to_tensor(Image.new("L", (9, 9))), "mode must be RGB, got L"),
    "batch-as-image": (lambda: tensor_to_image(torch.zeros(1, 3, 4, 4)), r"\[3, H, W\], got \[1, 3, 4, 4\]"),
}


@pytest.mark.parametrize("call, message", INVALID_CALLS.values(), ids=INVALID_CALLS)
def test_rejects_invalid_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rejects_pixels_that_are_not_finite(value):
    with pytest.raises(NonFiniteError, match="an image of the model must be finite, got NaN"):
        tensor_to_image(torch.full((3, 2, 2), value))
