"""Check a GPU in one run: correctness of every kernel, and its speed against each peer.

    python -m benchmarks.gpu_check [--output FOLDER] [--minutes 9] [--stages check,tests,...]

Stages run in order of importance. FOLDER/results.json and results.md are rewritten while they run, so an interrupted
run keeps its results:

    build       build the extension offline if it is missing
    check       every kernel against its reference, as ``bagel-rt check``
    tests       conformance to the official code with the kernels, then each kernel's tests, on the GPU
    kernels     every kernel at BAGEL's sizes against its peers: time, share of the roofline, error
    forward     a denoising forward through a few full-width layers: kernels against references
    end_to_end  whole requests with random weights at full size, against the official composition
    sanitize    tests of the extension's kernels under compute-sanitizer, if it is installed
    tune        tile sizes, in the remaining time; written next to the results, never into the shipped table

Exit codes: 0 no problems (the last line lists stages that ran out of time); 1 a wrong result, or a failed kernel or
test; 2 no GPU.
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
from benchmarks.worker import DEVICE_LOST, PEER_SUFFIXES

TESTS = ("conformance_kernels", "attention*", "decode_*", "group_norm", "guidance", "linear", "norm", "qk_norm_rope",
         "sample", "graphs", "ops_registration", "backend")  # fmt: skip
SANITIZED = ("decode_linear", "decode_qkv", "decode_attention", "sample")
TIME_SHARES = {"build": 0.25, "check": 0.17, "tests": 0.25, "kernels": 0.45, "forward": 0.3, "end_to_end": 0.75,
               "sanitize": 0.6, "tune": 0.9}  # fmt: skip
"""Stage -> maximum share of the time that remains when it starts."""
OUT_OF_TIME = "stopped: time limit reached"
TUNE_EXIT_GRACE = 15.0
"""Seconds that ``benchmarks.tune`` gets to exit by itself after its deadline, before it is killed."""
HANG_TIMEOUT = 75.0
"""Seconds without output after which a worker counts as hung. Compiling a kernel takes a few."""


@dataclass
class Stage:
    """Results of one stage.

    Attributes:
        name: key in ``STAGES``.
        rows: results, JSON-safe.
        notes: failures.
        remarks: incidents not caused by this package: time limits and failures of peers.
        seconds: duration.
        complete: whether all of it ran.
    """

    name: str
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False


def read_messages(process: subprocess.Popen, deadline: float, patience: float) -> Iterator[dict]:
    """Yield a worker's messages until it exits, then kill its process group.

    A worker that is silent for ``patience`` seconds or runs past ``deadline`` (``time.monotonic``) is killed. The last
    message is then {"killed": reason, "late": whether it was the deadline}.
    """
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    # A blocking readline has no timeout, so a thread reads and this generator waits on the queue.
    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            wait = min(patience, deadline - time.monotonic())
            try:
                line = lines.get(timeout=max(wait, 0.01))
            except queue.Empty:
                late = time.monotonic() >= deadline
                yield {"killed": OUT_OF_TIME if late else f"stopped: no output for {patience:.0f} s", "late": late}
                return
            if line is None:
                return
            with suppress(ValueError):  # libraries may print to stdout too
                if isinstance(message := json.loads(line), dict):
                    yield message
    finally:
        _kill(process)


_RUNNING: set[subprocess.Popen] = set()


def _spawn(command: list[str], added: dict[str, str] | None = None, **streams) -> subprocess.Popen:
    """Start a process in its own session, so that :func:`_kill` reaches its children too.

    ``added`` is added to the environment. BAGEL_RT_BACKEND is removed: it would override the choice of kernels.
    """
    environment = {name: value for name, value in os.environ.items() if name != "BAGEL_RT_BACKEND"} | (added or {})
    process = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, env=environment, **streams)
    _RUNNING.add(process)
    return process


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # the driver can delay the exit of a killed process
        process.wait(20)
    _RUNNING.discard(process)


def _exit_status(
    command: list[str], deadline: float, log: TextIO | None = None, added: dict[str, str] | None = None
) -> int | None:
    """Run a process and return its exit status, or None if it was killed at the deadline."""
    process = _spawn(command, added, stdout=log, stderr=log)
    try:
        return process.wait(max(deadline - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _kill(process)


def kill_all() -> None:
    """Kill every process that still runs, so that none holds the GPU after the run."""
    for process in list(_RUNNING):
        _kill(process)


def exit_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into SystemExit, so that every ``finally`` runs and child processes are killed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))


def run_worker(
    stage: Stage, deadline: float, save: Callable[[], None], log: Path, command=None, patience=HANG_TIMEOUT
) -> None:
    """Run the tasks of a stage in worker processes.

    When a worker crashes or hangs, a new one continues with the next task. The failure is a note, or a remark if the
    task was running a peer: either its name has a peer suffix, or it has already reported this package's row.
    """
    command = command or [sys.executable, "-m", "benchmarks.worker", stage.name]
    start = 0
    while True:
        with log.open("a") as errors:
            process = _spawn([*command, "--from", str(start)], stdout=subprocess.PIPE, stderr=errors)
            task, begun, message, failures = "startup", None, {}, stage.notes
            for message in read_messages(process, deadline, patience):
                if "begin" in message:
                    begun, task = message["begin"], message["task"]
                    failures = stage.remarks if task.endswith(PEER_SUFFIXES) else stage.notes
                elif "row" in message:
                    stage.rows.append(message["row"])
                    if message["row"].get("who") == kernels.OURS:  # the rest of the task runs peers
                        failures = stage.remarks
                elif "failed" in message:
                    failures.append(f"{task}: {message['failed']}")
                save()
        if "done" in message:
            stage.complete = True
            return
        if "killed" in message:
            (stage.remarks if message["late"] else failures).append(f"{task}: {message['killed']}")
        elif process.returncode != DEVICE_LOST:  # a lost device was reported as "failed"
            failures.append(f"{task}: the worker exited with status {process.returncode}; see {log.name}")
        if begun is None or time.monotonic() >= deadline:
            return
        start = begun + 1
        save()


def build(stage: Stage, deadline: float, save, folder: Path) -> None:
    """Build the extension in the source tree with the installed tools. The other stages run without it too."""
    has_cuda_kernels = (
        "from bagel_rt.kernels.extension import EXTENSION; raise SystemExit(not getattr(EXTENSION, 'has_cuda', 0))"
    )
    command = [sys.executable, "-c", has_cuda_kernels]
    result = "already built"
    if _exit_status(command, deadline) != 0:
        with (folder / "build.log").open("w") as log:
            built = _exit_status([sys.executable, "setup.py", "build_ext", "--inplace"], deadline, log)
        result = "not built, see build.log"
        if built == 0:
            has_cuda = _exit_status(command, deadline) == 0
            result = "built" if has_cuda else "built without CUDA kernels, see build.log"
    stage.rows.append({"what": "bagel_rt._C", "result": result})
    stage.complete = True


def run_tests(stage: Stage, deadline: float, save, folder: Path, patterns=TESTS) -> None:
    """Run the kernels' test files concurrently, each in its own process."""
    files = [path for pattern in patterns for path in sorted((ROOT / "tests").rglob(f"test_{pattern}.py"))]
    with tempfile.TemporaryDirectory() as logs:
        running = {}
        for file in files:
            command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(file)]
            with open(Path(logs) / file.stem, "w") as output:
                running[file] = _spawn(command, stdout=output, stderr=output)
        for file, process in running.items():
            try:
                status = process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                status = None
                stage.remarks.append(f"{file.name}: {OUT_OF_TIME}")
            _kill(process)
            text = (Path(logs) / file.stem).read_text(errors="replace")
            lines = text.splitlines()
            outcomes = ("PASSED", "FAILED", "ERROR", "SKIPPED")
            counts = {
                outcome.lower(): sum("::" in line and f" {outcome} " in f"{line} " for line in lines)
                for outcome in outcomes
            }
            if status != 0:
                with (folder / "tests.log").open("a") as log:
                    log.write(text)
            stage.rows.append({"file": file.name, **counts, "status": status})
            save()
    stage.complete = not stage.remarks


