"""One command that says how this package does on a GPU: right or wrong, fast or slow, beside whom.

    python -m benchmarks.gpu_check [--output FOLDER] [--minutes 9] [--stages check,tests,...]

Stages in order of worth; the results of all that is done so far are always in FOLDER/results.json and results.md, so a
run that is cut keeps what it has:

    build    the compiled planner, offline, where it is missing
    check    every kernel against its reference, as ``bagel-rt check``
    tests    the tests of the kernels, on the GPU
    kernels  every kernel at BAGEL's sizes beside its peers: time, share of the roofline, error
    forward  a denoising forward through a few layers at full width: kernels beside references
    tune     what is left of the time: better tile sizes, written beside the results, never into the table

Exit codes: 0 all is right; 1 something is wrong, failed or was not reached; 2 there is no GPU.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch

from bagel_rt.cli_report import finite
from benchmarks import report
from benchmarks.measure import ROOT, gpu_state, machine

TESTS = ("attention*", "decode_attention", "guidance", "linear", "norm", "qk_norm_rope")
SHARES = {"build": 0.06, "check": 0.17, "tests": 0.25, "kernels": 0.60, "forward": 0.5, "tune": 0.9}
"""Stage -> the most it may take of the time that is left when it begins."""
PATIENCE = 75.0
"""Seconds without a word from a worker after which its kernel counts as hanging. Compiling one takes a few."""


@dataclass
class Stage:
    """What came of a stage.

    Attributes:
        name: of the stage.
        rows: what it found, JSON-ready.
        notes: what went wrong, or was left out and why.
        seconds: how long it took.
        complete: whether it reached its end.
    """

    name: str
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False


def tell(process: subprocess.Popen, deadline: float, patience: float) -> Iterator[dict]:
    """What a worker says, until it ends, or is killed: {"killed": why} then comes last."""
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            wait = min(patience, deadline - time.monotonic())
            try:
                line = lines.get(timeout=max(wait, 0.01))
            except queue.Empty:
                late = time.monotonic() >= deadline
                yield {"killed": "the time was up" if late else f"nothing was heard of it for {patience:.0f} s"}
                return
            if line is None:
                return
            if line.startswith("{"):  # a library may print, too
                yield json.loads(line)
    finally:
        _end(process)


def _begin(command: list[str], **streams) -> subprocess.Popen:
    """Start a process that can be ended together with those that it starts."""
    return subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **streams)


def _end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a driver may hold it for longer
        process.wait(20)


def run_worker(
    stage: Stage, deadline: float, save: Callable[[], None], log: Path, command=None, patience=PATIENCE
) -> None:
    """Run the tasks of a stage; where a process dies or hangs, another one goes on behind the task that did it."""
    command = command or [sys.executable, "-m", "benchmarks.worker", stage.name]
    start = 0
    while True:
        with log.open("a") as errors:
            process = _begin([*command, "--from", str(start)], stdout=subprocess.PIPE, stderr=errors)
            task, begun, ended, killed = "its start", None, False, ""
            for message in tell(process, deadline, patience):
                if "begin" in message:
                    begun, task = message["begin"], message["task"]
                elif "row" in message:
                    stage.rows.append(message["row"])
                elif "failed" in message:
                    stage.notes.append(f"{task}: {message['failed']}")
                ended, killed = "done" in message, message.get("killed", "")
                save()
        if ended:
            stage.complete = True
            return
        if killed:
            stage.notes.append(f"stopped in {task}: {killed}")
        elif process.returncode != 3:  # 3 has been explained already
            stage.notes.append(f"{task}: the process ended with status {process.returncode}; see {log.name}")
        if begun is None or time.monotonic() >= deadline:
            return
        start = begun + 1
        save()


def build(stage: Stage, deadline: float, save, folder: Path) -> None:
    """Build the planner in the source tree, with what is installed."""
    command = [sys.executable, "-c", "from bagel_rt.plan import EXTENSION; raise SystemExit(EXTENSION is None)"]
    if subprocess.run(command, cwd=ROOT).returncode == 0:
        stage.rows.append({"what": "bagel_rt._C", "result": "was there"})
    else:
        with (folder / "build.log").open("w") as log:
            done = subprocess.run(
                [sys.executable, "setup.py", "build_ext", "--inplace"],
                cwd=ROOT, stdout=log, stderr=log, timeout=max(deadline - time.monotonic(), 1),
            )  # fmt: skip
        there = done.returncode == 0 and subprocess.run(command, cwd=ROOT).returncode == 0
        stage.rows.append({"what": "bagel_rt._C", "result": "built" if there else "not built, see build.log"})
    stage.complete = True


def tests(stage: Stage, deadline: float, save, folder: Path, patterns=TESTS) -> None:
    """The kernels' test files, each in a process of its own, all at once."""
    files = sorted(path for pattern in patterns for path in (ROOT / "tests").glob(f"test_{pattern}.py"))
    with tempfile.TemporaryDirectory() as logs:
        running = {}
        for file in files:
            output = open(Path(logs) / file.stem, "w")
            command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(file)]
            running[file] = _begin(command, stdout=output, stderr=output)
            output.close()
        for file, process in running.items():
            try:
                process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                _end(process)
                stage.notes.append(f"{file.name}: stopped, the time was up")
            text = (Path(logs) / file.stem).read_text(errors="replace")
            lines = text.splitlines()
            words = ("PASSED", "FAILED", "ERROR", "SKIPPED")
            counts = {word.lower(): sum("::" in line and f" {word} " in f"{line} " for line in lines) for word in words}
            if process.returncode != 0:
                with (folder / "tests.log").open("a") as log:
                    log.write(text)
            stage.rows.append({"file": file.name, **counts, "status": process.returncode})
            save()
    stage.complete = True


