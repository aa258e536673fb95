"""Many clients at once on ``bagel-rt serve``: everyone gets the right answer, nothing grows, nobody is lost at the end.

    python -m benchmarks.serve_load [--requests 500] [--clients 32] [--seed 0] [--model FOLDER] [--json FILE]

Starts the server as a process of its own, on the CPU, with a queue shorter than the clients are many. They draw, edit,
chat, stream and interleave; a tenth of them go away midway, a twentieth say what makes no sense. Who is told that the
queue is full tries again when it says. Then the server is told to stop while it is at work.

- Every answer is the library's own to the same request: texts equal, pictures (drawn in batches) to a level.
- Every request that makes no sense is refused with a 4xx that says why.
- The server's memory (what is resident) grows by less than ``SLACK`` over the second half, in which a fourth of the
  requests bring a picture of 3.7 MB: a server that kept each, as it came or as its pixels, would grow by far more.
- Every request under way at the end is answered; the server leaves no trace of an error in its log.

Exit codes: 0 all is right; 1 something is wrong, the last lines say what.
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
"""Bytes by which the server's resident memory may grow over the second half: what allocators keep."""
PATIENCE = 600.0
"""Seconds for any single thing; beyond, it hangs."""
AT_THE_END = 8
"""Requests under way when the server is told to stop."""
DRAW, EDIT, CHAT = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"


@dataclass(frozen=True)
class Asked:
    """A request whose answer is known.

    Attributes:
        kind: of the table.
        route: where it goes.
        said: httpx's keywords.
        wanted: texts, joined to one, and pictures, in order.
    """

    kind: str
    route: str
    said: dict
    wanted: list[str | np.ndarray]


@dataclass
class Found:
    """What came of it.

    Attributes:
        answered: requests of each kind that have the right answer.
        seconds: from a request to its answer, the tries with it, of each kind.
        busy: how often the queue was full.
        left: clients that went away before their answer.
        refused: requests that make no sense and were refused.
        at_the_end: requests that were under way when the server was told to stop, and have their answer.
        memory: the server's resident bytes after the first half, and after the second.
        total: seconds of all but the end.
        wrong: what is not as it should be.
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
        """A line of each kind, and one of all."""
        lines = [f"{'':12}{'right':>8}{'median s':>10}{'p95 s':>10}"]
        for kind, seconds in sorted(self.seconds.items()):
            late = sorted(seconds)[int(0.95 * (len(seconds) - 1))]
            lines.append(f"{kind:12}{self.answered[kind]:>8}{statistics.median(seconds):>10.3f}{late:>10.3f}")
        count = sum(self.answered.values())
        lines += [
            f"{count} answers in {self.total:.1f} s, {count / max(self.total, 1e-9):.1f} a second; {self.left} clients "
            f"left, {self.refused} requests refused, {self.busy} times the queue was full",
            f"{self.memory[0]:,} bytes resident after the first half, {self.memory[1]:,} after the second",
            f"{self.at_the_end} of {AT_THE_END} requests under way at the end were answered",
        ]
        return "\n".join([*lines, *(f"WRONG: {line}" for line in self.wrong), "wrong" if self.wrong else "all right"])


def photo(width: int, height: int) -> bytes:
    """A PNG file of noise."""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def known(bagel: Bagel) -> list[Asked]:
    """Requests of every kind, and what the library answers."""
    asked = []
    for number, (width, height, steps) in enumerate([(48, 32, 4), (48, 32, 4), (48, 32, 4), (64, 64, 5), (64, 64, 3)]):
        options = {"num_timesteps": steps, "seed": number}
        drawn = bagel.generate(f"boat {number}", size=(height, width), **options).image
        body = {"prompt": f"boat {number}", "size": f"{width}x{height}", **options}
        asked.append(Asked("picture", DRAW, {"json": body}, [np.asarray(drawn)]))
    drawn = [bagel.generate("two", size=(32, 48), num_timesteps=4, seed=seed).image for seed in (7, 8)]
    body = {"prompt": "two", "size": "48x32", "num_timesteps": 4, "seed": 7, "n": 2}
    asked.append(Asked("picture", DRAW, {"json": body}, [np.asarray(image) for image in drawn]))

    for width, height in ((1280, 960), (960, 1280)):
        drawn = bagel.edit(photo(width, height), "brighter", num_timesteps=3, seed=1).image
        fields = {"prompt": "brighter", "num_timesteps": "3", "seed": "1"}
        said = {"data": fields, "files": {"image": ("a.png", photo(width, height), "image/png")}}
        asked.append(Asked("edit", EDIT, said, [np.asarray(drawn)]))

    url = "data:image/png;base64," + base64.b64encode(photo(1280, 960)).decode()
    shown = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
    for content, options, wanted in (
        ("hello", {}, bagel.chat("hello", max_think_token_n=13)),
        (shown, {}, bagel.chat("what is it?", [photo(1280, 960)], max_think_token_n=13)),
        (
            "once upon",
            {"temperature": 1.5, "seed": 3},
            bagel.chat("once upon", seed=3, do_sample=True, text_temperature=1.5, max_think_token_n=13),
        ),
    ):
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, **options}
        asked.append(Asked("chat", CHAT, {"json": body}, [wanted]))
        asked.append(Asked("stream", CHAT, {"json": body | {"stream": True}}, [wanted]))

    options = {"num_timesteps": 3, "seed": 5, "max_rounds": 2}
    parts = bagel.interleave(["a story"], size=(32, 32), think=False, max_think_token_n=9, **options)
    wanted = ["".join(part for part in parts if isinstance(part, str))]
    wanted += [np.asarray(part.image) for part in parts if isinstance(part, ImageResult)]
    body = {"messages": [{"role": "user", "content": "a story"}], "modalities": ["text", "image"], "max_tokens": 8}
    body |= {"size": "32x32", "think": False, **options}
    return [*asked, Asked("interleaved", CHAT, {"json": body}, wanted)]


SENSELESS = (
    (DRAW, {"content": b"{"}),
    (DRAW, {"content": b"[" * 60_000}),
    (DRAW, {"json": {}}),
    (DRAW, {"json": {"prompt": "x", "size": "7x7"}}),
    (DRAW, {"json": {"prompt": "x", "num_timesteps": 10**9}}),
    (DRAW, {"json": {"prompt": "x", "stlye": "vivid"}}),
    (DRAW, {"json": {"prompt": "word " * 50_000}}),
    (EDIT, {"data": {"prompt": "x"}}),
    (EDIT, {"data": {"prompt": "x"}, "files": {"image": ("a.png", photo(64, 64)[:300], "image/png")}}),
    (CHAT, {"json": {"messages": []}}),
    (CHAT, {"json": {"messages": [{"role": "user", "content": "x"}], "model": "gpt-4"}}),
    (CHAT, {"json": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}}),
)
"""(route, httpx's keywords) of requests that are to be refused."""


def _picture(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def read(asked: Asked, answer: httpx.Response) -> list[str | np.ndarray]:
    """What an answer holds, in the form of ``Asked.wanted``."""
    if asked.route != CHAT:
        return [_picture(item["b64_json"]) for item in answer.json()["data"]]
    if asked.kind == "stream":
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        if lines[-1] != "[DONE]":
            return [f"a stream that ends with {lines[-1][:200]}"]
        return ["".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1])]
    message = answer.json()["choices"][0]["message"]
    images = [item["image_url"]["url"].partition(",")[2] for item in message.get("images", [])]
    return [message["content"], *map(_picture, images)]


