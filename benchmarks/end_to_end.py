"""Whole requests at full size: this runtime with CUDA graphs and without, beside the official composition.

    python -m benchmarks.end_to_end [--tiny] [--cases LIST] [--who LIST] [--batches 1,4] [--seconds S] [--json FILE]

The weights are random and made on the device (28 GB for BAGEL-7B-MoT), the shapes and the work are the published
model's. For the contenders see ``benchmarks.runners``.

A step and a token cost what two runs of different lengths differ by. From these and the rest follow the seconds of the
whole request; where these are few enough it is run whole, and its seconds are measured. The row says which.
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
from benchmarks.runners import CASES, TINY_CASES, WHO, Case, Contender
from benchmarks.timeline import Timeline, Window, wake_profiler

WRONG = 3e-2
"""Relative L2 between latents of this runtime's two ways from which one of them counts as wrong."""
PAIRS = 2.0
"""Seconds of runs of two lengths behind which they are not repeated."""


@dataclass(frozen=True)
class Effort:
    """How much is run.

    Attributes:
        timesteps: of the two runs whose difference gives the cost of a step.
        tokens: of the two whose difference gives the cost of a token.
        seconds: a whole request that should take no longer is run whole.
        whole: whose; the others' seconds follow from the costs.
    """

    timesteps: tuple[int, int] = (4, 8)
    tokens: tuple[int, int] = (16, 48)
    seconds: float = 25.0
    whole: Sequence[str] = WHO