def tune(stage: Stage, deadline: float, save, folder: Path) -> None:
    """``benchmarks.tune`` for as long as it may run; it writes beside the results."""
    command = [sys.executable, "-m", "benchmarks.tune", "--output", str(folder / "tuned.json")]
    with (folder / "tune.log").open("w") as log:
        process = _begin(command, stdout=log, stderr=log)
        try:
            status = process.wait(max(deadline - time.monotonic(), 0.01))
            stage.complete, told = status == 0, f"status {status}"
        except subprocess.TimeoutExpired:
            told = "stopped, the time was up"
        finally:
            _end(process)
    stage.rows.append({"what": "benchmarks.tune", "result": f"{told}; see tuned.json and tune.log"})


def _worker(stage: Stage, deadline: float, save, folder: Path) -> None:
    run_worker(stage, deadline, save, folder / "workers.log")


STAGES: dict[str, Callable] = {
    "build": build, "check": _worker, "tests": tests, "kernels": _worker, "forward": _worker, "tune": tune,
}  # fmt: skip


def save_results(folder: Path, about: dict, stages: list[Stage]) -> None:
    """Write results.json and results.md, each replaced as a whole."""
    found = {"about": about, "stages": [finite(vars(stage)) for stage in stages]}
    texts = {"results.json": json.dumps(found, indent=1), "results.md": report.markdown_report(about, stages)}
    for name, text in texts.items():
        partial = folder / f".{name}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, folder / name)


def run(
    folder: Path, minutes: float, names: list[str], device: torch.device, commit: str = "", stages=STAGES
) -> list[Stage]:
    """Run stages by name, in order, within ``minutes``; write after each what all of them found."""
    folder.mkdir(parents=True, exist_ok=True)
    end, about, found = time.monotonic() + 60 * minutes, machine(device), []
    about |= {"commit": commit} if commit else {}
    for name in names:
        stage = Stage(name)
        found.append(stage)
        begun, left = time.monotonic(), end - time.monotonic()
        last_saved = [0.0]

        def save(stage=stage, begun=begun, last_saved=last_saved):
            stage.seconds = time.monotonic() - begun
            if time.monotonic() - last_saved[0] > 2:
                save_results(folder, about, found)
                last_saved[0] = time.monotonic()

        try:
            if left > 5:
                stages[name](stage, begun + SHARES[name] * left, save, folder)
            else:
                stage.notes.append("not reached, the time was up")
        except Exception as problem:  # a stage must not take the others with it
            stage.notes.append(f"{type(problem).__name__}: {problem}")
        stage.seconds = time.monotonic() - begun
        about[f"gpu after {name}"] = gpu_state(device)
        save_results(folder, about, found)
        print(report.summary(stage), flush=True)
    return found


def main() -> None:
    """Run the stages on the first GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "benchmarks" / "results" / f"gpu-{date.today()}"
    parser.add_argument(
        "--output", type=Path, default=default, metavar="FOLDER", help="default: benchmarks/results/gpu-DATE"
    )
    parser.add_argument("--minutes", type=float, default=9.0, metavar="M", help="for everything; default: 9")
    parser.add_argument("--stages", default=",".join(STAGES), metavar="LIST", help=f"default: {','.join(STAGES)}")
    parser.add_argument("--commit", default="", metavar="HASH", help="where the tree is a copy without .git")
    arguments = parser.parse_args()
    names = arguments.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"--stages: there is no {', '.join(unknown)}")
    if not torch.cuda.is_available():
        parser.exit(2, "gpu_check: error: PyTorch finds no CUDA device here; on a CPU run pytest instead\n")
    found = run(arguments.output.resolve(), arguments.minutes, names, torch.device("cuda:0"), arguments.commit)
    print((arguments.output / "results.md").read_text())
    parser.exit(any(report.problems(stage) for stage in found))


if __name__ == "__main__":
    main()
