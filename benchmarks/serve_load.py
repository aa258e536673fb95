"""Load test of ``bagel-rt serve``: many concurrent clients, correct responses, bounded memory, clean shutdown.

    python -m benchmarks.serve_load [--requests 500] [--clients 32] [--seed 0] [--model FOLDER] [--json FILE]

Starts the server in a subprocess on the CPU, with a queue shorter than the number of clients. They generate,
edit, chat, stream and interleave; a tenth disconnect midway, a twentieth send invalid requests. A client that gets 429
retries after the time in the response. At the end the server is stopped while requests are running.

- Every response equals the library's: texts exactly, images (run in batches) to one level.
- Every invalid request is refused with a 4xx and a message.
- The server's resident memory grows by less than ``SLACK`` over the second half, in which a fourth of the requests have
  an image of 3.7 MB. A server that kept files or pixels would grow by far more.
- Every request that is running at shutdown gets its response, and the server's log has no error.

Exit codes: 0 passed; 1 failed, the last lines list the failures.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image

from bagel_rt import Bagel, ImageResult
from bagel_rt.checkpoint import DEFAULT_MODEL
from benchmarks.measure import machine

SLACK = 64 << 20
"""Maximum growth of the server's resident memory over the second half, in bytes. Allocators keep some freed memory."""
TIMEOUT = 600.0
"""Timeout of any single operation, in seconds."""
RUNNING_AT_SHUTDOWN = 8
"""Number of running requests when the server is stopped."""
DRAW, EDIT, CHAT = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"


@dataclass(frozen=True)
class KnownRequest:
    """A request whose response is known.

    Attributes:
        kind: row of the table.
        route: its URL path.
        arguments: keyword arguments of ``httpx.AsyncClient.post``.
        expected: the concatenated text, then the images in order.
    """

    kind: str
    route: str
    arguments: dict
    expected: list[str | np.ndarray]


@dataclass
class Report:
    """Results of a load test.

    Attributes:
        answered: number of correct responses of each kind.
        seconds: latencies of each kind, retries included.
        busy: number of 429 responses.
        left: number of clients that disconnected before their response.
        refused: number of invalid requests that were refused.
        at_the_end: number of requests that were running at shutdown and got their response.
        memory: the server's resident bytes after the first half, and after the second.
        total: seconds without the shutdown.
        wrong: failures.
    """

    answered: Counter = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    busy: int = 0
    left: int = 0
    refused: int = 0
    at_the_end: int = 0
    memory: tuple[int, int] = (0, 0)
    total: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def table(self) -> str:
        """One line for each kind, and the totals."""
        lines = [f"{'':12}{'correct':>8}{'median s':>10}{'p95 s':>10}"]
        for kind, seconds in sorted(self.seconds.items()):
            p95 = sorted(seconds)[int(0.95 * (len(seconds) - 1))]
            lines.append(f"{kind:12}{self.answered[kind]:>8}{statistics.median(seconds):>10.3f}{p95:>10.3f}")
        count = sum(self.answered.values())
        lines += [
            (
                f"{count} responses in {self.total:.1f} s, {count / max(self.total, 1e-9):.1f} per second; "
                f"{self.left} clients disconnected, {self.refused} invalid requests refused, {self.busy} x 429"
            ),
            f"{self.memory[0]:,} bytes resident after the first half, {self.memory[1]:,} after the second",
            f"{self.at_the_end} of {RUNNING_AT_SHUTDOWN} requests running at shutdown got their response",
        ]
        return "\n".join([*lines, *(f"FAILED: {line}" for line in self.wrong), "failed" if self.wrong else "passed"])