def sanitizer() -> str | None:
    """Path of compute-sanitizer, or None if it is not installed."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def sanitize(stage: Stage, deadline: float, save, folder: Path, names=SANITIZED) -> None:
    """Run the extension's tests under memcheck, one file at a time; the output goes to sanitize.log."""
    tool = sanitizer()
    if tool is None:
        stage.remarks.append("compute-sanitizer was not found. It is part of the CUDA toolkit.")
        return
    for name in names:
        (file,) = (ROOT / "tests").rglob(f"test_{name}.py")
        path = folder / "sanitize.log"
        command = [tool, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "99",
                   sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]  # fmt: skip
        with path.open("a+") as log:
            start = log.seek(0, os.SEEK_END)
            # Without caching, every tensor has its own allocation. Memcheck sees only allocations, so it would miss an
            # out-of-bounds access that stays inside one of the allocator's cached blocks.
            status = _exit_status(command, deadline, log, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            log.seek(start)
            errors = re.findall(r"ERROR SUMMARY: (\d+) error", log.read())
        count = sum(map(int, errors)) if errors else None
        stage.rows.append({"file": file.name, "errors": count, "status": status, "result": _sanitize_result(status)})
        if status is None:
            stage.remarks.append(f"{file.name}: {OUT_OF_TIME}")
            return
        save()
    stage.complete = True


def _sanitize_result(status: int | None) -> str:
    results = {0: "clean", 1: "a test failed", 99: "memory errors, see sanitize.log", None: OUT_OF_TIME}
    return results.get(status, f"exit status {status}, see sanitize.log")


def tune(stage: Stage, deadline: float, save, folder: Path) -> None:
    """Run ``benchmarks.tune`` until the deadline; it writes tuned.json next to the results."""
    minutes = f"{max(deadline - time.monotonic(), 0) / 60:.2f}"
    command = [sys.executable, "-m", "benchmarks.tune", "--output", str(folder / "tuned.json"), "--minutes", minutes]
    with (folder / "tune.log").open("w") as log:
        status = _exit_status(command, deadline + TUNE_EXIT_GRACE, log)
    stage.complete, result = status == 0, OUT_OF_TIME if status is None else f"status {status}"
    stage.rows.append({"what": "benchmarks.tune", "result": f"{result}; see tuned.json and tune.log"})


def _worker(stage: Stage, deadline: float, save, folder: Path) -> None:
    run_worker(stage, deadline, save, folder / "workers.log")


STAGES: dict[str, Callable] = {
    "build": build, "check": _worker, "tests": run_tests, "kernels": _worker, "forward": _worker, "end_to_end": _worker,
    "sanitize": sanitize, "tune": tune,
}  # fmt: skip


def save_results(folder: Path, about: dict, stages: list[Stage]) -> None:
    """Write results.json, then results.md, each atomically. A failure to render tables does not end the run."""

    def write(name, text):
        with atomic_write(folder / name) as file:
            file.write((text + "\n").encode())

    results = {"about": about, "stages": [finite(vars(stage)) for stage in stages]}
    write("results.json", json.dumps(results, indent=1))
    try:
        text = report.markdown_report(about, stages)
    except Exception as error:  # results.json is complete
        text = f"# GPU check\n\nRendering tables failed: {type(error).__name__}: {error}\nSee results.json."
    write("results.md", text)


def run(
    folder: Path, minutes: float, names: list[str], device: torch.device, commit: str = "", stages=STAGES
) -> list[Stage]:
    """Run the named stages in order within ``minutes``.

    Each stage gets the share ``TIME_SHARES`` of the time that remains when it starts, so that an early stage cannot
    consume all of it, and time that a stage does not use goes to the later ones. Results are saved after each stage,
    and at most every two seconds while it runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end, about, results = time.monotonic() + 60 * minutes, machine(device), []
    about |= {"commit": commit} if commit else {}
    for name in names:
        stage = Stage(name)
        results.append(stage)
        begun, left = time.monotonic(), end - time.monotonic()
        last_saved = [0.0]

        def save(stage=stage, begun=begun, last_saved=last_saved):
            stage.seconds = time.monotonic() - begun
            if time.monotonic() - last_saved[0] > 2:
                save_results(folder, about, results)
                last_saved[0] = time.monotonic()

        try:
            if left > 5:
                stages[name](stage, begun + TIME_SHARES[name] * left, save, folder)
            else:
                stage.remarks.append("not started: time limit reached")
        except Exception as error:  # the remaining stages still run
            stage.notes.append(f"{type(error).__name__}: {error}")
        finally:
            kill_all()
        stage.seconds = time.monotonic() - begun
        about[f"gpu after {name}"] = gpu_state(device)
        save_results(folder, about, results)
        print(report.summary(stage), flush=True)
    return results


def main() -> None:
    """Run the stages on the first GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "benchmarks" / "results" / f"gpu-{date.today()}"
    parser.add_argument(
        "--output", type=Path, default=default, metavar="FOLDER", help="default: benchmarks/results/gpu-DATE"
    )
    parser.add_argument("--minutes", type=float, default=9.0, metavar="M", help="total time limit; default: 9")
    parser.add_argument("--stages", default=",".join(STAGES), metavar="LIST", help=f"default: {','.join(STAGES)}")
    parser.add_argument("--commit", default="", metavar="HASH", help="commit to record if there is no .git")
    arguments = parser.parse_args()
    names = arguments.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"--stages must be from {', '.join(STAGES)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        parser.exit(2, "gpu_check: error: PyTorch found no CUDA device. On a CPU run pytest instead.\n")
    exit_on_signals()
    stages = run(arguments.output.resolve(), arguments.minutes, names, torch.device("cuda:0"), arguments.commit)
    print((arguments.output / "results.md").read_text())
    print(report.verdict(stages))
    parser.exit(any(report.problems(stage) for stage in stages))


if __name__ == "__main__":
    main()