@dataclass(frozen=True)
class EndToEndRow:
    """One contender at one case.

    Attributes:
        seconds: of the whole batch.
        step, token: seconds of a guided step and of a token, of the whole batch; None where there is none.
        denoising: seconds of all steps; 0, as the costs, where runs were too short to tell.
        launches, kernels, idle: of guided steps, or of tokens where nothing is drawn; see
            :class:`~benchmarks.timeline.Timeline`.
        memory: most bytes that the allocator held; None on a CPU.
        limit: seconds that the roofline allows.
        captures, capture_seconds: CUDA graphs captured, and what that took; None of the official code.
        error: ||got - want|| / ||want|| of the first latents after a few steps, want being ``eager``'s.
        note: what to know of the row; it begins with WRONG where a result is.
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
    """Seconds of the parts of a request: a guided step, one that is not, a token, and all the rest."""

    guided: float = 0.0
    plain: float = 0.0
    token: float = 0.0
    rest: float = 0.0

    def denoising(self, work: Workload) -> float:
        """All steps of a workload."""
        guided, steps = work.guided_steps
        return guided * self.guided + (steps - guided) * self.plain

    def whole(self, work: Workload) -> float:
        """All of a workload."""
        steps = self.denoising(work) if work.draws else 0.0
        return steps + work.max_think_token_n * self.token + self.rest


GUIDED, PLAIN = {"cfg_interval": (0.0, 1.0)}, {"cfg_interval": (0.0, 0.0)}


@dataclass
class Measurement:
    """One contender at one case: :meth:`run` yields now and then while it works, and leaves ``row``."""

    case: Case
    batch: int
    contender: Contender
    work: Workload
    limit: float
    effort: Effort = field(default_factory=Effort)
    row: EndToEndRow | None = None

    def run(self, want: list | str | None = None) -> Iterator[None]:
        """``want``: what ``eager`` gives for :meth:`short`; None of itself."""
        who, bagel = self.contender, self.contender.bagel
        who.release()
        if who.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(who.device)
        costs = Costs()
        for costs in self._costs():  # noqa: B007 - the last one counts
            yield
        note, error = _compared(self.short(), want, bagel is not None)
        yield
        timeline, failure = self._timeline()
        yield
        seconds, how = costs.whole(self.work), "from the costs of steps and tokens"
        if who.who in self.effort.whole and seconds <= self.effort.seconds:
            who(self.case, self.batch, **self._warming())
            yield
            seconds, how = who.seconds(self.case, self.batch), "measured whole"
        draws, memory = self.work.draws, None
        if who.device.type == "cuda":
            memory = torch.cuda.max_memory_reserved(who.device)
        self.row = EndToEndRow(
            self.case.name,
            self.batch,
            who.who,
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
            note="; ".join(part for part in (note, how, failure) if part),
        )
        who.release()

    def short(self) -> list | str:
        """Latents after a few steps, or the beginning of an answer."""
        found = self.contender(self.case, self.batch, **self._short())
        return found if isinstance(found, str) else [result.latents.cpu() for result in found]

    def _short(self, longer: int = 0) -> dict:
        options = {"tokens": self.effort.tokens[0]} if self.case.tokens else {}
        if self.work.draws:
            options |= {"num_timesteps": self.effort.timesteps[longer]} | GUIDED
        return options

    def _costs(self) -> Iterator[Costs]:
        """Costs, the better the later."""
        case, batch, timed = self.case, self.batch, self.contender.seconds
        base, costs = self._short(), Costs()

        def slope(name, lengths, options):
            for _ in range(2):  # the first compiles; the second captures what ran once in the first
                self.contender(case, batch, **options | {name: lengths[0]})
            pairs = []
            while len(pairs) < 3 and sum(map(sum, pairs)) < PAIRS:
                pairs.append([timed(case, batch, **options | {name: length}) for length in lengths])
            short, long = map(min, zip(*pairs, strict=True))  # the least disturbed ones
            return max(long - short, 0.0) / (lengths[1] - lengths[0]), short

        if case.tokens:  # the KV cache takes its final size: growing it later would give up what was captured
            self.contender(case, batch, **base | {"tokens": case.tokens})
            yield costs
        if self.work.draws:
            guided, steps = self.work.guided_steps
            costs.guided, whole = slope("num_timesteps", self.effort.timesteps, base)
            costs.rest = whole - (self.effort.timesteps[0] - 1) * costs.guided
            yield costs
            if guided < steps:
                costs.plain, _ = slope("num_timesteps", self.effort.timesteps, base | PLAIN)
                yield costs
        if case.tokens:
            costs.token, whole = slope("tokens", self.effort.tokens, base)
            costs.rest = (costs.rest if self.work.draws else whole) - self.effort.tokens[0] * costs.token
        costs.rest = max(costs.rest, 0.0)
        yield costs

    def _timeline(self) -> tuple[Timeline, str]:
        """Of guided steps, or of tokens where nothing is drawn."""
        if self.work.draws:
            window = Window(self.contender.device, "image", 2, self.effort.timesteps[1] - 4)
            options = self._short(longer=1)
        else:
            window, options = Window(self.contender.device, "text", 9, 16), {"tokens": 27}
        try:
            self.contender(self.case, self.batch, progress=window, **options)
        except Exception as problem:  # a profiler that fails costs its figures only
            return window.result(), f"no timeline: {type(problem).__name__}: {problem}"
        return window.result(), window.failure and f"no timeline: {window.failure}"

    def _warming(self) -> dict:
        """The shortest request that captures all that the whole one replays: two steps of each kind it has."""
        texts = {"tokens": self.effort.tokens[0]} if self.case.tokens else {}
        if not self.work.draws:
            return texts

        def kinds(timesteps):
            settings = replace(self.work.settings, num_timesteps=timesteps)
            guided, steps = replace(self.work, settings=settings).guided_steps
            return guided, steps - guided

        lengths, all_kinds = range(3, self.case.timesteps), kinds(self.case.timesteps)
        enough = (n for n in lengths if all(k >= min(2, of) for k, of in zip(kinds(n), all_kinds, strict=True)))
        return texts | {"num_timesteps": next(enough, self.case.timesteps)}


def _compared(got: list | str, want: list | str | None, ours: bool) -> tuple[str, float | None]:
    """(note, error) of a short run's results beside ``eager``'s."""
    if want is None:
        return "", None
    if isinstance(got, str):
        return ("" if got == want else f"{'WRONG: ' if ours else ''}another text than eager's"), None
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))
    return ("WRONG: other latents than eager's" if ours and not error <= WRONG else ""), error


Task = tuple[str, str, int, Case]


def tasks(cases: Sequence[Case] = CASES, who: Sequence[str] = WHO, batches: Sequence[int] = (1, 4)) -> list[Task]:
    """(name, contender, batch, case) in order of worth: single requests, batches, then what is compiled.

    An answer is one request, and the official inferencer takes no more.
    """
    found = [
        (f"{case.name}, batch {batch}: {name}", name, batch, case)
        for compiled in (False, True)
        for batch in batches
        for case in cases
        for name in who
        if ("compiled" in name) == compiled and (batch == 1 or (case.task != "chat" and "official" not in name))
    ]
    return found


class EndToEnd:
    """Measures tasks over one model.

    Attributes:
        model, tokenizer: what runs.
        limits: flop/s and bytes/s of the device.
    """

    def __init__(
        self, model: BagelModel, tokenizer: Tokenizer, effort: Effort | None = None, compiler: Callable = torch.compile
    ):
        self.model, self.tokenizer, self.effort, self.compiler = model, tokenizer, effort or Effort(), compiler
        self.limits = ceilings(model.device)
        self._wanted: dict[tuple[str, int], list | str] = {}
        wake_profiler(model.device)

    def measure(self, task: Task) -> Iterator[dict]:
        """Empty dictionaries while it works, then the row."""
        _, who, batch, case = task
        work = case.workload(self.model, self.tokenizer, batch)
        limit = roofline.floor_seconds(work, self.limits)

        def measurement(name):
            contender = Contender(name, self.model, self.tokenizer, self.compiler)
            return Measurement(case, batch, contender, work, limit, self.effort)

        if (case.name, batch) not in self._wanted:
            eager = measurement("eager")
            self._wanted[case.name, batch] = eager.short()
            eager.contender.release()
            yield {}
        found = measurement(who)
        for _ in found.run(None if who == "eager" else self._wanted[case.name, batch]):
            yield {}
        yield asdict(found.row)


def table(rows: Sequence[EndToEndRow]) -> str:
    """Markdown: one line per case, batch and contender."""
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
Seconds are of the whole batch, picture included. Steps and tokens a second are of all requests of the batch, while they
are denoised or decoded. Launches and kernels are those of a guided step, or of a token where nothing is drawn; idle is
the share of that time in which the GPU ran nothing. The roofline leaves the autoencoder out. Relative L2 is of latents
after a few guided steps, beside ``eager``'s. The official inferencer takes one request at a time; its autoencoder here
is this runtime's."""