def noise_png(width: int, height: int) -> bytes:
    """A PNG file of noise."""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def known_requests(bagel: Bagel) -> list[KnownRequest]:
    """Requests of every kind, with the library's results."""
    requests = []
    for number, (width, height, steps) in enumerate([(48, 32, 4), (48, 32, 4), (48, 32, 4), (64, 64, 5), (64, 64, 3)]):
        options = {"num_timesteps": steps, "seed": number}
        image = bagel.generate(f"boat {number}", size=(height, width), **options).image
        body = {"prompt": f"boat {number}", "size": f"{width}x{height}", **options}
        requests.append(KnownRequest("image", DRAW, {"json": body}, [np.asarray(image)]))
    images = [bagel.generate("two", size=(32, 48), num_timesteps=4, seed=seed).image for seed in (7, 8)]
    body = {"prompt": "two", "size": "48x32", "num_timesteps": 4, "seed": 7, "n": 2}
    requests.append(KnownRequest("image", DRAW, {"json": body}, [np.asarray(image) for image in images]))

    for width, height in ((1280, 960), (960, 1280)):
        image = bagel.edit(noise_png(width, height), "brighter", num_timesteps=3, seed=1).image
        fields = {"prompt": "brighter", "num_timesteps": "3", "seed": "1"}
        arguments = {"data": fields, "files": {"image": ("a.png", noise_png(width, height), "image/png")}}
        requests.append(KnownRequest("edit", EDIT, arguments, [np.asarray(image)]))

    url = "data:image/png;base64," + base64.b64encode(noise_png(1280, 960)).decode()
    content_parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
    for content, options, expected in (
        ("hello", {}, bagel.chat("hello", max_think_token_n=13)),
        (content_parts, {}, bagel.chat("what is it?", [noise_png(1280, 960)], max_think_token_n=13)),
        (
            "once upon",
            {"temperature": 1.5, "seed": 3},
            bagel.chat("once upon", seed=3, do_sample=True, text_temperature=1.5, max_think_token_n=13),
        ),
    ):
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, **options}
        requests.append(KnownRequest("chat", CHAT, {"json": body}, [expected]))
        requests.append(KnownRequest("stream", CHAT, {"json": body | {"stream": True}}, [expected]))

    options = {"num_timesteps": 3, "seed": 5, "max_rounds": 2}
    parts = bagel.interleave(["a story"], size=(32, 32), think=False, max_think_token_n=9, **options)
    expected = ["".join(part for part in parts if isinstance(part, str))]
    expected += [np.asarray(part.image) for part in parts if isinstance(part, ImageResult)]
    body = {"messages": [{"role": "user", "content": "a story"}], "modalities": ["text", "image"], "max_tokens": 8}
    body |= {"size": "32x32", "think": False, **options}
    return [*requests, KnownRequest("interleaved", CHAT, {"json": body}, expected)]


INVALID = (
    (DRAW, {"content": b"{"}),
    (DRAW, {"content": b"[" * 60_000}),
    (DRAW, {"json": {}}),
    (DRAW, {"json": {"prompt": "x", "size": "7x7"}}),
    (DRAW, {"json": {"prompt": "x", "num_timesteps": 10**9}}),
    (DRAW, {"json": {"prompt": "x", "stlye": "vivid"}}),
    (DRAW, {"json": {"prompt": "word " * 50_000}}),
    (EDIT, {"data": {"prompt": "x"}}),
    (EDIT, {"data": {"prompt": "x"}, "files": {"image": ("a.png", noise_png(64, 64)[:300], "image/png")}}),
    (CHAT, {"json": {"messages": []}}),
    (CHAT, {"json": {"messages": [{"role": "user", "content": "x"}], "model": "gpt-4"}}),
    (CHAT, {"json": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}}),
)
"""(route, keyword arguments of httpx) of requests that must be refused with a 4xx."""


def _decode_image(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def read(request: KnownRequest, response: httpx.Response) -> list[str | np.ndarray]:
    """The content of a response, in the form of ``KnownRequest.expected``."""
    if request.route != CHAT:
        return [_decode_image(item["b64_json"]) for item in response.json()["data"]]
    if request.kind == "stream":
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        if lines[-1] != "[DONE]":
            return [f"incomplete stream, last event: {lines[-1][:200]}"]
        return ["".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1])]
    message = response.json()["choices"][0]["message"]
    images = [item["image_url"]["url"].partition(",")[2] for item in message.get("images", [])]
    return [message["content"], *map(_decode_image, images)]


