"""Whole requests at full size: this runtime with and without CUDA graphs, against the official composition.

    python -m benchmarks.end_to_end [--tiny] [--cases LIST] [--who LIST] [--batches 1,4] [--seconds S] [--json FILE]

The weights are random and generated on the device (28 GB for BAGEL-7B-MoT). Shapes and work are those of the published
model. ``benchmarks.runners`` describes the runners.

The cost of a step or a token is the time difference of two runs of different lengths, divided by the difference of
lengths. The time of the full request is extrapolated from these costs. If it is short enough, the full request is also
run and its measured time is reported instead. The note of a row says which.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from bagel_rt.cli.report import finite
from bagel_rt.models.bagel.config import BAGEL_7B_MOT
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.models.bagel.workload import Workload
from benchmarks import roofline
from benchmarks.measure import ceilings, machine, markdown
from benchmarks.random_model import THREE_LAYERS, random_model
from benchmarks.runners import CASES, RUNNERS, TINY_CASES, RequestCase, Runner
from benchmarks.timeline import ProfileWindow, Timeline, initialize_profiler

MAX_ERROR = 3e-2
"""Maximum relative L2 difference between the latents of ``graphs`` and ``eager``."""
MIN_PAIR_SECONDS = 2.0
"""Pairs of runs of two lengths are repeated (up to three times) until they have taken this many seconds."""


@dataclass(frozen=True)
class MeasureOptions:
    """How much to run.

    Attributes:
        timesteps: lengths of the two runs that give the cost of a step.
        tokens: lengths of the two runs that give the cost of a token.
        seconds: maximum expected duration of a full request to run it.
        whole: names of runners that run full requests; the others' times are extrapolated.
    """

    timesteps: tuple[int, int] = (4, 8)
    tokens: tuple[int, int] = (16, 48)
    seconds: float = 25.0
    whole: Sequence[str] = RUNNERS


@dataclass(frozen=True)
class EndToEndRow:
    """Result of one runner for one case.

    Attributes:
        who: name of the runner.
        seconds: time of the whole batch.
        limit: roofline time in seconds.
        step, token: seconds of a guided step and of a token of the whole batch; None if the case has none.
        denoising: seconds of all steps. Like the costs, 0 if the runs were too short to resolve a difference.
        steps: number of denoising steps.
        launches, kernels, idle: per guided step, or per token if the case generates no image; see
            :class:`~benchmarks.timeline.Timeline`.
        memory: peak bytes reserved by the allocator; None on a CPU.
        captures, capture_seconds: number of captured CUDA graphs and the time it took; None for the official code.
        error: ||actual - expected|| / ||expected|| of latents after a few steps, expected being ``eager``'s result.
        note: remarks; starts with WRONG if the result is wrong.
    """

    case: str
    batch: int
    who: str
    seconds: float
    limit: float
    step: float | None = None
    denoising: float | None = None
    token: float | None = None
    steps: int = 0
    launches: float | None = None
    kernels: float | None = None
    idle: float | None = None
    memory: int | None = None
    captures: int | None = None
    capture_seconds: float | None = None
    error: float | None = None
    note: str = ""


@dataclass
class Costs:
    """Cost of a request in seconds: of a guided step, an unguided step, a token, and everything else."""

    guided: float = 0.0
    unguided: float = 0.0
    token: float = 0.0
    rest: float = 0.0

    def denoising(self, work: Workload) -> float:
        """Seconds of all denoising steps."""
        guided, steps = work.guided_steps
        return guided * self.guided + (steps - guided) * self.unguided

    def whole(self, work: Workload) -> float:
        """Seconds of the full request."""
        steps = self.denoising(work) if work.draws else 0.0
        return steps + work.max_think_token_n * self.token + self.rest


ALL_GUIDED, UNGUIDED = {"cfg_interval": (0.0, 1.0)}, {"cfg_interval": (0.0, 0.0)}


@dataclass
class Measurement:
    """Measures one runner on one case. :meth:`run` yields as a heartbeat while it works, then sets ``row``."""

    case: RequestCase
    batch: int
    runner: Runner
    work: Workload
    limit: float
    options: MeasureOptions = field(default_factory=MeasureOptions)
    row: EndToEndRow | None = None

    def run(self, expected: list | str | None = None) -> Iterator[None]:
        """``expected`` is the result of ``eager`` for :meth:`short`; None when measuring ``eager`` itself."""
        runner, bagel = self.runner, self.runner.bagel
        runner.release()
        if runner.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(runner.device)
        costs = Costs()
        for costs in self._costs():  # noqa: B007 - the last value is used
            yield
        note, error = _compare(self.short(), expected, bagel is not None)
        yield
        timeline, failure = self._timeline()
        yield
        seconds, method = costs.whole(self.work), "extrapolated from steps and tokens"
        if runner.name in self.options.whole and seconds <= self.options.seconds:
            runner(self.case, self.batch, **self._warmup_request())
            yield
            seconds, method = runner.seconds(self.case, self.batch), "measured in full"
        draws, memory = self.work.draws, None
        if runner.device.type == "cuda":
            memory = torch.cuda.max_memory_reserved(runner.device)
        self.row = EndToEndRow(
            self.case.name,
            self.batch,
            runner.name,
            seconds,
            self.limit,
            step=costs.guided if draws else None,
            denoising=costs.denoising(self.work) if draws else None,
            token=costs.token if self.case.tokens else None,
            steps=self.work.guided_steps[1] if draws else 0,
            **asdict(timeline),
            memory=memory,
            captures=bagel.engine.graphs.captures if bagel else None,
            capture_seconds=bagel.engine.graphs.capture_seconds if bagel else None,
            error=error,
            note="; ".join(part for part in (note, method, failure) if part),
        )
        runner.release()

    def short(self) -> list | str:
        """Latents after a few steps, or the first tokens of an answer."""
        results = self.runner(self.case, self.batch, **self._short_request())
        return results if isinstance(results, str) else [result.latents.cpu() for result in results]

    def _short_request(self, longer: int = 0) -> dict:
        options = {"tokens": self.options.tokens[0]} if self.case.tokens else {}
        if self.work.draws:
            options |= {"num_timesteps": self.options.timesteps[longer]} | ALL_GUIDED
        return options

    def _costs(self) -> Iterator[Costs]:
        """Yield the costs after each measurement; only the last value has all of them."""
        case, batch, timed = self.case, self.batch, self.runner.seconds
        base, costs = self._short_request(), Costs()

        def slope(name, lengths, options):
            for _ in range(2):  # warm-up: the first run compiles, the second captures CUDA graphs
                self.runner(case, batch, **options | {name: lengths[0]})
            pairs = []
            while len(pairs) < 3 and sum(map(sum, pairs)) < MIN_PAIR_SECONDS:
                pairs.append([timed(case, batch, **options | {name: length}) for length in lengths])
            short, long = map(min, zip(*pairs, strict=True))  # the minimum has the least noise
            return max(long - short, 0.0) / (lengths[1] - lengths[0]), short

        if case.tokens:  # grow the KV cache to its final size first: growing it invalidates captured graphs
            self.runner(case, batch, **base | {"tokens": case.tokens})
            yield costs
        if self.work.draws:
            guided, steps = self.work.guided_steps
            costs.guided, whole = slope("num_timesteps", self.options.timesteps, base)
            costs.rest = whole - (self.options.timesteps[0] - 1) * costs.guided
            yield costs
            if guided < steps:
                costs.unguided, _ = slope("num_timesteps", self.options.timesteps, base | UNGUIDED)
                yield costs
        if case.tokens:
            costs.token, whole = slope("tokens", self.options.tokens, base)
            costs.rest = (costs.rest if self.work.draws else whole) - self.options.tokens[0] * costs.token
        costs.rest = max(costs.rest, 0.0)
        yield costs

    def _timeline(self) -> tuple[Timeline, str]:
        """Profile guided steps, or tokens if the case generates no image; returns (timeline, reason if it is empty)."""
        if self.work.draws:
            window = ProfileWindow(self.runner.device, "image", 2, self.options.timesteps[1] - 4)
            options = self._short_request(longer=1)
        else:
            window, options = ProfileWindow(self.runner.device, "text", 9, 16), {"tokens": 27}
        try:
            self.runner(self.case, self.batch, progress=window, **options)
        except Exception as error:  # profiler failures must not lose the other measurements
            return window.result(), f"no timeline: {type(error).__name__}: {error}"
        return window.result(), window.failure and f"no timeline: {window.failure}"

    def _warmup_request(self) -> dict:
        """The shortest request that captures every graph of the full one.

        A graph is captured on the second step of its kind, so this takes two guided and two unguided steps, as far as
        the full request has them.
        """
        texts = {"tokens": self.options.tokens[0]} if self.case.tokens else {}
        if not self.work.draws:
            return texts

        def step_counts(timesteps):
            settings = replace(self.work.settings, num_timesteps=timesteps)
            guided, steps = replace(self.work, settings=settings).guided_steps
            return guided, steps - guided

        full = step_counts(self.case.timesteps)
        sufficient = (
            n
            for n in range(3, self.case.timesteps)
            if all(count >= min(2, total) for count, total in zip(step_counts(n), full, strict=True))
        )
        return texts | {"num_timesteps": next(sufficient, self.case.timesteps)}


def _compare(actual: list | str, expected: list | str | None, ours: bool) -> tuple[str, float | None]:
    """Compare the results of a short run with ``eager``'s; returns (note, error). Only ``ours`` can be WRONG."""
    if expected is None:
        return "", None
    if isinstance(actual, str):
        return ("" if actual == expected else f"{'WRONG: ' if ours else ''}text differs from eager"), None
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(actual, expected, strict=True))
    return ("WRONG: latents differ from eager" if ours and not error <= MAX_ERROR else ""), error