def same(got: list[str | np.ndarray], wanted: list[str | np.ndarray]) -> bool:
    """Whether texts are equal, and pictures to a level."""

    def alike(one, other) -> bool:
        if isinstance(one, str) or isinstance(other, str):
            return isinstance(one, str) and isinstance(other, str) and one == other
        return one.shape == other.shape and np.abs(one.astype(int) - other.astype(int)).max() <= 1

    return len(got) == len(wanted) and all(map(alike, got, wanted))


class Load:
    """Clients of one server.

    Attributes:
        found: what comes of it.
    """

    def __init__(self, address: str, process: int, asked: list[Asked], seed: int):
        """
        Args:
            address: of the server.
            process: its number.
            asked: what clients ask.
            seed: of their choices.
        """
        self._address, self._process, self._asked = address, process, asked
        self._seed, self.found, self._memory = seed, Found(), []

    async def run(self, requests: int, clients: int) -> None:
        """So many requests, by so many clients at a time; what they do follows from the seed."""
        begun = time.monotonic()
        numbers = iter(range(requests))
        async with self._client(clients) as client:

            async def one_after_another():
                for number in numbers:
                    if number == requests // 2:
                        self._memory.append(self._resident())
                    await self._one(client, number, random.Random(f"{self._seed} {number}"))

            await asyncio.gather(*(one_after_another() for _ in range(clients)))
        self._memory.append(self._resident())
        self.found.memory, self.found.total = tuple(self._memory), time.monotonic() - begun
        if self._memory[1] - self._memory[0] > SLACK:
            self.found.wrong.append(f"the server grew by {self._memory[1] - self._memory[0]:,} bytes")

    async def end(self) -> None:
        """Tell the server to stop when requests are under way; they are to be answered."""
        asked = self._asked[0]
        body = asked.said["json"] | {"num_timesteps": 200}
        async with self._client(AT_THE_END + 1) as client:
            tasks = [asyncio.create_task(client.post(asked.route, json=body)) for _ in range(AT_THE_END)]
            while sum(await self._measures(client, "bagel_rt_queue ", "bagel_rt_running ")) < AT_THE_END:
                if any(task.done() for task in tasks):
                    self.found.wrong.append("a request was answered before all were under way")
                    break
            os.kill(self._process, signal.SIGTERM)
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, httpx.Response) and answer.status_code == 200 and len(read(asked, answer)) == 1:
                self.found.at_the_end += 1
            else:
                self.found.wrong.append(
                    f"a request under way at the end: {getattr(answer, 'text', repr(answer))[:200]}"
                )

    def _client(self, connections: int) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx.AsyncClient(base_url=self._address, timeout=PATIENCE, limits=limits, trust_env=False)

    def _resident(self) -> int:
        told = Path(f"/proc/{self._process}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmRSS:\s+(\d+) kB", told)[1]) << 10

    @staticmethod
    async def _measures(client: httpx.AsyncClient, *names: str) -> list[float]:
        lines = (await client.get("/metrics")).text.splitlines()
        return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names)]

    async def _one(self, client: httpx.AsyncClient, number: int, rng: random.Random) -> None:
        found = self.found
        if number % 20 == 0:
            return await self._refused(client, *rng.choice(SENSELESS))
        asked, begun, leaves = rng.choice(self._asked), time.monotonic(), number % 10 == 5
        usual = statistics.median(found.seconds.get(asked.kind, [0.1]))
        patience = rng.uniform(0, usual) if leaves else PATIENCE
        try:
            answer = await asyncio.wait_for(self._until_taken(client, asked, rng), patience)
            if answer.status_code != 200:
                found.wrong.append(f"{asked.kind}: {answer.status_code}: {answer.text[:200]}")
            elif not same(read(asked, answer), asked.wanted):
                found.wrong.append(f"{asked.kind}: another answer than the library's to {str(asked.said)[:200]}")
            else:
                found.answered[asked.kind] += 1
                found.seconds.setdefault(asked.kind, []).append(time.monotonic() - begun)
        except (asyncio.TimeoutError, TimeoutError):
            found.left += leaves
            if not leaves:
                found.wrong.append(f"{asked.kind}: no answer in {PATIENCE:g} s")
        except httpx.HTTPError as error:
            found.wrong.append(f"{asked.kind}: {type(error).__name__}: {error}")

    async def _until_taken(self, client: httpx.AsyncClient, asked: Asked, rng: random.Random) -> httpx.Response:
        while (answer := await client.post(asked.route, **asked.said)).status_code == 429:
            self.found.busy += 1
            await asyncio.sleep(float(answer.headers["retry-after"]) * rng.uniform(0.5, 1.5))
        return answer

    async def _refused(self, client: httpx.AsyncClient, route: str, said: dict) -> None:
        answer = await client.post(route, **said)
        if 400 <= answer.status_code < 500 and answer.json()["error"]["message"]:
            self.found.refused += 1
        else:
            self.found.wrong.append(f"{route} {str(said)[:100]}: {answer.status_code}: {answer.text[:200]}")