def same(actual: list[str | np.ndarray], expected: list[str | np.ndarray]) -> bool:
    """Whether texts are equal and images differ by at most one level per channel."""

    def match(a, b) -> bool:
        if isinstance(a, str) or isinstance(b, str):
            return isinstance(a, str) and isinstance(b, str) and a == b
        return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1

    return len(actual) == len(expected) and all(map(match, actual, expected))


class Load:
    """Clients of one server.

    Attributes:
        report: results so far.
    """

    def __init__(self, address: str, process: int, requests: list[KnownRequest], seed: int):
        """
        Args:
            address: base URL of the server.
            process: process id of the server.
            requests: requests that clients choose from.
            seed: seed of the choices.
        """
        self._address, self._process, self._requests = address, process, requests
        self._seed, self.report, self._memory = seed, Report(), []

    async def run(self, requests: int, clients: int) -> None:
        """Send ``requests`` requests from ``clients`` concurrent clients; the seed fixes their choices."""
        start = time.monotonic()
        numbers = iter(range(requests))
        async with self._client(clients) as client:

            async def client_loop():
                for number in numbers:
                    if number == requests // 2:
                        self._memory.append(self._resident())
                    await self._send_one(client, number, random.Random(f"{self._seed} {number}"))

            await asyncio.gather(*(client_loop() for _ in range(clients)))
        self._memory.append(self._resident())
        self.report.memory, self.report.total = tuple(self._memory), time.monotonic() - start
        if self._memory[1] - self._memory[0] > SLACK:
            self.report.wrong.append(f"the server's memory grew by {self._memory[1] - self._memory[0]:,} bytes")

    async def shut_down(self) -> None:
        """Stop the server while requests are running; they must get their responses."""
        request = self._requests[0]
        body = request.arguments["json"] | {"num_timesteps": 200}
        async with self._client(RUNNING_AT_SHUTDOWN + 1) as client:
            tasks = [asyncio.create_task(client.post(request.route, json=body)) for _ in range(RUNNING_AT_SHUTDOWN)]
            while sum(await self._metrics(client, "bagel_rt_queue ", "bagel_rt_running ")) < RUNNING_AT_SHUTDOWN:
                if any(task.done() for task in tasks):
                    self.report.wrong.append("a request finished before all were running")
                    break
            os.kill(self._process, signal.SIGTERM)
            responses = await asyncio.gather(*tasks, return_exceptions=True)
        for response in responses:
            succeeded = isinstance(response, httpx.Response) and response.status_code == 200
            if succeeded and len(read(request, response)) == 1:
                self.report.at_the_end += 1
            else:
                self.report.wrong.append(
                    f"a request running at shutdown: {getattr(response, 'text', repr(response))[:200]}"
                )

    def _client(self, connections: int) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx.AsyncClient(base_url=self._address, timeout=TIMEOUT, limits=limits, trust_env=False)

    def _resident(self) -> int:
        status = Path(f"/proc/{self._process}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10

    @staticmethod
    async def _metrics(client: httpx.AsyncClient, *names: str) -> list[float]:
        lines = (await client.get("/metrics")).text.splitlines()
        return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names)]

    async def _send_one(self, client: httpx.AsyncClient, number: int, rng: random.Random) -> None:
        report = self.report
        if number % 20 == 0:
            return await self._send_invalid(client, *rng.choice(INVALID))
        request, start, leaves = rng.choice(self._requests), time.monotonic(), number % 10 == 5
        median = statistics.median(report.seconds.get(request.kind, [0.1]))
        timeout = rng.uniform(0, median) if leaves else TIMEOUT
        try:
            response = await asyncio.wait_for(self._until_accepted(client, request, rng), timeout)
            if response.status_code != 200:
                report.wrong.append(f"{request.kind}: {response.status_code}: {response.text[:200]}")
            elif not same(read(request, response), request.expected):
                report.wrong.append(
                    f"{request.kind}: differs from the library's result for {str(request.arguments)[:200]}"
                )
            else:
                report.answered[request.kind] += 1
                report.seconds.setdefault(request.kind, []).append(time.monotonic() - start)
        except (asyncio.TimeoutError, TimeoutError):
            report.left += leaves
            if not leaves:
                report.wrong.append(f"{request.kind}: no response in {TIMEOUT:g} s")
        except httpx.HTTPError as error:
            report.wrong.append(f"{request.kind}: {type(error).__name__}: {error}")

    async def _until_accepted(self, client: httpx.AsyncClient, request: KnownRequest, rng) -> httpx.Response:
        while (response := await client.post(request.route, **request.arguments)).status_code == 429:
            self.report.busy += 1
            await asyncio.sleep(float(response.headers["retry-after"]) * rng.uniform(0.5, 1.5))
        return response

    async def _send_invalid(self, client: httpx.AsyncClient, route: str, arguments: dict) -> None:
        response = await client.post(route, **arguments)
        if 400 <= response.status_code < 500 and response.json()["error"]["message"]:
            self.report.refused += 1
        else:
            self.report.wrong.append(f"{route} {str(arguments)[:100]}: {response.status_code}: {response.text[:200]}")