Task = tuple[str, str, int, RequestCase]


def tasks(
    cases: Sequence[RequestCase] = CASES, who: Sequence[str] = RUNNERS, batches: Sequence[int] = (1, 4)
) -> list[Task]:
    """(name, runner, batch, case), most important first: single requests, batches, then compiled runners.

    Chat and the official code are measured with batch size 1 only; neither supports batches.
    """
    return [
        (f"{case.name}, batch {batch}: {name}", name, batch, case)
        for compiled in (False, True)
        for batch in batches
        for case in cases
        for name in who
        if ("compiled" in name) == compiled and (batch == 1 or (case.task != "chat" and "official" not in name))
    ]


class EndToEnd:
    """Measures tasks with one shared model.

    Attributes:
        model, tokenizer: shared by all runners.
        limits: flop/s and bytes/s of the device.
    """

    def __init__(
        self,
        model: BagelModel,
        tokenizer: Tokenizer,
        options: MeasureOptions | None = None,
        compiler: Callable = torch.compile,
    ):
        self.model, self.tokenizer, self.compiler = model, tokenizer, compiler
        self.options = options or MeasureOptions()
        self.limits = ceilings(model.device)
        self._references: dict[tuple[str, int], list | str] = {}
        initialize_profiler(model.device)

    def measure(self, task: Task) -> Iterator[dict]:
        """Yield empty dictionaries as a heartbeat, then the row."""
        _, who, batch, case = task
        work = case.workload(self.model, self.tokenizer, batch)
        limit = roofline.roofline_seconds(work, self.limits)

        def measurement(name):
            runner = Runner(name, self.model, self.tokenizer, self.compiler)
            return Measurement(case, batch, runner, work, limit, self.options)

        if (case.name, batch) not in self._references:
            eager = measurement("eager")
            self._references[case.name, batch] = eager.short()
            eager.runner.release()
            yield {}
        measured = measurement(who)
        for _ in measured.run(None if who == "eager" else self._references[case.name, batch]):
            yield {}
        yield asdict(measured.row)


