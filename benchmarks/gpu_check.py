"""One command that says how this package does on a GPU: right or wrong, fast or slow, beside whom.

    python -m benchmarks.gpu_check [--output FOLDER] [--minutes 9] [--stages check,tests,...]

Stages in order of worth; the results of all that is done so far are always in FOLDER/results.json and results.md, so a
run that is cut keeps what it has:

    build       the extension, offline, where it is missing
    check       every kernel against its reference, as ``bagel-rt check``
    tests       recorded behaviour of the official code with the kernels, then the tests of each, on the GPU
    kernels     every kernel at BAGEL's sizes beside its peers: time, share of the roofline, error
    forward     a denoising forward through a few layers at full width: kernels beside references
    end_to_end  whole requests with random weights at full size, beside the official composition
    sanitize    the tests of the extension's kernels under compute-sanitizer, where that is installed
    tune        what is left of the time: better tile sizes, written beside the results, never into the table

Exit codes: 0 nothing is wrong, though a run out of time may be cut, which its last line says; 1 a result is wrong, or
a kernel or a test failed; 2 there is no GPU.
"""

import argparse
import json
import os
import queue
import re
import shutil
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
from typing import TextIO

import torch

from bagel_rt.cli.report import finite
from bagel_rt.files import atomic_write
from benchmarks import kernels, report
from benchmarks.measure import ROOT, gpu_state, machine
from benchmarks.worker import DEVICE_LOST, OTHERS

TESTS = ("conformance_kernels", "attention*", "decode_*", "group_norm", "guidance", "linear", "norm", "qk_norm_rope",
         "sample", "graphs", "ops_registration", "backend")  # fmt: skip
SANITIZED = ("decode_linear", "decode_qkv", "decode_attention", "sample")
SHARES = {"build": 0.25, "check": 0.17, "tests": 0.25, "kernels": 0.45, "forward": 0.3, "end_to_end": 0.75,
          "sanitize": 0.6, "tune": 0.9}  # fmt: skip
"""Stage -> the most it may take of the time that is left when it begins."""
OUT_OF_TIME = "stopped, the time was up"
GRACE = 15.0
"""Seconds that ``benchmarks.tune`` may take to end by itself."""
PATIENCE = 75.0
"""Seconds without a word from a worker after which its kernel counts as hanging. Compiling one takes a few."""


@dataclass
class Stage:
    """What came of a stage.

    Attributes:
        name: of the stage.
        rows: what it found, JSON-ready.
        notes: what went wrong.
        remarks: what is no fault of this package: cut by the time, or a peer's failure.
        seconds: how long it took.
        complete: whether it reached its end.
    """

    name: str
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
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
                yield {"killed": OUT_OF_TIME if late else f"stopped, nothing was heard of it for {patience:.0f} s",
                       "late": late}  # fmt: skip
                return
            if line is None:
                return
            with suppress(ValueError):  # a library may print, too
                if isinstance(message := json.loads(line), dict):
                    yield message
    finally:
        _end(process)


_RUNNING: set[subprocess.Popen] = set()


def _begin(command: list[str], added: dict[str, str] | None = None, **streams) -> subprocess.Popen:
    """Start a process that can be ended together with those that it starts; which backend runs is left to it.

    ``added`` are variables of its environment.
    """
    environment = {name: value for name, value in os.environ.items() if name != "BAGEL_RT_BACKEND"} | (added or {})
    process = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, env=environment, **streams)
    _RUNNING.add(process)
    return process


def _end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a driver may hold it for longer
        process.wait(20)
    _RUNNING.discard(process)


