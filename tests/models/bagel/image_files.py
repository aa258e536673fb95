"""Encode images for tests."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def raw_png(width: int, height: int, rows: bytes, depth: int = 8, color: int = 2, transparent: bytes = b"") -> bytes:
    """A PNG with this header (color 2 is RGB, 0 gray) and these rows, each after its filter byte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body += chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
