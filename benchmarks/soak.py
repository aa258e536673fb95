"""Many requests of every kind, one after another, with cancellations and exhausted memory: nothing leaks, all is right.

    python -m benchmarks.soak [--requests 200] [--seed 0] [--model FOLDER | --full-size] [--device cpu] [--json FILE]

Random requests (pictures, batches of equal and of mixed sizes, edits, answers, thoughts, interleaved answers), some of
them cancelled at a random step or abandoned while they stream. Twice the memory runs out on purpose: on CUDA because
all of it is held meanwhile, on a CPU because the KV cache refuses to grow. Behind every failure a request whose result
is known must give it. At the end

- no slot of the KV cache is taken;
- the memory that is allocated is what it was after the warm-up, give or take ``SLACK``: on CUDA what torch's allocator
  gave out, on a CPU the storages of all tensors that the garbage collector knows;
- a sample of pictures and answers is what a new runtime without CUDA graphs gives for the same requests.

Exit codes: 0 all is right; 1 something is wrong, the last lines say what.
"""

import argparse
import gc
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bagel_rt import Bagel, Cancelled, ImageResult
from bagel_rt.cli.report import finite
from bagel_rt.models.bagel.config import BAGEL_7B_MOT
from benchmarks.measure import machine
from benchmarks.random_model import random_model

SLACK = 1 << 20
"""Bytes by which allocated memory may differ: blocks that libraries take at their first use of a size."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest relative L2 between latents of one request; the kernels repeat exactly, libraries need not."""
PROMPTS = ("a small red boat", "", "two birds over a grey sea, early morning; oil on canvas", "night", "3 apples")


@dataclass(frozen=True)
class SoakRequest:
    """A request: the method of ``Bagel`` and its arguments; ``stop`` is the step behind which it is given up."""

    method: str
    arguments: tuple
    options: dict
    stop: int | None = None
    abandons: bool = False

    def of(self, bagel: Bagel):
        """What the runtime answers.

        Raises:
            Cancelled: as asked for.
        """
        if self.abandons:
            pieces = bagel.stream(*self.arguments, **self.options)
            for _ in range(self.stop):
                next(pieces, None)
            pieces.close()
            raise Cancelled
        steps = iter(range(1, 1 << 30))

        def stop(progress):
            if next(steps) == self.stop:
                raise Cancelled

        options = self.options if self.stop is None else self.options | {"progress": stop}
        return getattr(bagel, self.method)(*self.arguments, **options)


