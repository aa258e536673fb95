"""The process that decodes images of clients, with limits of CPU time, memory and duration that the kernel enforces.

It imports neither torch nor the server, so that it starts in 0.15 s. One image at a time goes through the process's
pipes, as two length-prefixed blocks each way::

    to the process:    {"max_pixels": ..., "rule": [...] or null}, bytes of the file
    from the process:  {"size": [width, height]}, RGB pixels     or   {"error": ...}, nothing
"""

import json
import signal
import struct
import sys
from pathlib import Path
from typing import IO, Any

from PIL import Image

from bagel_rt.models.bagel.images import ResizeRule, open_image, to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""Formats that clients may send; of an animation, the first frame is used."""

SECONDS = 20  # per image, with the time it waits for a core
_SCANS = 100  # of a JPEG image; progressive ones have about ten
_LENGTHS = struct.Struct("!QQ")


def read_image(data: bytes, max_pixels: int, rule: ResizeRule | None = None) -> Image.Image:
    """Decode a file to RGB, and resize it as :meth:`~bagel_rt.serve.decoder_pool.DecoderPool.decode` says.

    Raises:
        ValueError: not an image in one of ``FORMATS``, damaged, or too large.
    """
    # A scan costs a few bytes to request and as long as a whole image to decode. In other data, such as the video that
    # phones append, its marker occurs by chance once in 65536 bytes.
    max_scans = _SCANS + len(data) // 32768
    if data.count(b"\xff\xda") > max_scans:
        raise ValueError(f"a JPEG image of {len(data)} bytes must have at most {max_scans} scans. Save it again.")
    image = open_image(data, max_pixels, FORMATS)
    try:
        image = to_rgb(image)
    except Exception as error:  # Pillow's converters raise all kinds of exceptions on a damaged palette
        raise ValueError(f"the image of {len(data)} bytes cannot be converted to RGB: {error}") from None
    if rule is None:
        return image
    size = rule.output_size(*image.size)
    smaller = size[0] * size[1] < image.width * image.height
    return rule.resize(image) if smaller and rule.output_size(*size) == size else image


def write_message(stream: IO[bytes], header: dict[str, Any], content: bytes) -> None:
    """Write a JSON object and bytes."""
    encoded = json.dumps(header).encode()
    stream.write(_LENGTHS.pack(len(encoded), len(content)) + encoded)
    stream.write(content)
    stream.flush()


def read_message(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Read what :func:`write_message` wrote. EOFError if the other side has ended."""
    header, content = _LENGTHS.unpack(_read_exactly(stream, _LENGTHS.size))
    return json.loads(_read_exactly(stream, header)), _read_exactly(stream, content)


def _read_exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _limit_memory(extra: int) -> None:
    """Let this process allocate ``extra`` bytes more than it has now, where the platform can limit that."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):  # Windows, macOS: the parent's timer is the only limit
        return
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _limit_time(cpu_seconds: int) -> None:
    """End this process if the next image takes longer than the limits, even if its parent has died."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = usage.ru_utime + usage.ru_stime
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 1 + cpu_seconds, hard))
    signal.alarm(SECONDS)


def main() -> None:
    """Decode images from standard input until it ends. Arguments: bytes of memory, seconds of CPU time per image."""
    Image.preinit()
    Image.init()  # import the decoders before memory is limited
    _limit_memory(int(sys.argv[1]))
    source, out = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing else may print into the pipe
    while True:
        try:
            options, data = read_message(source)
        except EOFError:
            return
        _limit_time(int(sys.argv[2]))
        rule = options["rule"] and ResizeRule(*options["rule"])
        header: dict[str, object]
        try:
            image = read_image(data, options["max_pixels"], rule)
            header, pixels = {"size": image.size}, image.tobytes()
        except MemoryError:
            header, pixels = {"error": f"the image of {len(data)} bytes takes too much memory to decode"}, b""
        except ValueError as error:
            header, pixels = {"error": str(error)}, b""
        write_message(out, header, pixels)


if __name__ == "__main__":
    main()
