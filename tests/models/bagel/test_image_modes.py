"""Images of every mode become 8-bit RGB by their own range and composited on white, and photos are turned upright."""

import io
import struct

import numpy as np
import pytest
from image_files import encoded, pixels, raw_png
from PIL import Image

from bagel_rt.models.bagel.images import open_image, to_rgb

# Transparency

# An opaque and a half transparent pixel; the second composites to 127 of black on white.
ALPHA_MODES = {
    "LA": ([(0, 255), (0, 128)], "LA"),
    "RGBA": ([(0, 0, 0, 255), (0, 0, 0, 128)], "RGBA"),
    "PA": ([(0, 0, 0, 255), (0, 0, 0, 128)], "RGBA"),
    "RGBa": ([(0, 0, 0, 255), (0, 0, 0, 128)], "RGBA"),
    "La": ([(0, 255), (0, 128)], "LA"),
}


def alpha_image(mode: str) -> Image.Image:
    data, created_as = ALPHA_MODES[mode]
    image = Image.new(created_as, (2, 1))
    image.putdata(data)
    if mode == "PA":
        image = Image.merge("PA", [Image.new("L", (2, 1)), image.getchannel("A")])
        image.putpalette([0, 0, 0] * 256)
    return image if image.mode == mode else image.convert(mode)


@pytest.mark.parametrize("mode", ALPHA_MODES)
def test_every_alpha_mode_is_composited_on_white_in_memory(mode):
    image = alpha_image(mode)
    assert image.mode == mode and pixels(to_rgb(open_image(image)))[0, :, 0].tolist() == [0, 127]


@pytest.mark.parametrize("mode, kind", [("LA", "PNG"), ("LA", "TIFF"), ("PA", "TIFF"), ("RGBA", "WEBP")])
def test_every_alpha_mode_is_composited_on_white_from_a_file(mode, kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    opened = open_image(encoded(alpha_image(mode), kind, **options))
    assert opened.mode == mode and pixels(to_rgb(opened))[0, :, 0].tolist() == [0, 127]


def test_palette_with_alpha_is_composited_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 128], "RGBA")
    image.putdata([0, 1])
    assert pixels(to_rgb(image))[0, :, 0].tolist() == [0, 127]


def test_transparent_color_of_a_16_bit_file_becomes_white():
    rgb = raw_png(2, 1, struct.pack(">x6H", 32000, 0, 0, 0, 0, 0), 16, transparent=struct.pack(">3H", 32000, 0, 0))
    assert pixels(to_rgb(open_image(rgb))).tolist() == [[[255] * 3, [0] * 3]]
    gray = raw_png(2, 1, struct.pack(">x2H", 32000, 31999), 16, color=0, transparent=struct.pack(">H", 32000))
    assert pixels(to_rgb(open_image(gray))).tolist() == [[[255] * 3, [125] * 3]]


@pytest.mark.parametrize("depth, levels, expected", [(2, 0b01_10_0000, 170), (4, 0x5_6, 102)])
def test_transparent_color_of_a_gray_file_of_few_bits_becomes_white(depth, levels, expected):
    first = levels >> 8 - depth
    data = raw_png(2, 1, bytes([0, levels]), depth, color=0, transparent=struct.pack(">H", first))
    assert pixels(to_rgb(open_image(data)))[0, :, 0].tolist() == [255, expected]


def test_transparent_color_of_rgb_and_palette_files_becomes_white():
    rgb = raw_png(2, 1, b"\0\1\2\3\4\5\6", transparent=struct.pack(">3H", 1, 2, 3))
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putdata([0, 1])
    for data in (rgb, encoded(palette, transparency=0), encoded(palette, "GIF", transparency=0)):
        assert pixels(to_rgb(open_image(data))).tolist() == [[[255] * 3, [4, 5, 6]]]


# Range

UINT16 = np.array([[0, 32000, 65535]], np.uint16)


def uint16_image(mode: str) -> Image.Image:
    return Image.frombytes(mode, (3, 1), UINT16.astype(">u2" if mode == "I;16B" else "<u2").tobytes())


UINT16_SOURCES = {
    "png": encoded(uint16_image("I;16")),
    "tiff": encoded(uint16_image("I;16"), "TIFF"),
    "big-endian-tiff": encoded(uint16_image("I;16B"), "TIFF"),
    "image-in-memory": uint16_image("I;16"),
    "big-endian-image-in-memory": uint16_image("I;16B"),
    "array": UINT16,
    "big-endian-array": UINT16.astype(">u2"),
    "array-with-a-channel": UINT16[..., None],
    "color-array": UINT16[..., None].repeat(3, axis=2),
}


@pytest.mark.parametrize("source", UINT16_SOURCES.values(), ids=UINT16_SOURCES)
def test_16_bit_image_is_scaled_to_8_bits(source):
    assert pixels(to_rgb(open_image(source))).tolist() == [[[0] * 3, [125] * 3, [255] * 3]]


