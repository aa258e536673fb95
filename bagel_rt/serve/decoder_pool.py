"""Decode images of clients in processes that can be stopped.

A small file can keep a decoder busy for minutes and let it allocate gigabytes. In the server's own process that would
hold the GIL and could not be stopped. Here a process that exceeds a limit dies, its request fails, and the next image
starts a new process.
"""

import queue
import subprocess
import sys
import threading
from dataclasses import astuple
from pathlib import Path

from PIL import Image

from bagel_rt.model_thread import Stopping
from bagel_rt.models.bagel.images import ResizeRule
from bagel_rt.serve.decoder import SECONDS, read_message, write_message

_HEADROOM = 64 << 20  # bytes of memory beside the file and the pixels
_BYTES_PER_PIXEL = 24  # decoded, with alpha, composited, resized and on its way out: at most six images of 4 bytes


class DecoderPool:
    """Processes of :mod:`~bagel_rt.serve.decoder`. They start at the first image and end with this process."""

    def __init__(self, size: int, max_bytes: int, max_pixels: int, cpu_seconds: int = 5):
        """
        Args:
            size: number of processes.
            max_bytes: maximum bytes of a file; with ``max_pixels`` it determines the memory of a process.
            max_pixels: maximum width x height.
            cpu_seconds: CPU time per image; 16 megapixels take about one second.
        """
        self._max_pixels, self._cpu_seconds = max_pixels, cpu_seconds
        self._memory = 3 * max_bytes + _BYTES_PER_PIXEL * max_pixels + _HEADROOM
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * size
        self._idle: queue.LifoQueue[int] = queue.LifoQueue()  # indices of processes
        for index in range(size):
            self._idle.put(index)
        self._closed, self._lock = False, threading.Lock()  # of starting and killing

    def decode(self, data: bytes, rule: ResizeRule | None = None) -> Image.Image:
        """Decode a file to RGB. Blocks until a process is free and has decoded it.

        Args:
            data: the file.
            rule: resize by it, if that makes the image smaller and a second resize would change nothing: the model
                sees the same pixels, and the image takes less memory in the queue.

        Raises:
            ValueError: not an image in one of ``FORMATS``, damaged, too large, or too expensive to decode.
            Stopping: the pool is closed.
        """
        index = self._idle.get()
        try:
            return self._exchange(self._process(index), data, rule)
        finally:
            self._idle.put(index)

    def close(self) -> None:
        """Kill the processes. Images that are being decoded, and later ones, fail with Stopping."""
        with self._lock:
            self._closed = True
            for process in filter(None, self._processes):
                process.kill()

    def _process(self, index: int) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._closed:
                raise Stopping
            process = self._processes[index]
            if process is None or process.poll() is not None:
                command = [sys.executable, "-m", "bagel_rt.serve.decoder", str(self._memory), str(self._cpu_seconds)]
                process = self._processes[index] = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    cwd=Path(__file__).parents[2],  # contains the package, wherever it is installed
                    start_new_session=True,  # Ctrl-C in a terminal must not end it while requests finish
                )
            return process

    def _exchange(self, process: "subprocess.Popen[bytes]", data: bytes, rule: ResizeRule | None) -> Image.Image:
        assert process.stdin is not None and process.stdout is not None
        options = {"max_pixels": self._max_pixels, "rule": rule and astuple(rule)}
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            write_message(process.stdin, options, data)
            header, pixels = read_message(process.stdout)
        except (OSError, EOFError):
            process.kill()
            process.wait()
            if self._closed:
                raise Stopping from None
            raise ValueError(
                f"the image of {len(data)} bytes takes too much time or memory to decode. Save it again as PNG or JPEG."
            ) from None
        finally:
            timer.cancel()
        if "error" in header:
            raise ValueError(header["error"])
        return Image.frombytes("RGB", header["size"], pixels)
