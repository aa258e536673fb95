"""The GPU check on a CPU: workers, stages and result files survive crashes, hangs and time limits."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import DEVICE

from bagel_rt.check import run as check
from bagel_rt.kernels import rms_norm
from benchmarks import forward, gpu_check, kernels, measure, report, worker
from benchmarks.gpu_check import Stage
from benchmarks.workloads import WORKLOADS, OpWorkload, _cfg_euler_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def default_backend(monkeypatch):
    monkeypatch.delenv("BAGEL_RT_BACKEND", raising=False)


def broken(*_, **__):
    raise RuntimeError("no kernel image | is available\nfor this device")


def table_cells(text):
    """The cells of a Markdown table, checked for its form."""
    lines = text.splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    assert {len(row) for row in cells} == {len(cells[0])} and all(set(cell) <= set("-:") for cell in cells[1])
    return [cells[0], *cells[2:]]


# Workers


def run_worker(tasks, start=0):
    messages = []
    return worker.work(tasks, start, messages.append), messages


def test_worker_continues_after_task_that_raises():
    tasks = [("skipped", None), ("bad", broken), ("good", lambda: iter([{"x": 1}]))]
    assert run_worker(tasks, 1) == (
        0,
        [{"begin": 1, "task": "bad"}, {"failed": "RuntimeError: no kernel image | is available"},
         {"begin": 2, "task": "good"}, {"row": {"x": 1}}, {"done": True}],
    )  # fmt: skip


def test_worker_exits_when_device_is_lost():
    def lose():
        raise kernels.DeviceLost("an illegal memory access")

    status, messages = run_worker([("bad", lose), ("good", lambda: iter([]))])
    assert status == worker.DEVICE_LOST and "an illegal memory access" in messages[-1]["failed"]


def test_check_tasks_run_every_case():
    tasks = dict(worker.check_tasks(DEVICE))
    (row,) = tasks["cfg_euler_step: no guidance, 6 latents"]()
    assert (row["op"], row["result"], row["dtype"]) == ("cfg_euler_step", "pass", "bfloat16")
    assert len(tasks) == len(worker.CASES)


def test_kernel_tasks_start_with_ceilings():
    (name, measure_ceilings), *others = worker.kernel_tasks(CPU)
    (row,) = measure_ceilings()
    assert name == "ceilings" and all(value > 0 for value in (*row["limits"], *row["measured"]))
    assert len(dict(others)) == 2 * len(WORKLOADS)


SCRIPT = """
import json, os, sys, time
tasks = [
    ("fine", lambda: print(json.dumps({"row": {"x": 0}}), flush=True)),
    ("fatal", lambda: os.abort()),
    ("hanging", lambda: time.sleep(100)),
    ("last", lambda: print("{library output", "[3]", json.dumps({"row": {"x": 3}}), sep="\\n", flush=True)),
]
for number in range(int(sys.argv[2]), len(tasks)):
    print(json.dumps({"begin": number, "task": tasks[number][0]}), flush=True)
    tasks[number][1]()
print(json.dumps({"done": True}), flush=True)
"""


def run_script(tmp_path, seconds, patience):
    stage = Stage("check")
    command = [sys.executable, "-c", SCRIPT]
    gpu_check.run_worker(stage, time.monotonic() + seconds, lambda: None, tmp_path / "log", command, patience)
    return stage


def test_stage_continues_after_task_that_crashes_or_hangs(tmp_path):
    stage = run_script(tmp_path, 60, 4.0)
    assert stage.rows == [{"x": 0}, {"x": 3}] and stage.complete
    assert stage.remarks == [] and stage.notes == [
        "fatal: the worker exited with status -6; see log",
        "hanging: stopped: no output for 4 s",
    ]


def test_stage_stops_at_deadline_and_keeps_rows(tmp_path):
    begun = time.monotonic()
    stage = run_script(tmp_path, 4, 60)
    assert time.monotonic() - begun < 30 and stage.rows == [{"x": 0}] and not stage.complete
    assert stage.remarks == ["hanging: stopped: time limit reached"] and len(stage.notes) == 1


PEERS_SCRIPT = (
    SCRIPT[: SCRIPT.index("tasks")]
    + """