def test_every_16_bit_value_is_rounded_to_the_nearest_level():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(np.array(to_rgb(open_image(values)))[..., 0], np.rint(values / 257))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_image_from_0_to_1_is_scaled_to_8_bits(dtype):
    levels = np.array([[0, 0.5, 1]], dtype)
    image = Image.fromarray(levels.astype(np.float32))
    for source in (levels, image, encoded(image, "TIFF")):
        assert pixels(to_rgb(open_image(source)))[0, :, 0].tolist() == [0, 128, 255]


def test_8_bit_arrays_of_1_to_4_channels_are_images():
    color = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    color[..., 3] = 255
    for array in (color, color[..., :3], color[:, ::-1, :3]):
        assert to_rgb(open_image(array)).size == (3, 2)
        assert pixels(to_rgb(open_image(array))).tolist() == array[..., :3].tolist()
    gray_alpha = np.array([[[0, 255], [0, 128]]], np.uint8)
    assert pixels(to_rgb(open_image(gray_alpha)))[0, :, 0].tolist() == [0, 127]


AMBIGUOUS = {
    "int32-image": (Image.new("I", (2, 2), 32000), "got int32, which does not define the value of white. Convert it"),
    "int32-tiff": (encoded(Image.new("I", (2, 2), 32000), "TIFF"), "got int32"),
    "int64-array": (np.zeros((2, 2), np.int64), "must be uint8, uint16 or floats from 0 to 1, got int64"),
    "float-image-above-1": (Image.new("F", (2, 2), 255), r"from 0 \(black\) to 1 \(white\), got 255 to 255. Scale"),
    "negative-float-tiff": (encoded(Image.new("F", (2, 2), -0.5), "TIFF"), "got -0.5 to -0.5"),
    "nan-array": (np.full((2, 2), np.nan), "got nan to nan"),
    "channels-first-array": (
        np.zeros((3, 8, 8), np.uint8),
        r"got \[3, 8, 8\]. Move the channels to the last dimension",
    ),
    "batch-of-arrays": (np.zeros((1, 8, 8, 3), np.uint8), r"must be \[H, W\] or \[H, W, C\] with 1 to 4 channels"),
    "empty-array": (np.zeros((0, 8), np.uint8), "the image array must have 1 to .* got 8x0"),
}


@pytest.mark.parametrize("source, message", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_rejects_pixels_without_a_defined_range(source, message):
    with pytest.raises(ValueError, match=message):
        open_image(source)


def test_image_without_a_defined_range_is_named(tmp_path):
    Image.new("I", (2, 2), 32000).save(tmp_path / "scan.tif")
    with pytest.raises(ValueError, match="scan.tif: the pixels of an image must be uint8, uint16 or floats"):
        open_image(tmp_path / "scan.tif")
    with pytest.raises(ValueError, match="got int32"):
        to_rgb(Image.new("I", (2, 2)))


# Orientation

STORED = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
UPRIGHT = {  # EXIF orientation -> the stored pixels as they are meant to be seen, by the definition in EXIF 2.3
    1: STORED, 2: STORED[:, ::-1], 3: STORED[::-1, ::-1], 4: STORED[::-1], 5: STORED.transpose(1, 0, 2),
    6: np.rot90(STORED, -1), 7: np.rot90(STORED, 2).transpose(1, 0, 2), 8: np.rot90(STORED),
}  # fmt: skip


def oriented(orientation: int) -> tuple[Image.Image, Image.Exif]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Image.fromarray(STORED), exif


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(kind, orientation):
    image, exif = oriented(orientation)
    data = encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = open_image(data)
    in_memory = Image.open(io.BytesIO(data))
    for opened in (upright, open_image(upright), open_image(to_rgb(upright)), open_image(in_memory)):
        assert np.array_equal(np.array(opened), UPRIGHT[orientation])


def test_exif_orientation_of_a_photo_is_applied():
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (0, 0, 32, 32))  # the left half becomes the upper one
    _, exif = oriented(6)
    upright = to_rgb(open_image(encoded(image, "JPEG", exif=exif)))
    assert upright.size == (32, 64)
    assert upright.getpixel((16, 8))[2] > 200 and upright.getpixel((16, 56))[0] > 200


def test_exif_orientation_applies_to_16_bit_and_palette_images():
    _, exif = oriented(6)
    for image in (uint16_image("I;16"), uint16_image("I;16").convert("L").convert("P")):
        assert to_rgb(open_image(encoded(image, exif=exif))).size == (1, 3)


def test_damaged_exif_is_ignored():
    assert open_image(encoded(Image.new("RGB", (8, 4)), exif=b"Exif\0\0not a TIFF header")).size == (8, 4)
    image, exif = oriented(9)  # undefined
    assert np.array_equal(np.array(open_image(encoded(image, exif=exif))), STORED)
