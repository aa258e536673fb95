"""Soak test: random requests of every kind, with cancellations and out-of-memory errors, must not leak or go wrong.

    python -m benchmarks.soak [--requests 200] [--seed 0] [--model FOLDER | --full-size] [--device cpu] [--json FILE]

The requests are single images, batches of equal and mixed sizes, edits, chats, images after a thought, and interleaved
output. Some are cancelled at a random step or abandoned while they stream. Two run out of memory on purpose: on CUDA
all free memory is held, on a CPU the KV cache refuses to grow. After failures, reference requests must still give
their known results. At the end

- no slot of the KV cache is in use;
- allocated memory equals that after the warm-up, within ``SLACK``: on CUDA according to torch's allocator, on a CPU the
  storages of all tensors known to the garbage collector;
- a sample of the results equals those of a new runtime without CUDA graphs.

Exit codes: 0 passed; 1 failed, the last lines list the failures.
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
"""Allowed difference of allocated memory in bytes: libraries allocate workspaces on the first use of a size."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Maximum relative L2 between latents of equal requests. Kernels are deterministic, libraries need not be."""
PROMPTS = ("a small red boat", "x", "two birds over a gray sea, early morning; oil on canvas", "night", "3 apples")


@dataclass(frozen=True)
class SoakRequest:
    """A call of a ``Bagel`` method.

    Attributes:
        method: its name.
        arguments: positional arguments.
        options: keyword arguments.
        stop: step after which the request is cancelled; None to complete it.
        abandons: close a text stream after ``stop`` pieces instead of cancelling in the progress callback.
    """

    method: str
    arguments: tuple
    options: dict
    stop: int | None = None
    abandons: bool = False

    def run(self, bagel: Bagel):
        """Run the request and return its result.

        Raises:
            Cancelled: ``stop`` was reached.
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
    """Generates random valid requests, reproducible by seed."""

    def __init__(self, bagel: Bagel, seed: int, largest: int | None = None):
        """``largest`` is the maximum side of images in pixels; the default is half the model's default resolution."""
        self._random, config = random.Random(seed), bagel.model.config
        self.stride = config.latent_stride
        self._sides = max(1, (largest or config.default_resolution // 2) // self.stride)
        self._kinds = (self._single_image, self._equal_batch, self._mixed_batch, self._edit, self._chat,
                       self._image_after_thought, self._interleaved)  # fmt: skip

    def sample(self) -> SoakRequest:
        """The next random request; a fifth of them are cancelled."""
        request = self._random.choice(self._kinds)()
        if self._random.random() < 0.2:
            streams = request.method == "chat" and self._random.random() < 0.5
            return SoakRequest(request.method, request.arguments, request.options, self._random.randint(1, 4), streams)
        return request

    def one_of_each(self) -> list[SoakRequest]:
        """One request of each kind, none of them cancelled."""
        return [kind() for kind in self._kinds]

    def _common(self) -> dict:
        return {"seed": self._random.randrange(1000)}

    def _image_settings(self) -> dict:
        low = self._random.choice((0.0, 0.4, 0.7))
        return self._common() | {
            "num_timesteps": self._random.randint(2, 7),
            "cfg_interval": (low, 1.0),
            "cfg_text_scale": self._random.choice((1.0, 4.0)),
            "cfg_renorm_type": self._random.choice(("global", "channel", "text_channel")),
        }

    def _text_settings(self) -> dict:
        sampling = {"do_sample": True, "text_temperature": 0.8} if self._random.random() < 0.3 else {}
        return {"max_think_token_n": self._random.randint(1, 24)} | sampling

    def _size(self) -> tuple[int, int]:
        height, width = (self.stride * self._random.randint(1, self._sides) for _ in range(2))
        return height, width

    def _prompt(self) -> str:
        return self._random.choice(PROMPTS)

    def _input_image(self) -> Image.Image:
        height, width = self._size()
        pixels = np.random.default_rng(self._random.randrange(1000)).integers(0, 256, (height, width, 3), np.uint8)
        return Image.fromarray(pixels)

    def _single_image(self) -> SoakRequest:
        return SoakRequest("generate", (self._prompt(),), self._image_settings() | {"size": self._size()})

    def _equal_batch(self) -> SoakRequest:
        prompts = [self._prompt() for _ in range(self._random.randint(2, 3))]
        return SoakRequest("generate", (prompts,), self._image_settings() | {"size": self._size()})

    def _mixed_batch(self) -> SoakRequest:
        prompts = [self._prompt() for _ in range(self._random.randint(2, 3))]
        return SoakRequest("generate", (prompts,), self._image_settings() | {"size": [self._size() for _ in prompts]})

    def _edit(self) -> SoakRequest:
        images = [self._input_image() for _ in range(self._random.randint(1, 2))]
        return SoakRequest("edit", (images, self._prompt()), self._image_settings())

    def _chat(self) -> SoakRequest:
        images = [self._input_image() for _ in range(self._random.randint(0, 2))]
        return SoakRequest("chat", (self._prompt(), images), self._common() | self._text_settings())

    def _image_after_thought(self) -> SoakRequest:
        options = self._image_settings() | self._text_settings() | {"size": self._size(), "think": True}
        return SoakRequest("generate", (self._prompt(),), options)

    def _interleaved(self) -> SoakRequest:
        inputs = [self._input_image(), self._prompt()] if self._random.random() < 0.5 else [self._prompt()]
        options = self._image_settings() | self._text_settings() | {"size": self._size(), "max_rounds": 2}
        return SoakRequest("interleave", (inputs,), options)


@dataclass
class SoakReport:
    """Results of a soak test.

    Attributes:
        requests: number of successful requests by method, plus "cancelled" and "out of memory".
        wrong: failures.
        compared: number of requests that were repeated on a new runtime without graphs.
        equal: number of these with bitwise equal results.
        worst: largest relative L2 between their latents.
        taken: slots of the KV cache in use at the end.
        memory: bytes allocated after the warm-up, and at the end.
        captures: number of captured CUDA graphs.
        seconds: total duration.
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
        """Counts, comparison, memory and failures in a few lines."""
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.requests.items()))
        lines = [
            f"{sum(self.requests.values())} requests in {self.seconds:.0f} s: {counts}; {self.captures} captures",
            (
                f"{self.compared} compared with a new runtime without graphs: {self.equal} equal, "
                f"largest error {self.worst:.1e}"
            ),
            (
                f"{self.taken} slots in use at the end; {self.memory[0]:,} bytes allocated after the warm-up, "
                f"{self.memory[1]:,} at the end"
            ),
        ]
        return "\n".join([*lines, *(f"FAILED: {line}" for line in self.wrong), "failed" if self.wrong else "passed"])


def soak(
    bagel: Bagel, requests: int, seed: int, keep: int = 12, log: Callable[[str], None] = lambda line: None
) -> SoakReport:
    """Run random requests, then check results, slots and memory.

    Args:
        bagel: the runtime under test, used by nothing else.
        requests: number of random requests, not counting those that run out of memory and the reference requests.
        seed: of the requests.
        keep: number of results to compare with a new runtime.
        log: called with a progress line every 20 requests.
    """
    report, begun, sampler = SoakReport(), time.monotonic(), RequestSampler(bagel, seed)
    known = SoakRequest("generate", (PROMPTS[0],), {"seed": 1, "size": (4 * sampler.stride,) * 2, "num_timesteps": 4})
    answer = SoakRequest("chat", (PROMPTS[2],), {"max_think_token_n": 8})
    _warm_up(bagel, RequestSampler(bagel, seed + 1).one_of_each(), report)
    references = [(request, request.run(bagel)) for request in (known, answer)]
    before = allocated(bagel)

    def verify(after: str) -> None:
        _verify(bagel, references, after, report)

    def run(number: int, request: SoakRequest):
        """Run a random request; returns its result, or None if it was cancelled or failed."""
        try:
            result = request.run(bagel)
        except Cancelled:
            report.requests["cancelled"] += 1
            if report.requests["cancelled"] % 3 == 1:
                verify(f"cancelled request {number}")
            return None
        except Exception as error:
            report.wrong.append(f"request {number}, {request.method}: {type(error).__name__}: {error}")
            return None
        report.requests[request.method] += 1
        return result

    out_of_memory = {requests // 3: known, 2 * requests // 3: answer}
    # Keep at most one completed result per ``every`` requests, so that memory for samples is bounded.
    sample, every = [], max(1, requests // max(keep, 1))
    for number in range(requests):
        if number in out_of_memory:
            _run_out_of_memory(bagel, out_of_memory[number], report)
            verify(f"out of memory in {out_of_memory[number].method}")
        request = sampler.sample()
        sample.append((request, run(number, request)))
        if sample[-1][1] is None or request.stop is not None or len(sample) > number // every + 1:
            sample.pop()
        if number % 20 == 19:
            log(f"{number + 1} of {requests}, {len(report.wrong)} failures")
    verify("all requests")

    _compare_with_new_runtime(bagel, sample, report)
    del sample
    _check_final_state(bagel, before, report)
    report.seconds = time.monotonic() - begun
    return report


def _warm_up(bagel: Bagel, requests, report: SoakReport) -> None:
    for request in requests:
        try:
            request.run(bagel)
        except Exception as error:
            report.wrong.append(f"warm-up, {request.method}: {type(error).__name__}: {error}")


def _verify(bagel: Bagel, references, after: str, report: SoakReport) -> None:
    """Repeat the requests of ``references`` and compare with their earlier results."""
    for request, expected in references:
        try:
            same, error = _compare(request.run(bagel), expected)
        except Exception as error:
            report.wrong.append(f"{request.method} after {after}: {type(error).__name__}: {error}")
            continue
        if not (same or error <= TOLERANCE[bagel.model.dtype]):
            report.wrong.append(f"{request.method} after {after} differs from its earlier result by {error:.1e}")


def _compare_with_new_runtime(bagel: Bagel, sample, report: SoakReport) -> None:
    """Repeat the requests of ``sample`` with a runtime that has no history and no graphs."""
    fresh = Bagel(bagel.model, bagel.tokenizer, graphs=False)
    for request, result in sample:
        same, error = _compare(request.run(fresh), result)
        report.compared, report.equal, report.worst = report.compared + 1, report.equal + same, max(report.worst, error)
        if not (same or error <= TOLERANCE[bagel.model.dtype]):
            report.wrong.append(f"{request.method} {request.options} differs from a new runtime by {error:.1e}")
    fresh.release_memory()


def _check_final_state(bagel: Bagel, before: int, report: SoakReport) -> None:
    report.captures = bagel.engine.graphs.captures
    gc.collect()
    report.taken = bagel.cache.slots - bagel.cache.free_slots
    report.memory = (before, allocated(bagel))
    if report.taken:
        report.wrong.append(f"{report.taken} slots are still in use")
    if abs(report.memory[1] - before) > SLACK:
        report.wrong.append(f"allocated memory changed by {report.memory[1] - before:+,} bytes since the warm-up")


def allocated(bagel: Bagel) -> int:
    """Bytes of device memory in use after dropping all caches."""
    bagel.release_memory()
    gc.collect()
    if bagel.model.device.type == "cuda":
        torch.cuda.synchronize(bagel.model.device)
        torch._C._cuda_clearCublasWorkspaces()  # cuBLAS keeps one workspace per stream
        return torch.cuda.memory_allocated(bagel.model.device)
    storages = {}
    for tensor in gc.get_objects():
        # Exact types only: subclasses such as FakeTensor may have no storage.
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _run_out_of_memory(bagel: Bagel, request: SoakRequest, report: SoakReport) -> None:
    """Run a request without free memory; it must raise OutOfMemoryError with a message."""
    bagel.release_memory()  # otherwise cached buffers could satisfy the request
    try:
        with no_memory(bagel):
            request.run(bagel)
    except torch.OutOfMemoryError as error:
        report.requests["out of memory"] += 1
        if not str(error):
            report.wrong.append(f"{request.method} without memory: the error has no message")
    except Exception as error:
        report.wrong.append(f"{request.method} without memory: {type(error).__name__}: {error}")
    else:
        report.wrong.append(f"{request.method} without memory: no OutOfMemoryError")


@contextmanager
def no_memory(bagel: Bagel) -> Iterator[None]:
    """Context in which allocations fail: on CUDA all memory is held, on a CPU the KV cache refuses to grow."""
    device = bagel.model.device
    if device.type != "cuda":

        def refuse(length):
            if length > 0:
                raise torch.OutOfMemoryError(f"KV cache: growth by {length} slots refused by the soak test")

        bagel.cache._grow = refuse
        try:
            yield
        finally:
            del bagel.cache._grow
        return
    gc.collect()
    torch.cuda.empty_cache()
    # Cap the process at its reserved memory, then occupy the free blocks inside it.
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


def _compare(actual, expected) -> tuple[bool, float]:
    """Whether two results are equal, and the relative L2 between their latents (infinite if texts differ)."""
    if isinstance(expected, list):
        parts = [_compare(a, b) for a, b in zip(actual, expected, strict=False)]
        complete = len(actual) == len(expected)
        return complete and all(same for same, _ in parts), max([0.0 if complete else np.inf, *(e for _, e in parts)])
    if not isinstance(expected, ImageResult):
        return actual == expected, 0.0 if actual == expected else np.inf
    if actual.latents.shape != expected.latents.shape or actual.thought != expected.thought:
        return False, np.inf
    error = ((actual.latents - expected.latents).norm() / expected.latents.norm().clamp(min=1e-30)).item()
    return error == 0 and actual.image.tobytes() == expected.image.tobytes(), error


def main() -> None:
    """Run the soak test, print the summary and optionally write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the requests; default: 0")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: the embedded model")
    parser.add_argument("--full-size", action="store_true", help="use BAGEL-7B-MoT with random weights, on CUDA")
    parser.add_argument("--device", help="default: cuda if available")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary to this file")
    arguments = parser.parse_args()
    if arguments.requests < 3:
        parser.error(f"--requests must be at least 3, got {arguments.requests}.")
    if arguments.full_size:
        bagel = Bagel(*random_model(BAGEL_7B_MOT, torch.device(arguments.device or "cuda"), torch.bfloat16))
    else:
        bagel = Bagel.from_pretrained(arguments.model, arguments.device)
    report = soak(bagel, arguments.requests, arguments.seed, log=lambda line: print(line, flush=True))
    if arguments.json:
        results = {"about": machine(bagel.model.device), **finite(vars(report)), "requests": dict(report.requests)}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(report.summary())
    parser.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