def table(rows: Sequence[EndToEndRow]) -> str:
    """Markdown table with one line per case, batch size and runner."""
    header = ["case", "batch", "", "s", "steps/s", "tokens/s", "launches", "kernels", "idle", "peak GB", "of roofline",
              "captures", "relative L2", ""]  # fmt: skip
    lines = []
    for row in rows:
        steps = "" if not row.denoising else f"{row.batch * row.steps / row.denoising:.2f}"
        tokens = "" if not row.token else f"{row.batch / row.token:.1f}"
        captures = "" if row.captures is None else f"{row.captures} in {row.capture_seconds:.1f} s"
        lines.append(
            [row.case, str(row.batch), row.who, f"{row.seconds:.2f}", steps, tokens]
            + ["" if value is None else f"{value:.0f}" for value in (row.launches, row.kernels)]
            + ["" if row.idle is None else f"{row.idle:.0%}"]
            + ["" if row.memory is None else f"{row.memory / 1e9:.1f}"]
            + [f"{row.limit / row.seconds:.0%}", captures, "" if row.error is None else f"{row.error:.1e}", row.note]
        )
    return markdown(header, lines)


EXPLANATION = """\
Seconds are for the whole batch, including image decoding. Steps/s and tokens/s are totals over the batch during
denoising or decoding. Launches, kernels and idle (share of time without GPU work) are per guided step, or per token if
the case generates no image. The roofline excludes the autoencoder. Relative L2 compares latents after a few guided
steps with those of ``eager``. The official code takes one request at a time; it uses this runtime's autoencoder."""