def _status(
    command: list[str], deadline: float, log: TextIO | None = None, added: dict[str, str] | None = None
) -> int | None:
    """Run a process: its exit status, or None if it was ended because the time was up."""
    process = _begin(command, added, stdout=log, stderr=log)
    try:
        return process.wait(max(deadline - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def end_all() -> None:
    """End every process that still runs: nothing shall hold the GPU when a run is over."""
    for process in list(_RUNNING):
        _end(process)


def end_when_terminated() -> None:
    """Let SIGTERM and SIGHUP end this process as an exception does, by way of every ``finally``."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))


def run_worker(
    stage: Stage, deadline: float, save: Callable[[], None], log: Path, command=None, patience=PATIENCE
) -> None:
    """Run the tasks of a stage; where a process dies or hangs, another one goes on behind the task that did it."""
    command = command or [sys.executable, "-m", "benchmarks.worker", stage.name]
    start = 0
    while True:
        with log.open("a") as errors:
            process = _begin([*command, "--from", str(start)], stdout=subprocess.PIPE, stderr=errors)
            task, begun, message, blame = "its start", None, {}, stage.notes
            for message in tell(process, deadline, patience):
                if "begin" in message:
                    begun, task = message["begin"], message["task"]
                    blame = stage.remarks if task.endswith(OTHERS) else stage.notes
                elif "row" in message:
                    stage.rows.append(message["row"])
                    if message["row"].get("who") == kernels.OURS:  # what follows in this task is about peers
                        blame = stage.remarks
                elif "failed" in message:
                    blame.append(f"{task}: {message['failed']}")
                save()
        if "done" in message:
            stage.complete = True
            return
        if "killed" in message:
            (stage.remarks if message["late"] else blame).append(f"{task}: {message['killed']}")
        elif process.returncode != DEVICE_LOST:  # which has been explained already
            blame.append(f"{task}: the process ended with status {process.returncode}; see {log.name}")
        if begun is None or time.monotonic() >= deadline:
            return
        start = begun + 1
        save()


def build(stage: Stage, deadline: float, save, folder: Path) -> None:
    """Build the extension in the source tree, with what is installed; without it Python plans and Triton decodes."""
    question = (
        "from bagel_rt.kernels.extension import EXTENSION; raise SystemExit(not getattr(EXTENSION, 'has_cuda', 0))"
    )
    command = [sys.executable, "-c", question]
    result = "was there"
    if _status(command, deadline) != 0:
        with (folder / "build.log").open("w") as log:
            built = _status([sys.executable, "setup.py", "build_ext", "--inplace"], deadline, log)
        result = "not built, see build.log"
        if built == 0:
            has_cuda = _status(command, deadline) == 0
            result = "built" if has_cuda else "built without CUDA kernels, see build.log"
    stage.rows.append({"what": "bagel_rt._C", "result": result})
    stage.complete = True


def tests(stage: Stage, deadline: float, save, folder: Path, patterns=TESTS) -> None:
    """The kernels' test files, each in a process of its own, all at once."""
    files = [path for pattern in patterns for path in sorted((ROOT / "tests").rglob(f"test_{pattern}.py"))]
    with tempfile.TemporaryDirectory() as logs:
        running = {}
        for file in files:
            output = open(Path(logs) / file.stem, "w")
            command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(file)]
            running[file] = _begin(command, stdout=output, stderr=output)
            output.close()
        for file, process in running.items():
            try:
                status = process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                status = None
                stage.remarks.append(f"{file.name}: {OUT_OF_TIME}")
            _end(process)
            text = (Path(logs) / file.stem).read_text(errors="replace")
            lines = text.splitlines()
            words = ("PASSED", "FAILED", "ERROR", "SKIPPED")
            counts = {word.lower(): sum("::" in line and f" {word} " in f"{line} " for line in lines) for word in words}
            if status != 0:
                with (folder / "tests.log").open("a") as log:
                    log.write(text)
            stage.rows.append({"file": file.name, **counts, "status": status})
            save()
    stage.complete = not stage.remarks


def sanitizer() -> str | None:
    """Where compute-sanitizer is; None if it is not installed."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(place, "bin") for place in places if place]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def sanitize(stage: Stage, deadline: float, save, folder: Path, names=SANITIZED) -> None:
    """The extension's tests under memcheck, one file after another; what the tool says is in sanitize.log."""
    tool = sanitizer()
    if tool is None:
        stage.remarks.append("compute-sanitizer was not found; it comes with the CUDA toolkit")
        return
    for name in names:
        (file,) = (ROOT / "tests").rglob(f"test_{name}.py")
        path = folder / "sanitize.log"
        command = [tool, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "99",
                   sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]  # fmt: skip
        with path.open("a+") as log:
            start = log.seek(0, os.SEEK_END)
            # Blocks of its own for every tensor: inside a cached one nothing is out of bounds.
            status = _status(command, deadline, log, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            log.seek(start)
            errors = re.findall(r"ERROR SUMMARY: (\d+) error", log.read())
        found = sum(map(int, errors)) if errors else None
        stage.rows.append({"file": file.name, "errors": found, "status": status, "result": _sanitized(status)})
        if status is None:
            stage.remarks.append(f"{file.name}: {OUT_OF_TIME}")
            return
        save()
    stage.complete = True


def _sanitized(status: int | None) -> str:
    words = {0: "clean", 1: "a test failed", 99: "errors of memory, see sanitize.log", None: OUT_OF_TIME}
    return words.get(status, "ended, see sanitize.log")


def tune(stage: Stage, deadline: float, save, folder: Path) -> None:
    """``benchmarks.tune`` for as long as it may run; it writes beside the results."""
    minutes = f"{max(deadline - time.monotonic(), 0) / 60:.2f}"
    command = [sys.executable, "-m", "benchmarks.tune", "--output", str(folder / "tuned.json"), "--minutes", minutes]
    with (folder / "tune.log").open("w") as log:
        status = _status(command, deadline + GRACE, log)
    stage.complete, told = status == 0, OUT_OF_TIME if status is None else f"status {status}"
    stage.rows.append({"what": "benchmarks.tune", "result": f"{told}; see tuned.json and tune.log"})


def _worker(stage: Stage, deadline: float, save, folder: Path) -> None:
    run_worker(stage, deadline, save, folder / "workers.log")


STAGES: dict[str, Callable] = {
    "build": build, "check": _worker, "tests": tests, "kernels": _worker, "forward": _worker, "end_to_end": _worker,
    "sanitize": sanitize, "tune": tune,
}  # fmt: skip


def save_results(folder: Path, about: dict, stages: list[Stage]) -> None:
    """Write results.json, then results.md, each replaced as a whole. A table that cannot be made costs only itself."""

    def write(name, text):
        with atomic_write(folder / name) as file:
            file.write((text + "\n").encode())

    found = {"about": about, "stages": [finite(vars(stage)) for stage in stages]}
    write("results.json", json.dumps(found, indent=1))
    try:
        text = report.markdown_report(about, stages)
    except Exception as problem:  # what was measured is safe, and the run goes on
        text = f"# GPU check\n\nresults.json has everything; no tables: {type(problem).__name__}: {problem}"
    write("results.md", text)


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
                stage.remarks.append("not reached, the time was up")
        except Exception as problem:  # a stage must not take the others with it
            stage.notes.append(f"{type(problem).__name__}: {problem}")
        finally:
            end_all()
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
    end_when_terminated()
    found = run(arguments.output.resolve(), arguments.minutes, names, torch.device("cuda:0"), arguments.commit)
    print((arguments.output / "results.md").read_text())
    print(report.verdict(found))
    parser.exit(any(report.problems(stage) for stage in found))


if __name__ == "__main__":
    main()