@contextmanager
def server(model: Path, queue: int, log: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """(process, address) of a server on the CPU, listening."""
    command = [sys.executable, "-m", "bagel_rt.cli", "serve", "--model", str(model), "--device", "cpu", "--port", "0"]
    command += ["--queue", str(queue), "--grace", str(PATIENCE)]
    environment = {name: value for name, value in os.environ.items() if name != "BAGEL_RT_API_KEY"}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env=environment)
    try:
        end = time.monotonic() + PATIENCE
        while not (found := re.search(r"running on (http://\S+)", log.read_text(encoding="utf-8"))):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
            time.sleep(0.05)
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


def load(model: Path, requests: int, clients: int, seed: int) -> Found:
    """Put a server under load and end it.

    Args:
        model: a checkpoint folder.
        requests: how many, beside those at the end.
        clients: at a time.
        seed: of what they do.
    """
    asked = known(Bagel.from_pretrained(model, "cpu"))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with server(model, max(AT_THE_END, clients // 3), log) as (process, address):
            run = Load(address, process.pid, asked, seed)

            async def both():
                await run.run(requests, clients)
                await run.end()

            asyncio.run(both())
            if (code := process.wait(PATIENCE)) != 143:
                run.found.wrong.append(f"the server's exit code is {code}")
        for line in log.read_text(encoding="utf-8").splitlines():
            if re.search(r"Traceback|never retrieved|ERROR|error [0-9a-f]{12}", line):
                run.found.wrong.append(f"in the server's log: {line}")
    return run.found


def main() -> None:
    """Run it, print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, metavar="N", help="default: 500")
    parser.add_argument("--clients", type=int, default=32, metavar="N", help="at a time; default: 32")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what they do; default: 0")
    parser.add_argument(
        "--model", type=Path, default=DEFAULT_MODEL, metavar="FOLDER", help="default: the package's own"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    if arguments.requests < 2 or arguments.clients < 1:
        parser.error("allowed are two requests and one client at least")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with whoever ends this
    found = load(arguments.model, arguments.requests, arguments.clients, arguments.seed)
    if arguments.json:
        told = {"what": __doc__.splitlines()[0], **machine(torch.device("cpu")), "clients": arguments.clients}
        told |= {"table": found.table().splitlines(), **vars(found)}
        arguments.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(found.table())
    parser.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
