"""Images of clients are decoded in processes with limits."""

import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from serving import png

from bagel_rt.model_thread import Stopping
from bagel_rt.models.bagel.images import ResizeRule
from bagel_rt.serve.decoder_pool import DecoderPool

LARGE = 30 << 20


@pytest.fixture(scope="module")
def pool():
    pool = DecoderPool(1, 32 << 20, 1 << 22, cpu_seconds=1)
    yield pool
    pool.close()


def encoded(format: str, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(noise).save(out := io.BytesIO(), format, **options)
    return out.getvalue()


def progressive(scans: int) -> bytes:
    """A JPEG file with its last scan repeated so many times."""
    data = encoded("JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


def chunks(kind: bytes) -> bytes:
    """A PNG file with empty chunks."""
    data, chunk = encoded("PNG"), struct.pack(">I4sI", 0, kind, zlib.crc32(kind))
    return data[:33] + chunk * (LARGE // len(chunk)) + data[33:]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pixels_equal_those_decoded_in_this_process(pool, format):
    data = encoded(format)
    assert pool.decode(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("format", ["TIFF", "BMP", "ICO", "PPM"])
def test_other_formats_are_refused(pool, format):
    with pytest.raises(ValueError, match="PNG, JPEG, WEBP, GIF"):
        pool.decode(encoded(format))


def test_large_images_are_resized_for_the_model(pool):
    rule = ResizeRule(max_size=64, min_size=32, stride=16)
    data = png(400, 200)
    assert pool.decode(data, rule).tobytes() == rule.resize(Image.open(io.BytesIO(data))).tobytes()
    assert pool.decode(png(48, 32), rule).size == (48, 32)


def test_pixels_are_bounded_before_decoding(pool):
    with pytest.raises(ValueError, match="4194304 pixels.*got 2049x2048"):
        pool.decode(png(2049, 2048))


def test_jpeg_files_of_many_scans_are_not_decoded(pool):
    assert pool.decode(progressive(0)).size == (48, 32)
    with pytest.raises(ValueError, match="at most 1.. scans"):
        pool.decode(progressive(200))
    assert pool.decode(png(1200, 1200)).size == (1200, 1200)  # noise that contains scan markers by chance


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: chunks(b"prIv"), id="png chunks"),
        pytest.param(lambda: encoded("JPEG")[:2] + b"\xff" * LARGE + encoded("JPEG")[2:], id="jpeg fill bytes"),
        pytest.param(lambda: encoded("JPEG")[:2] + b"\xff\xfe\0\2" * (LARGE // 4) + encoded("JPEG")[2:], id="comments"),
    ],
)
def test_files_that_take_long_are_stopped(pool, data):
    file = data()
    begun = time.monotonic()
    with pytest.raises(ValueError, match="too much time or memory"):
        pool.decode(file)
    assert time.monotonic() - begun < 20
    assert pool.decode(png()).size == (48, 32)  # in a new process


def test_memory_is_bounded():
    pool = DecoderPool(1, 1 << 20, 1 << 24)
    pool._memory = 8 << 20
    try:
        flat = io.BytesIO()
        Image.new("RGB", (4096, 4096)).save(flat, "PNG")
        with pytest.raises(ValueError, match="memory"):
            pool.decode(flat.getvalue())
        assert pool.decode(png()).size == (48, 32)
    finally:
        pool.close()


def test_close_ends_a_running_decode():
    pool, outcome = DecoderPool(1, 32 << 20, 1 << 22), []

    def run():
        try:
            pool.decode(chunks(b"prIv"))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while pool._processes[0] is None:
        time.sleep(0.01)
    time.sleep(0.3)
    pool.close()
    thread.join(10)
    assert isinstance(outcome[0], Stopping)
    with pytest.raises(Stopping):
        pool.decode(png())