tasks = [
    ("ours crashes", lambda: os.abort()),
    ("a peer crashes", lambda: (print(json.dumps({"row": {"who": "bagel_rt"}}), flush=True), os.abort())),
    ("workload (compiled peers)", lambda: os.abort()),
]
"""
    + SCRIPT[SCRIPT.index("for number") :]
)


def test_crash_of_a_peer_is_a_remark(tmp_path):
    stage, command = Stage("kernels"), [sys.executable, "-c", PEERS_SCRIPT]
    gpu_check.run_worker(stage, time.monotonic() + 60, lambda: None, tmp_path / "log", command)
    assert stage.complete and [note.split(":")[0] for note in stage.notes] == ["ours crashes"]
    assert [remark.split(":")[0] for remark in stage.remarks] == ["a peer crashes", "workload (compiled peers)"]


def test_worker_prints_json_lines(monkeypatch, capsys):
    monkeypatch.setitem(
        worker.STAGES, "check", lambda device: [("skipped", None), (device.type, lambda: iter([{"x": 1}]))]
    )
    monkeypatch.setattr(sys, "argv", ["worker", "check", "--from", "1"])
    with pytest.raises(SystemExit) as exit_info:
        worker.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (exit_info.value.code, lines) == (0, [{"begin": 1, "task": "cuda"}, {"row": {"x": 1}}, {"done": True}])


def test_kernel_and_forward_tasks_yield_rows(monkeypatch):
    rows = list(dict(worker.kernel_tasks(CPU, 0))["cfg_euler_step global of 2 branches, 512"]())
    assert [(row["who"], row["note"]) for row in rows] == [("bagel_rt", ""), ("official", "")]
    measured = forward.ForwardRow("f", "kernels", 2.0, 4, 1.0)
    monkeypatch.setattr(forward, "measure", lambda *_: iter([measured]))
    tasks = worker.forward_tasks(CPU, torch.float32)
    assert [name for name, _ in tasks] == list(forward.FORWARDS) and list(tasks[0][1]()) == [vars(measured)]


def test_lost_device_is_detected(monkeypatch):
    def fail(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nhints")

    assert check.device_error(CPU) == ""
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    assert check.device_error(torch.device("cuda")) == ""
    kernels._check_alive(torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.synchronize", fail)
    assert "an illegal memory access was encountered). Use --op" in check.device_error(torch.device("cuda"))
    with pytest.raises(kernels.DeviceLost, match="an illegal memory access was encountered$"):
        kernels._check_alive(torch.device("cuda"))


# Full runs


def norms(tensors):
    return rms_norm, (tensors(6, 24), None, tensors(24), tensors(24), 4, 1e-6), {}


def steps(tensors):
    return _cfg_euler_step(tensors, latents=6, renorm="global", branches=3)


TINY = [
    OpWorkload("rms_norm", "rms_norm", 0, 300, norms, torch.float32),
    OpWorkload("cfg_euler_step", "cfg_euler_step", 0, 900, steps, torch.float32),
]


def result_of(folder):
    def refuse(word):
        raise AssertionError(word)

    return json.loads((folder / "results.json").read_text(), parse_constant=refuse)


def fake_check(stage, deadline, save, folder):
    stage.rows.append({"op": "linear", "case": "a|b", "dtype": "bfloat16", "error": float("nan"), "result": "FAIL"})
    stage.complete = True


def tiny_kernels(stage, deadline, save, folder):
    assert result_of(folder)["stages"][0]["rows"], "the previous stage was not saved"
    stage.rows.append({"limits": (1e12, 1e12), "measured": (2e12, 3e12)})
    for workload in TINY:
        stage.rows += [vars(row) for row in kernels.measure(workload, measure.Timer(CPU, 0, 1))]
        save()
    stage.complete = True


def test_results_are_saved_after_each_stage_despite_failures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "WORKLOADS", TINY)
    stages = {"check": fake_check, "kernels": tiny_kernels, "forward": broken, "tune": fake_check}
    monkeypatch.setitem(stages, "tune", lambda stage, *_: stage.rows.append({"what": "tune", "result": "status 0"}))
    results_of_stages = gpu_check.run(tmp_path / "new", 1, list(stages), CPU, "", stages)
    results = result_of(tmp_path / "new")
    assert [stage["name"] for stage in results["stages"]] == list(stages)
    assert results["stages"][0]["rows"][0]["error"] is None  # JSON has no nan
    assert {"date", "commit", "machine", "versions"} <= set(results["about"])
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", results["about"]["commit"])
    assert results["stages"][2]["notes"] == ["RuntimeError: no kernel image | is available\nfor this device"]
    assert [bool(report.problems(stage)) for stage in results_of_stages] == [True, False, True, False]
    assert "kernels: complete, " in capsys.readouterr().out

    text = (tmp_path / "new" / "results.md").read_text()
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    assert [len(table_cells(table)) > 1 for table in tables] == [True] * 6
    assert "## kernels" in text and "**rms_norm**" in text and "2 TFLOP/s, 3.00 TB/s" in text


@pytest.mark.parametrize("limits", [None, (1e12, 1e12)], ids=["without ceilings", "with ceilings"])
def test_kernel_tables_render_without_ceilings(limits, monkeypatch):
    monkeypatch.setattr(report, "WORKLOADS", TINY)
    rows = [vars(kernels.Row("rms_norm", kernels.OURS, 2.0, 0.0))]
    rows += [{"limits": limits, "measured": limits}] if limits else []
    text = report.markdown_report({}, [Stage("kernels", rows)])
    assert "**rms_norm**" in text and ("Roofline: 1 TFLOP/s" in text) == (limits is not None)


def test_failure_to_render_tables_keeps_results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "markdown_report", broken)
    (stage,) = gpu_check.run(tmp_path, 1, ["check"], CPU, "", {"check": fake_check})
    assert stage.complete and result_of(tmp_path)["stages"][0]["rows"]
    assert "Rendering tables failed: RuntimeError: no kernel image" in (tmp_path / "results.md").read_text()


def test_interrupted_stage_leaves_no_process(tmp_path):
    begun = []

    def interrupted(*_):
        begun.append(gpu_check._spawn([sys.executable, "-c", "import time; time.sleep(100)"]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu_check.run(tmp_path, 1, ["check"], CPU, "", {"check": interrupted})
    assert begun[0].returncode == -9 and not gpu_check._RUNNING


@pytest.mark.slow
def test_sigterm_kills_child_processes(tmp_path):
    code = """
