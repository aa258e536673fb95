"""The GPU check's end_to_end, sanitize and build stages on a CPU."""

import functools
import json
import stat
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import end_to_end, gpu_check, measure, report, worker
from benchmarks.end_to_end import EndToEndRow
from benchmarks.gpu_check import Stage
from benchmarks.random_model import THREE_LAYERS
from benchmarks.runners import TINY_CASES

CPU = torch.device("cpu")
CASES = tuple(replace(case, size=(32, 32), timesteps=6, tokens=case.tokens and 28) for case in TINY_CASES)


def deadline(seconds=60):
    return time.monotonic() + seconds


# Whole requests


def end_to_end_tasks(**options):
    return worker.end_to_end_tasks(CPU, THREE_LAYERS, CASES, torch.float32, **options)


def test_end_to_end_tasks_share_one_model(monkeypatch):
    options = functools.partial(end_to_end.MeasureOptions, timesteps=(3, 6), tokens=(2, 4))
    monkeypatch.setattr(end_to_end, "MeasureOptions", options)
    models, random_model = [], worker.random_model
    monkeypatch.setattr(worker, "random_model", lambda *arguments: models.append(arguments) or random_model(*arguments))
    by_name, messages = dict(end_to_end_tasks()), []
    assert models == [], "the first task to run creates the model"
    tasks = [(name, by_name[name]) for name in ("text-to-image, batch 1: graphs", "chat with an image, batch 1: eager")]
    assert worker.work(tasks, 0, messages.append) == 0 and len(models) == 1
    rows = [message["row"] for message in messages if "row" in message]
    assert [row["who"] for row in rows] == ["graphs", "eager"]
    assert ["measured in full" in row["note"] for row in rows] == [True, False], "only graphs runs the full request"
    assert {"working": 0} in messages and {"working": 1} in messages and messages[-1] == {"done": True}
    json.dumps(messages)


def test_official_tasks_have_a_peer_suffix():
    names = [name for name, _ in end_to_end_tasks()]
    assert len(names) == len(set(names))
    assert [name.endswith(worker.PEER_SUFFIXES) for name in names] == ["official" in name for name in names]


PEER_SCRIPT = """
import json, os, sys
tasks = ["ours", "theirs (peer)"]
for number in range(int(sys.argv[2]), 2):
    print(json.dumps({"begin": number, "task": tasks[number]}), flush=True)
    print(json.dumps({"working": number}), flush=True)
    print(json.dumps({"failed": "out of memory"}), flush=True)
print(json.dumps({"done": True}), flush=True)
"""


def test_failure_of_a_peer_is_a_remark(tmp_path):
    stage, command = Stage("end_to_end"), [sys.executable, "-c", PEER_SCRIPT]
    gpu_check.run_worker(stage, deadline(), lambda: None, tmp_path / "log", command)
    assert stage.complete and stage.rows == []
    assert stage.notes == ["ours: out of memory"] and stage.remarks == ["theirs (peer): out of memory"]


def test_end_to_end_table_and_problems():
    right = EndToEndRow("edit", 1, "eager", 2.0, 1.0, note="measured in full")
    wrong = replace(right, who="graphs", error=0.5, note="WRONG: latents differ from eager; measured in full")
    stage = Stage("end_to_end", [asdict(right), asdict(wrong)], complete=True)
    assert report.problems(stage) == ["edit, batch 1, graphs: WRONG: latents differ from eager; measured in full"]
    text = report.markdown_report({}, [stage])
    assert "| edit | 1 | graphs | 2.00 |" in text and "of roofline" in text
    assert "problems in end_to_end" in report.verdict([stage])


# The sanitizer

TOOL = """#!{python}
import os, subprocess, sys
assert sys.argv[1:3] == ["--tool", "memcheck"] and os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
code = sys.argv[sys.argv.index("--error-exitcode") + 1]
status = subprocess.call(sys.argv[sys.argv.index(sys.executable):])
broken = "broken" in sys.argv[-1]
print("========= ERROR SUMMARY: 3 errors" if broken else "========= ERROR SUMMARY: 0 errors")
sys.exit(int(code) if broken else status)
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A fake compute-sanitizer that runs its command and reports errors in files named broken."""
    path = tmp_path / "bin" / "compute-sanitizer"
    path.parent.mkdir()
    path.write_text(TOOL.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tests = tmp_path / "tests"
    tests.mkdir()
    for name, body in (("fine", "pass"), ("broken", "pass"), ("failing", "assert 0"), ("slow", "time.sleep(100)")):
        (tests / f"test_{name}.py").write_text(f"import time\ndef test_it(): {body}\n")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tests))
    return path


@pytest.mark.slow
def test_sanitizer_distinguishes_memory_errors_from_failing_tests(tool, tmp_path):
    assert gpu_check.sanitizer() == str(tool)
    stage = Stage("sanitize")
    gpu_check.sanitize(stage, deadline(), lambda: None, tmp_path, ("fine", "broken", "failing"))
    assert [(row["errors"], row["status"], row["result"]) for row in stage.rows] == [
        (0, 0, "clean"),
        (3, 99, "memory errors, see sanitize.log"),
        (0, 1, "a test failed"),
    ]
    assert stage.complete and report.problems(stage) == [
        "test_broken.py: memory errors, see sanitize.log",
        "test_failing.py: a test failed",
    ]
    assert "assert 0" in (tmp_path / "sanitize.log").read_text()
    assert "memory errors" in report.markdown_report({}, [stage])


def test_sanitize_stops_at_deadline(tool, tmp_path):
    stage = Stage("sanitize")
    gpu_check.sanitize(stage, deadline(2), lambda: None, tmp_path, ("slow", "fine"))
    assert stage.remarks == ["test_slow.py: stopped: time limit reached"] and len(stage.rows) == 1
    assert not stage.complete and not report.problems(stage)


def test_missing_sanitizer_is_a_remark(tool, tmp_path):
    tool.unlink()
    if gpu_check.sanitizer() is not None:
        pytest.skip("the installed CUDA toolkit has compute-sanitizer")
    stage = Stage("sanitize")
    gpu_check.sanitize(stage, deadline(), lambda: None, tmp_path)
    assert "compute-sanitizer was not found" in stage.remarks[0] and not stage.complete
    assert not report.problems(stage) and report.verdict([stage]).endswith("incomplete: sanitize")


def test_sanitized_test_files_exist():
    assert all(len(list((measure.ROOT / "tests").rglob(f"test_{name}.py"))) == 1 for name in gpu_check.SANITIZED)


# Time shares and build


def test_every_stage_has_a_time_share():
    assert list(gpu_check.STAGES) == list(gpu_check.TIME_SHARES)
    assert set(worker.STAGES) < set(gpu_check.STAGES)
    assert all(0 < share < 1 for share in gpu_check.TIME_SHARES.values())


@pytest.mark.parametrize(
    "codes, result",
    [([1, 0, 1], "built without CUDA kernels, see build.log"), ([1, 2], "not built, see build.log")],
    ids=["no nvcc", "no compiler at all"],
)
def test_extension_without_cuda_kernels_is_rebuilt(codes, result, tmp_path, monkeypatch):
    codes = iter(codes)
    monkeypatch.setattr(gpu_check, "_exit_status", lambda *_: next(codes))
    stage = Stage("build")
    gpu_check.build(stage, deadline(), lambda: None, tmp_path)
    assert stage.rows == [{"what": "bagel_rt._C", "result": result}] and not list(codes)
