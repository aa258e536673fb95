"""Host overhead: operator calls and milliseconds per denoising step and per decoded token, on a very small model.

    python -m benchmarks.host [--json FILE]

On a model this small arithmetic is negligible, so the times are those of Python, dispatch and allocation. The official
code's numbers (same shapes, same counting: calls that produce a tensor, without views) were recorded once on a two-core
machine. The counts are comparable on any machine, the times only on one of that speed.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bagel_rt import Bagel
from bagel_rt.models.bagel.images import tensor_to_image
from bagel_rt.models.bagel.settings import ImageSettings
from bagel_rt.runtime.context import Prefill
from bagel_rt.runtime.decode import generate_tokens
from bagel_rt.runtime.denoise import Denoiser
from benchmarks.random_model import THREE_LAYERS, random_model

OFFICIAL = {  # calls, milliseconds
    "guided step, 3 branches": (1337, 11.2),
    "unguided step": (473, 2.8),
    "decoded token": (277, 2.4),
    "image 96x64, 50 timesteps": (None, 760.0),
}
SIZE = (64, 96)  # height, width


def recorded_model() -> Bagel:
    """A random model with the shapes of the recorded official numbers."""
    return Bagel(*random_model(THREE_LAYERS, torch.device("cpu"), torch.float32))


class OperatorCalls(TorchDispatchMode):
    """Counts operator calls that produce or write a tensor; views do not count."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        returns_tensor = any(isinstance(value.type, torch.TensorType) for value in returns)
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
        self.count += returns_tensor and not is_view
        return func(*args, **(kwargs or {}))


def calls(work) -> int:
    """Operator calls of one run of ``work``."""
    with OperatorCalls() as mode:
        work()
    return mode.count


def milliseconds(work, repeats: int) -> float:
    """Median wall time of one run of ``work``."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def make_denoiser(bagel: Bagel, settings: ImageSettings, prompt: str, edits: bool) -> Denoiser:
    """The denoiser of an edit (three different branches) or of text-to-image."""
    model, prefill = bagel.model, Prefill(bagel.model, bagel.cache)
    ramp = torch.linspace(-1, 1, 3 * SIZE[0] * SIZE[1]).reshape(3, *SIZE)
    inputs = [tensor_to_image(ramp), prompt] if edits else [prompt]
    contexts = model.open_contexts(prefill, bagel.tokenizer, inputs, size=SIZE)
    prefill.run()
    tasks = [model.denoising_task(contexts, SIZE)]
    return Denoiser(model, bagel.cache, tasks, model.guidance(tasks, [settings]))


@torch.inference_mode()
def measure(bagel: Bagel, repeats: int = 200) -> dict[str, tuple[int | None, float]]:
    """name -> (operator calls, milliseconds), in the order of ``OFFICIAL``."""
    settings = ImageSettings(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel")
    guided = make_denoiser(bagel, settings, "make the sky darker and add two birds", edits=True)
    # With the official defaults only text-to-image has steps outside the guidance interval.
    plain = make_denoiser(bagel, ImageSettings(cfg_text_scale=1.0), "a small red boat on the quiet river", edits=False)
    prefill = Prefill(bagel.model, bagel.cache)
    question = "what color is the roof of the house?"
    chat = bagel.model.open_contexts(prefill, bagel.tokenizer, [question], draws=False)
    prefill.run()

    def decoding(length):
        never = -1  # not a token id, so the text reaches its maximum length
        return generate_tokens(bagel.model, bagel.model.text, [chat.cond], bagel.tokenizer.bos, never, length)

    tokens = decoding(repeats + 2)
    next(tokens)

    def next_step(denoiser):
        """A function that runs the next step, cycling through the schedule as a denoising loop does."""
        numbers = itertools.cycle(range(len(denoiser)))
        return lambda: denoiser.step(next(numbers))

    results = {
        "guided step, 3 branches": (calls(next_step(guided)), milliseconds(next_step(guided), repeats)),
        "unguided step": (calls(next_step(plain)), milliseconds(next_step(plain), repeats)),
        "decoded token": (calls(lambda: next(tokens)), milliseconds(lambda: next(tokens), repeats - 2)),
    }
    image = milliseconds(lambda: bagel.generate("a small red boat", size=SIZE, seed=0), 5)
    return results | {"image 96x64, 50 timesteps": (None, image)}


def table(results: dict[str, tuple[int | None, float]]) -> str:
    """The results of :func:`measure` next to the official code's numbers."""
    lines = [f"{'':28}{'calls':>8}{'official':>10}{'ratio':>8}{'ms':>10}{'official':>10}{'ratio':>8}"]
    for name, (count, time_ms) in results.items():
        official_count, official_ms = OFFICIAL[name]
        counts = f"{count:>8}{official_count:>10}{count / official_count:>8.2f}" if count else f"{'':26}"
        lines.append(f"{name:28}{counts}{time_ms:>10.3f}{official_ms:>10.1f}{time_ms / official_ms:>8.2f}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and optionally write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread slows down shapes this small
    results = measure(recorded_model())
    print(table(results))
    if arguments.json:
        describe = ["git", "describe", "--always", "--dirty"]
        here = Path(__file__).parent
        commit = subprocess.run(describe, cwd=here, capture_output=True, text=True).stdout.strip()
        report = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit,
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "results": {name: {"calls": count, "ms": time_ms} for name, (count, time_ms) in results.items()},
            "official": {name: {"calls": count, "ms": time_ms} for name, (count, time_ms) in OFFICIAL.items()},
        }
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