import sys, torch
from pathlib import Path
from benchmarks import gpu_check
def stage(*_):
    process = gpu_check._spawn([sys.executable, "-c", "import time; time.sleep(100)"])
    print(process.pid, flush=True)
    process.wait()
gpu_check.exit_on_signals()
gpu_check.run(Path(sys.argv[1]), 1, ["check"], torch.device("cpu"), "", {"check": stage})
"""
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=measure.ROOT, stdout=subprocess.PIPE)
    child = int(run.stdout.readline())
    run.terminate()
    assert run.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    run.stdout.close()


def test_stage_without_time_is_not_started(tmp_path):
    (stage,) = gpu_check.run(tmp_path, 0.01, ["kernels"], CPU, "", {"kernels": broken})
    assert stage.remarks == ["not started: time limit reached"] and not stage.complete and not report.problems(stage)
    assert report.verdict([stage]) == "no problems; incomplete: kernels"


def test_only_own_wrong_results_are_problems():
    rows = [{"workload": "w", "who": who, "note": "WRONG"} for who in ("official", kernels.OURS)]
    assert report.problems(Stage("kernels", rows)) == ["w: WRONG"]


@pytest.mark.slow
def test_tests_stage_counts_outcomes_and_keeps_failure_logs(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_good.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    (tmp_path / "tests" / "test_bad.py").write_text("def test_one(): pass\ndef test_two(): assert not 'so'\n")
    (tmp_path / "tests" / "test_slow.py").write_text("import time\ndef test_one(): time.sleep(100)\n")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    stage, cut = Stage("tests"), Stage("tests")
    gpu_check.run_tests(stage, time.monotonic() + 100, lambda: None, tmp_path, ("good", "bad"))
    good, bad = stage.rows
    assert (good["file"], good["passed"], good["failed"], good["status"]) == ("test_good.py", 2, 0, 0)
    assert (bad["file"], bad["passed"], bad["failed"], bad["status"]) == ("test_bad.py", 1, 1, 1)
    assert "assert not 'so'" in (tmp_path / "tests.log").read_text()
    assert report.problems(stage) == ["test_bad.py: status 1"]
    gpu_check.run_tests(cut, time.monotonic() + 1, lambda: None, tmp_path, ("slow",))
    assert cut.remarks == ["test_slow.py: stopped: time limit reached"] and cut.rows[0]["status"] is None
    assert not cut.complete and not report.problems(cut)


def test_patterns_match_the_tests_of_every_kernel():
    files = [path.name for pattern in gpu_check.TESTS for path in (measure.ROOT / "tests").rglob(f"test_{pattern}.py")]
    others = ("attention", "attention_backward", "linear", "norm", "qk_norm_rope", "ops_registration", "backend")
    assert files[0] == "test_conformance_kernels.py" and {f"test_{name}.py" for name in others} <= set(files)
    assert len(files) == len(set(files)) >= len(gpu_check.TESTS)


@pytest.mark.parametrize("module", [gpu_check, kernels])
def test_requires_a_gpu(module, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as exit_info:
        module.main()
    output = capsys.readouterr()
    assert (exit_info.value.code, output.out) == (2, "") and "PyTorch found no CUDA device" in output.err


def test_exit_code_and_verdict(tmp_path, monkeypatch, capsys):
    codes, calls = [], []
    cut = Stage("check", remarks=["not started"])
    for stage in (Stage("check", complete=True), cut, Stage("check", notes=["hung"], complete=True)):

        def run(folder, *others, stage=stage):
            calls.append(others)
            (folder / "results.md").write_text("# GPU check\n")
            return [stage]

        monkeypatch.setattr(gpu_check, "run", run)
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr(gpu_check, "exit_on_signals", lambda: None)
        options = ["--output", str(tmp_path), "--minutes", "2", "--stages", "check,forward", "--commit", "abc"]
        monkeypatch.setattr(sys, "argv", ["gpu_check", *options])
        with pytest.raises(SystemExit) as exit_info:
            gpu_check.main()
        codes.append(exit_info.value.code)
    assert codes == [0, 0, 1] and calls[0] == (2.0, ["check", "forward"], torch.device("cuda:0"), "abc")
    verdicts = ["no problems; all stages complete", "no problems; incomplete: check",
                "problems in check; all stages complete"]  # fmt: skip
    assert capsys.readouterr().out == "".join(f"# GPU check\n\n{verdict}\n" for verdict in verdicts)


def test_rejects_unknown_stage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--stages", "check,polish"])
    with pytest.raises(SystemExit) as exit_info:
        gpu_check.main()
    assert exit_info.value.code == 2 and "--stages must be from build, check" in capsys.readouterr().err


@pytest.mark.parametrize(
    "codes, result",
    [
        ([0], "already built"),
        ([1, 0, 0], "built"),
        ([1, 1], "not built, see build.log"),
        ([1, None], "not built, see build.log"),
    ],
    ids=["already built", "built", "no compiler", "time limit"],
)
def test_build_stage_builds_missing_extension(codes, result, tmp_path, monkeypatch):
    codes = iter(codes)
    monkeypatch.setattr(gpu_check, "_exit_status", lambda *_: next(codes))
    stage = Stage("build")
    gpu_check.build(stage, time.monotonic() + 9, lambda: None, tmp_path)
    assert stage.rows == [{"what": "bagel_rt._C", "result": result}] and stage.complete and not list(codes)


def test_tune_stage_writes_next_to_results_until_deadline(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()  # so that it shadows the installed package
    script = tmp_path / "benchmarks" / "tune.py"
    script.write_text("import pathlib, sys\npathlib.Path(sys.argv[2]).write_text(' '.join(sys.argv))\n")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    stage, cut = Stage("tune"), Stage("tune")
    gpu_check.tune(stage, time.monotonic() + 60, lambda: None, tmp_path)
    assert stage.complete and stage.rows[0]["result"].startswith("status 0")
    *_, output, minutes = (tmp_path / "tuned.json").read_text().rsplit(" --", 2)
    assert output == f"output {tmp_path / 'tuned.json'}" and 0.9 < float(minutes.removeprefix("minutes ")) <= 1
    script.write_text("import time\ntime.sleep(100)\n")
    monkeypatch.setattr(gpu_check, "TUNE_EXIT_GRACE", 0)
    gpu_check.tune(cut, time.monotonic() + 1, lambda: None, tmp_path)
    assert not cut.complete and "time limit reached" in cut.rows[0]["result"] and not report.problems(cut)