def _parse_list(parser, option: str, text: str, allowed: Sequence) -> list:
    """Parse a comma-separated option; exits with a usage error for values that are not allowed."""
    by_name = {str(value): value for value in allowed}
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in by_name]:
        parser.error(f"{option} must be from {', '.join(by_name)}, got {unknown[0]}.")
    return [by_name[name] for name in names]


def main() -> None:
    """Measure, print the table and optionally write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--tiny", action="store_true", help="use a model of three narrow layers, also on a CPU")
    parser.add_argument("--cases", metavar="LIST", default=",".join(names), help=f"default: {','.join(names)}")
    parser.add_argument("--who", metavar="LIST", default=",".join(RUNNERS), help=f"default: {','.join(RUNNERS)}")
    parser.add_argument("--batches", metavar="LIST", default="1,4", help="default: 1,4")
    parser.add_argument("--seconds", type=float, default=25.0, metavar="S", help="maximum of a full run; default: 25")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    cases = _parse_list(parser, "--cases", arguments.cases, names)
    who = _parse_list(parser, "--who", arguments.who, RUNNERS)
    batches = _parse_list(parser, "--batches", arguments.batches, range(1, 65))
    cuda = torch.cuda.is_available()
    if not (cuda or arguments.tiny):
        parser.exit(2, "end_to_end: error: PyTorch found no CUDA device. Use --tiny on a CPU.\n")
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    config = THREE_LAYERS if arguments.tiny else BAGEL_7B_MOT
    all_cases = TINY_CASES if arguments.tiny else CASES
    runs = EndToEnd(*random_model(config, device, dtype), MeasureOptions(seconds=arguments.seconds))
    rows, failed = [], []
    for task in tasks([case for case in all_cases if case.name in cases], who, batches):
        try:
            rows += [EndToEndRow(**row) for row in runs.measure(task) if row]
        except Exception as error:  # the remaining tasks still run
            failed.append(f"{task[0]}: {type(error).__name__}: {error}")
        print(failed[-1] if failed and failed[-1].startswith(task[0]) else rows[-1], file=sys.stderr, flush=True)
    if arguments.json:
        results = {"about": machine(device), "rows": finite([asdict(row) for row in rows]), "failed": failed}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{table(rows)}\n\n{EXPLANATION}")
    for line in failed:
        print(f"- {line}")
    ours = [line for line in failed if "official" not in line]
    parser.exit(bool(ours) or any(row.note.startswith("WRONG") for row in rows))


if __name__ == "__main__":
    main()