@contextmanager
def server(model: Path, queue: int, log: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start a server on the CPU; yields (process, address) once it is ready."""
    command = [sys.executable, "-m", "bagel_rt.cli", "serve", "--model", str(model), "--device", "cpu", "--port", "0"]
    command += ["--queue", str(queue), "--grace", str(TIMEOUT)]
    environment = {name: value for name, value in os.environ.items() if name != "BAGEL_RT_API_KEY"}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env=environment)
    try:
        end = time.monotonic() + TIMEOUT
        while not (
            (match := re.search(r"running on (http://\S+)", log.read_text(encoding="utf-8")))
            and httpx.get(f"{match[1]}/health/ready").status_code == 200
        ):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
            time.sleep(0.05)
        yield process, match[1]
    finally:
        process.kill()
        process.wait()


def load(model: Path, requests: int, clients: int, seed: int) -> Report:
    """Put a server under load and stop it.

    Args:
        model: a checkpoint folder.
        requests: number of requests, not counting those at shutdown.
        clients: number of concurrent clients.
        seed: seed of the clients' choices.
    """
    known = known_requests(Bagel.from_pretrained(model, "cpu"))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with server(model, max(RUNNING_AT_SHUTDOWN, clients // 3), log) as (process, address):
            run = Load(address, process.pid, known, seed)

            async def run_and_shut_down():
                await run.run(requests, clients)
                await run.shut_down()

            asyncio.run(run_and_shut_down())
            if (code := process.wait(TIMEOUT)) != 143:  # 128 + SIGTERM
                run.report.wrong.append(f"the server exited with code {code}")
        for line in log.read_text(encoding="utf-8").splitlines():
            if re.search(r"Traceback|never retrieved|ERROR|error [0-9a-f]{12}", line):
                run.report.wrong.append(f"in the server's log: {line}")
    return run.report


def main() -> None:
    """Run the load test, print the table, optionally write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, metavar="N", help="default: 500")
    parser.add_argument("--clients", type=int, default=32, metavar="N", help="concurrent clients; default: 32")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the clients' choices; default: 0")
    parser.add_argument(
        "--model", type=Path, default=DEFAULT_MODEL, metavar="FOLDER", help="default: the embedded model"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    arguments = parser.parse_args()
    if arguments.requests < 2 or arguments.clients < 1:
        parser.error(
            f"--requests must be at least 2 and --clients at least 1, got {arguments.requests} and {arguments.clients}."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # SystemExit runs the finally that kills the server
    report = load(arguments.model, arguments.requests, arguments.clients, arguments.seed)
    if arguments.json:
        data = {"what": __doc__.splitlines()[0], **machine(torch.device("cpu")), "clients": arguments.clients}
        data |= {"table": report.table().splitlines(), **vars(report)}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(report.table())
    parser.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