def _chosen(parser, option: str, given: str, known: Sequence) -> list:
    """The entries of a list with commas; wrong usage if one is not known."""
    by_name = {str(value): value for value in known}
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in by_name]:
        parser.error(f"{option}: there is no {unknown[0]}; allowed are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def main() -> None:
    """Measure, print the table, and write rows as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--tiny", action="store_true", help="a model of three narrow layers; runs on a CPU")
    parser.add_argument("--cases", metavar="LIST", default=",".join(names), help=f"default: {','.join(names)}")
    parser.add_argument("--who", metavar="LIST", default=",".join(WHO), help=f"default: {','.join(WHO)}")
    parser.add_argument("--batches", metavar="LIST", default="1,4", help="default: 1,4")
    parser.add_argument("--seconds", type=float, default=25.0, metavar="S", help="most of a whole run; default: 25")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows there too")
    arguments = parser.parse_args()
    cases = _chosen(parser, "--cases", arguments.cases, names)
    who = _chosen(parser, "--who", arguments.who, WHO)
    batches = _chosen(parser, "--batches", arguments.batches, range(1, 65))
    cuda = torch.cuda.is_available()
    if not (cuda or arguments.tiny):
        parser.exit(2, "end_to_end: error: PyTorch finds no CUDA device here; --tiny runs on a CPU\n")
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    config = THREE_LAYERS if arguments.tiny else BAGEL_7B_MOT
    known = TINY_CASES if arguments.tiny else CASES
    runs = EndToEnd(*random_model(config, device, dtype), Effort(seconds=arguments.seconds))
    rows, failed = [], []
    for task in tasks([case for case in known if case.name in cases], who, batches):
        try:
            rows += [EndToEndRow(**found) for found in runs.measure(task) if found]
        except Exception as problem:  # one contender must not hide the others
            failed.append(f"{task[0]}: {type(problem).__name__}: {problem}")
        print(failed[-1] if failed and failed[-1].startswith(task[0]) else rows[-1], file=sys.stderr, flush=True)
    if arguments.json:
        found = {"about": machine(device), "rows": finite([asdict(row) for row in rows]), "failed": failed}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{table(rows)}\n\n{EXPLANATION}")
    for line in failed:
        print(f"- {line}")
    ours = [line for line in failed if "official" not in line]
    parser.exit(bool(ours) or any(row.note.startswith("WRONG") for row in rows))


if __name__ == "__main__":
    main()