class RequestSampler:
    """Random requests that a model can take; the same for the same seed."""

    def __init__(self, bagel: Bagel, seed: int, largest: int | None = None):
        """``largest``: side of the pictures in pixels; by default half of what the model draws."""
        self._random, config = random.Random(seed), bagel.model.config
        self._stride = config.latent_stride
        self._sides = max(1, (largest or config.default_resolution // 2) // self._stride)
        self._kinds = (self._picture, self._equal_batch, self._mixed_batch, self._edit, self._answer, self._thought,
                       self._interleaved)  # fmt: skip

    def draw(self) -> SoakRequest:
        """The next one."""
        asked = self._random.choice(self._kinds)()
        if self._random.random() < 0.2:
            streams = asked.method == "chat" and self._random.random() < 0.5
            return SoakRequest(asked.method, asked.arguments, asked.options, self._random.randint(1, 4), streams)
        return asked

    def one_of_each(self) -> list[SoakRequest]:
        """A request of every kind, none of them given up."""
        return [kind() for kind in self._kinds]

    def _common(self) -> dict:
        return {"seed": self._random.randrange(1000)}

    def _image(self) -> dict:
        low = self._random.choice((0.0, 0.4, 0.7))
        return self._common() | {
            "num_timesteps": self._random.randint(2, 7),
            "cfg_interval": (low, 1.0),
            "cfg_text_scale": self._random.choice((1.0, 4.0)),
            "cfg_renorm_type": self._random.choice(("global", "channel", "text_channel")),
        }

    def _text(self) -> dict:
        samples = {"do_sample": True, "text_temperature": 0.8} if self._random.random() < 0.3 else {}
        return {"max_think_token_n": self._random.randint(1, 24)} | samples

    def _size(self) -> tuple[int, int]:
        height, width = (self._stride * self._random.randint(1, self._sides) for _ in range(2))
        return height, width

    def _prompt(self) -> str:
        return self._random.choice(PROMPTS)

    def _photo(self) -> Image.Image:
        height, width = self._size()
        pixels = np.random.default_rng(self._random.randrange(1000)).integers(0, 256, (height, width, 3), np.uint8)
        return Image.fromarray(pixels)

    def _picture(self) -> SoakRequest:
        return SoakRequest("generate", (self._prompt(),), self._image() | {"size": self._size()})

    def _equal_batch(self) -> SoakRequest:
        prompts = [self._prompt() for _ in range(self._random.randint(2, 3))]
        return SoakRequest("generate", (prompts,), self._image() | {"size": self._size()})

    def _mixed_batch(self) -> SoakRequest:
        prompts = [self._prompt() for _ in range(self._random.randint(2, 3))]
        return SoakRequest("generate", (prompts,), self._image() | {"size": [self._size() for _ in prompts]})

    def _edit(self) -> SoakRequest:
        photos = [self._photo() for _ in range(self._random.randint(1, 2))]
        return SoakRequest("edit", (photos, self._prompt()), self._image())

    def _answer(self) -> SoakRequest:
        photos = [self._photo() for _ in range(self._random.randint(0, 2))]
        return SoakRequest("chat", (self._prompt(), photos), self._common() | self._text())

    def _thought(self) -> SoakRequest:
        return SoakRequest(
            "generate", (self._prompt(),), self._image() | self._text() | {"size": self._size(), "think": True}
        )

    def _interleaved(self) -> SoakRequest:
        inputs = [self._photo(), self._prompt()] if self._random.random() < 0.5 else [self._prompt()]
        return SoakRequest(
            "interleave", (inputs,), self._image() | self._text() | {"size": self._size(), "max_rounds": 2}
        )


@dataclass
class SoakReport:
    """What came of it.

    Attributes:
        requests: how many of each method ended as asked, cancelled ones as "cancelled", exhausted ones as
            "out of memory".
        wrong: what is not as it should be.
        compared: sampled requests that a new runtime without graphs answered, too.
        equal: those whose results are equal bit for bit.
        worst: largest relative L2 between latents of one request.
        taken: slots of the KV cache still held at the end.
        memory: bytes allocated after the warm-up, and at the end.
        captures: CUDA graphs captured.
        seconds: of all.
    """

    requests: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    compared: int = 0
    equal: int = 0
    worst: float = 0.0
    taken: int = 0
    memory: tuple[int, int] = (0, 0)
    captures: int = 0
    seconds: float = 0.0

    def summary(self) -> str:
        """A few lines."""
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.requests.items()))
        lines = [
            f"{sum(self.requests.values())} requests in {self.seconds:.0f} s: {counts}; {self.captures} captures",
            f"{self.compared} compared with a new runtime without graphs: {self.equal} equal, the worst differs by "
            f"{self.worst:.1e}",
            f"{self.taken} slots taken at the end; {self.memory[0]:,} bytes allocated after the warm-up, "
            f"{self.memory[1]:,} at the end",
        ]
        return "\n".join([*lines, *(f"WRONG: {line}" for line in self.wrong), "wrong" if self.wrong else "all right"])


def soak(
    bagel: Bagel, requests: int, seed: int, keep: int = 12, say: Callable[[str], None] = lambda line: None
) -> SoakReport:
    """Run so many random requests and look at what is left of them.

    Args:
        bagel: what is tried; nothing else may use it.
        requests: how many, beside the two that run out of memory and those that verify.
        keep: how many results are compared with those of a new runtime.
        say: told now and then where it stands.
    """
    found, begun, drawn = SoakReport(), time.monotonic(), RequestSampler(bagel, seed)
    known = SoakRequest("generate", (PROMPTS[0],), {"seed": 1, "size": (4 * drawn._stride,) * 2, "num_timesteps": 4})
    answer = SoakRequest("chat", (PROMPTS[2],), {"max_think_token_n": 8})
    for asked in RequestSampler(bagel, seed + 1).one_of_each():
        try:
            asked.of(bagel)
        except Exception as problem:
            found.wrong.append(f"warm-up, {asked.method}: {type(problem).__name__}: {problem}")
    wanted = [(asked, asked.of(bagel)) for asked in (known, answer)]
    before = allocated(bagel)

    def verify(behind: str) -> None:
        for asked, want in wanted:
            try:
                same, error = _compare(asked.of(bagel), want)
            except Exception as problem:
                found.wrong.append(f"{asked.method} behind {behind}: {type(problem).__name__}: {problem}")
                continue
            if not (same or error <= TOLERANCE[bagel.model.dtype]):
                found.wrong.append(f"{asked.method} behind {behind} gives another result than before, by {error:.1e}")

    def run(number: int, asked: SoakRequest):
        """The result; None if there is none."""
        try:
            result = asked.of(bagel)
        except Cancelled:
            found.requests["cancelled"] += 1
            if found.requests["cancelled"] % 3 == 1:
                verify(f"cancelled request {number}")
            return None
        except Exception as problem:
            found.wrong.append(f"request {number}, {asked.method}: {type(problem).__name__}: {problem}")
            return None
        found.requests[asked.method] += 1
        return result

    exhausted = {requests // 3: known, 2 * requests // 3: answer}
    sample, every = [], max(1, requests // max(keep, 1))
    for number in range(requests):
        if number in exhausted:
            _run_out_of_memory(bagel, exhausted[number], found)
            verify(f"exhausted memory in {exhausted[number].method}")
        asked = drawn.draw()
        sample.append((asked, run(number, asked)))
        if sample[-1][1] is None or asked.stop is not None or len(sample) > number // every + 1:
            sample.pop()
        if number % 20 == 19:
            say(f"{number + 1} of {requests}, {len(found.wrong)} wrong")
    verify("all")

    fresh = Bagel(bagel.model, bagel.tokenizer, graphs=False)
    for asked, result in sample:
        same, error = _compare(asked.of(fresh), result)
        found.compared, found.equal, found.worst = found.compared + 1, found.equal + same, max(found.worst, error)
        if not (same or error <= TOLERANCE[bagel.model.dtype]):
            found.wrong.append(f"{asked.method} {asked.options} differs from a new runtime's by {error:.1e}")
    fresh.release_memory()
    del fresh, sample
    _check_final_state(bagel, before, found)
    found.seconds = time.monotonic() - begun
    return found


def _check_final_state(bagel: Bagel, before: int, found: SoakReport) -> None:
    found.captures = bagel.engine.graphs.captures
    gc.collect()
    found.taken = bagel.cache.slots - bagel.cache.free_slots
    found.memory = (before, allocated(bagel))
    if found.taken:
        found.wrong.append(f"{found.taken} slots are still taken")
    if abs(found.memory[1] - before) > SLACK:
        found.wrong.append(f"{found.memory[1] - before:+,} bytes are allocated since the warm-up")


def allocated(bagel: Bagel) -> int:
    """Bytes of device memory in use when all that is only kept has been given back."""
    bagel.release_memory()
    gc.collect()
    if bagel.model.device.type == "cuda":
        torch.cuda.synchronize(bagel.model.device)
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream that multiplied
        return torch.cuda.memory_allocated(bagel.model.device)
    storages = {}
    for tensor in gc.get_objects():
        # Other classes may have no storage: the fake ones of a compiler that ran in this process.
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _run_out_of_memory(bagel: Bagel, asked: SoakRequest, found: SoakReport) -> None:
    """Run a request while there is no memory; it must say so."""
    bagel.release_memory()  # what is only kept could serve it
    try:
        with no_memory(bagel):
            asked.of(bagel)
    except torch.OutOfMemoryError as error:
        found.requests["out of memory"] += 1
        if not str(error):
            found.wrong.append(f"{asked.method} without memory: the error says nothing")
    except Exception as problem:
        found.wrong.append(f"{asked.method} without memory: {type(problem).__name__}: {problem}")
    else:
        found.wrong.append(f"{asked.method} without memory: it did not run out")


@contextmanager
def no_memory(bagel: Bagel) -> Iterator[None]:
    """No allocation succeeds meanwhile: on CUDA all memory is held, on a CPU the KV cache refuses to grow."""
    device = bagel.model.device
    if device.type != "cuda":

        def refuse(length):
            if length > 0:
                raise torch.OutOfMemoryError(f"KV cache: {length} more slots are refused, to see what follows")

        bagel.cache._grow = refuse
        try:
            yield
        finally:
            del bagel.cache._grow
        return
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, torch.cuda.memory_reserved(device) / total), device)
    held, size = [], 1 << 30
    try:
        while size >= 512:  # the allocator's smallest block
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device=device))
            except torch.OutOfMemoryError:
                size //= 2
        yield
    finally:
        held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _compare(got, want) -> tuple[bool, float]:
    """Whether two results are equal, and the relative L2 between their latents; infinite where texts differ."""
    if isinstance(want, list):
        parts = [_compare(a, b) for a, b in zip(got, want, strict=False)]
        complete = len(got) == len(want)
        return complete and all(same for same, _ in parts), max([0.0 if complete else np.inf, *(e for _, e in parts)])
    if not isinstance(want, ImageResult):
        return got == want, 0.0 if got == want else np.inf
    if got.latents.shape != want.latents.shape or got.thought != want.thought:
        return False, np.inf
    error = ((got.latents - want.latents).norm() / want.latents.norm().clamp(min=1e-30)).item()
    return error == 0 and got.image.tobytes() == want.image.tobytes(), error


def main() -> None:
    """Run it, print the summary, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the requests; default: 0")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: the model that the package carries")
    parser.add_argument("--full-size", action="store_true", help="BAGEL-7B-MoT with random weights, on CUDA")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there too")
    arguments = parser.parse_args()
    if arguments.requests < 3:
        parser.error(f"--requests is {arguments.requests}: allowed are numbers from 3, for two must run out of memory")
    if arguments.full_size:
        bagel = Bagel(*random_model(BAGEL_7B_MOT, torch.device(arguments.device or "cuda"), torch.bfloat16))
    else:
        bagel = Bagel.from_pretrained(arguments.model, arguments.device)
    found = soak(bagel, arguments.requests, arguments.seed, say=lambda line: print(line, flush=True))
    if arguments.json:
        told = {"about": machine(bagel.model.device), **finite(vars(found)), "requests": dict(found.requests)}
        arguments.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(found.summary())
    parser.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
