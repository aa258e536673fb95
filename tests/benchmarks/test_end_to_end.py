"""The end-to-end benchmark on a CPU: costs, rooflines, timelines and tables. Times are not asserted."""

import functools
import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CHECKPOINT
from torch.autograd import DeviceType

from bagel_rt import Progress
from bagel_rt.models.bagel.config import BAGEL_7B_MOT, BagelConfig
from bagel_rt.models.bagel.workload import Workload
from benchmarks import end_to_end, timeline
from benchmarks.end_to_end import Costs, EndToEnd, EndToEndRow, Measurement, MeasureOptions, table, tasks
from benchmarks.random_model import random_model
from benchmarks.roofline import layer_parameters, roofline_seconds
from benchmarks.runners import CASES, RUNNERS, TINY_CASES, Runner
from benchmarks.timeline import ProfileWindow, Timeline, idle_share

CPU = torch.device("cpu")
H200 = (790e12, 4.3e12)
SMALL = {case.name: replace(case, size=(32, 32), timesteps=6, tokens=case.tokens and 28) for case in TINY_CASES}
QUICK = MeasureOptions(timesteps=(3, 6), tokens=(2, 4))
TINY_CONFIG = BagelConfig.from_folder(CHECKPOINT)
TINY_CONFIG = replace(TINY_CONFIG, llm=replace(TINY_CONFIG.llm, vocab_size=640))  # for the embedded tokenizer


@pytest.fixture(scope="module")
def tiny():
    return random_model(TINY_CONFIG, CPU, torch.float32)


@pytest.fixture(scope="module")
def runs(tiny):
    return EndToEnd(*tiny, QUICK, functools.partial(torch.compile, backend="eager"))


# Roofline


@pytest.mark.parametrize(
    "work, seconds",
    [
        (
            Workload.with_defaults(BAGEL_7B_MOT, text_tokens=64),
            6.87,
        ),  # arithmetic of 90 forwards, 5425 TFLOP at 790 TFLOP/s
        (
            Workload.with_defaults(BAGEL_7B_MOT, task="edit", text_tokens=64),
            13.06 + 0.19,
        ),  # 147 forwards, and the prefill
        (
            Workload.with_defaults(BAGEL_7B_MOT, task="chat", text_tokens=1, max_think_token_n=304),
            1.0 + 0.004,
        ),  # 304 tokens a second
    ],
    ids=["text-to-image", "edit", "chat"],
)
def test_roofline_matches_hand_calculation(work, seconds):
    assert roofline_seconds(work, H200) == pytest.approx(seconds, rel=0.02)


def test_roofline_scales_with_batch():
    assert layer_parameters(BAGEL_7B_MOT) == pytest.approx(233.05e6, rel=1e-4)
    one, four = (Workload.with_defaults(BAGEL_7B_MOT, batch=batch, text_tokens=64) for batch in (1, 4))
    assert roofline_seconds(four, H200) == pytest.approx(4 * roofline_seconds(one, H200), rel=0.01)
    one, four = (replace(work, task="chat", max_think_token_n=100) for work in (one, four))
    assert roofline_seconds(four, H200) < 1.1 * roofline_seconds(one, H200), "a decode batch reads the weights once"


def test_thinking_adds_tokens_and_a_branch():
    plain = Workload.with_defaults(BAGEL_7B_MOT, text_tokens=64)
    thinks = replace(plain, max_think_token_n=100)
    assert (plain.branches, thinks.branches) == (2, 3)
    assert roofline_seconds(thinks, H200) == pytest.approx(6.87 + 41 * 60.4e12 / 790e12 + 100 / 303, rel=0.02)


# Random weights


def test_random_model_is_stable_and_texts_reach_their_length(tiny):
    model, tokenizer = tiny
    runner = Runner("eager", model, tokenizer)
    seen = []
    runner.bagel.chat("what?", max_think_token_n=40, progress=seen.append)
    assert seen[-1] == Progress("text", 39, 39)
    result = runner.bagel.generate("a", size=(32, 32), seed=0, num_timesteps=4)
    assert result.latents.isfinite().all() and result.latents.std() < 10
    for layer in model.weights.layers:
        assert (layer.qk_norm.und[0] == layer.qk_norm.und[1]).all(), "all heads share one weight"


# Measuring


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, who",
    [(name, "graphs") for name in SMALL]
    + [(name, who) for name in ("text-to-image", "chat with an image") for who in RUNNERS[1:]],
)
def test_every_runner_and_case_is_measured(runs, name, who):
    *heartbeats, result = runs.measure(("task", who, 1, SMALL[name]))
    row = EndToEndRow(**result)
    draws, writes = "chat" not in name, bool(SMALL[name].tokens)
    assert heartbeats and not any(heartbeats) and (row.case, row.batch, row.who) == (name, 1, who)
    assert row.seconds > row.limit > 0 and "measured in full" in row.note and "WRONG" not in row.note
    assert (row.step is not None, row.token is not None, row.steps) == (draws, writes, 5 if draws else 0)
    assert row.launches > 20 and row.kernels is row.idle is row.memory is None
    assert (row.captures is None) == ("official" in who) and not row.captures
    assert (row.error is None) == (who == "eager" or not draws)
    assert not row.error or row.error < 2e-5
    assert "no timeline" not in row.note and "text differs" not in row.note


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text-to-image", "edit", "think then draw"])
def test_batches_are_measured(runs, name):
    *_, result = runs.measure(("task", "graphs", 2, SMALL[name]))
    assert (result["batch"], result["error"]) == (2, 0.0) and result["launches"] > 50


def test_long_requests_are_extrapolated(tiny, monkeypatch):
    case, calls = SMALL["text-to-image"], []
    call = Runner.__call__
    monkeypatch.setattr(Runner, "__call__", lambda *a, **options: calls.append(options) or call(*a, **options))
    for options in (replace(QUICK, seconds=0.0), replace(QUICK, whole=("graphs",))):
        *_, result = EndToEnd(*tiny, options).measure(("task", "eager", 1, case))
        assert result["note"] == "extrapolated from steps and tokens" and result["seconds"] > 0
    assert all("num_timesteps" in options for options in calls), "the full request was run"


def test_noisy_short_runs_give_no_rates(tiny, monkeypatch):
    ticks = iter(range(1000, 0, -1))  # every run takes less time than the previous one
    monkeypatch.setattr(Runner, "seconds", lambda *_, **__: float(next(ticks)))
    *_, result = EndToEnd(*tiny, QUICK).measure(("task", "eager", 1, SMALL["think then draw"]))
    assert (result["step"], result["denoising"], result["token"]) == (0, 0, 0) and result["seconds"] > 0
    assert "-" not in table([EndToEndRow(**result)]).splitlines()[2]


def test_cost_of_a_request_is_the_sum_of_its_parts():
    costs, work = (
        Costs(guided=3.0, unguided=2.0, token=0.5, rest=1.0),
        Workload.with_defaults(BAGEL_7B_MOT, max_think_token_n=10),
    )
    assert costs.denoising(work) == 41 * 3 + 8 * 2 and costs.whole(work) == 41 * 3 + 8 * 2 + 5 + 1
    assert costs.whole(replace(work, task="chat")) == 6


def test_warmup_has_two_steps_of_each_kind(tiny):
    def warmup(case):
        model, tokenizer = tiny
        work = case.workload(model, tokenizer, 1)
        measurement = Measurement(case, 1, Runner("eager", model, tokenizer), work, 1.0, QUICK)
        options = measurement._warmup_request()
        if not work.draws:
            return options
        shorter = replace(work, settings=replace(work.settings, num_timesteps=options["num_timesteps"]))
        return shorter.guided_steps

    text_to_image, edit, chat, _ = TINY_CASES
    guided, steps = warmup(text_to_image)
    assert guided >= 2 and steps - guided == 2
    assert warmup(edit) == (2, 2) and warmup(chat) == {"tokens": 2}
    assert warmup(replace(text_to_image, timesteps=3)) == (2, 2), "the full request if nothing shorter suffices"


def test_only_own_results_that_differ_from_eager_are_wrong():
    expected = [torch.ones(4), torch.ones(4)]
    actual = [torch.ones(4), torch.full((4,), 1.1)]
    note, error = end_to_end._compare(actual, expected, True)
    assert note.startswith("WRONG") and error == pytest.approx(0.1)
    assert end_to_end._compare(actual, expected, False)[0] == ""
    assert end_to_end._compare(expected, expected, True) == ("", 0.0)
    assert end_to_end._compare([torch.full((4,), float("nan"))], expected[:1], True)[0].startswith("WRONG")
    assert end_to_end._compare("a", "b", True)[0].startswith("WRONG") and end_to_end._compare("a", "a", True)[0] == ""


def test_tasks_are_sorted_by_importance():
    result = tasks(CASES)
    names = [name for name, *_ in result]
    assert len(names) == len(set(names)) == 4 * 3 + 3 * 2 + 4
    assert names[0] == "text-to-image, batch 1: graphs"
    compiled = ["compiled" in name for name in names]
    assert compiled == sorted(compiled), "compiled runners come last"
    assert {batch for _, who, batch, case in result if "official" in who or case.task == "chat"} == {1}


# Timelines


def event(name, start, end, device=DeviceType.CUDA, parent=None):
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=device, cpu_parent=parent, is_user_annotation=False)


@pytest.mark.parametrize(
    "spans, share",
    [([(0, 10)], 0.0), ([(0, 2), (8, 10)], 0.6), ([(5, 10), (0, 6)], 0.0), ([(0, 10), (2, 3), (12, 20)], 0.1),
     ([(3, 3)], 0.0)],
    ids=["one", "a gap", "overlapping, unordered", "one inside another", "no time"],
)  # fmt: skip
def test_idle_share(spans, share):
    assert idle_share(spans) == pytest.approx(share)


def test_timeline_from_gpu_events():
    names = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync")
    events = [event(name, 0, 1, DeviceType.CPU) for name in (*names, "cudaStreamSynchronize", "aten::add")]
    events += [event("kernel", 0, 4), event("Memcpy HtoD", 4, 5), event("kernel", 8, 10)]
    assert timeline.read_timeline(events, 2, torch.device("cuda")) == Timeline(2.5, 1.5, pytest.approx(0.3))
    assert timeline.read_timeline(events[:7], 2, torch.device("cuda")) == Timeline(), "no GPU events"


def test_timeline_counts_operator_calls_on_a_cpu():
    window = ProfileWindow(CPU, "image", 1, 2)
    x = torch.ones(3)
    for step in range(1, 6):
        window(Progress("text", step, 5))  # another stage
        window(Progress("image", step, 5))
        x.add_(1).mul_(2)
        torch.nn.functional.linear(x, torch.ones(2, 3)) if step == 4 else None  # after the window
    assert window.result() == Timeline(launches=2.0) and not window.failure


def test_short_request_has_no_timeline():
    early, cut = ProfileWindow(CPU, "text", 9, 16), ProfileWindow(CPU, "text", 1, 16)
    for step in range(1, 5):
        early(Progress("text", step, 5)), cut(Progress("text", step, 5))
    assert early.result() == cut.result() == Timeline()
    assert early.failure == "the request ended before step 25"
    assert not torch.autograd._profiler_enabled()


def test_profiler_failure_keeps_other_measurements(runs, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUPTI is taken")

    monkeypatch.setattr(timeline, "profile", fail)
    *_, result = runs.measure(("task", "graphs", 1, SMALL["text-to-image"]))
    assert result["launches"] is None and "no timeline: RuntimeError: CUPTI is taken" in result["note"]


# Command line


def run_main(monkeypatch, *options):
    monkeypatch.setattr(end_to_end, "TINY_CASES", tuple(SMALL.values()))
    monkeypatch.setattr(end_to_end, "MeasureOptions", lambda seconds: replace(QUICK, seconds=seconds))
    monkeypatch.setattr(sys, "argv", ["end_to_end", *options])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_info:
        end_to_end.main()
    return exit_info.value.code


def test_command_prints_table_and_writes_rows(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"
    options = ("--cases", "text-to-image, edit", "--who", "graphs,official", "--batches", "1")
    assert run_main(monkeypatch, "--tiny", "--json", str(file), *options) == 0
    output, result = capsys.readouterr().out, json.loads(file.read_text())
    assert [(row["case"], row["who"]) for row in result["rows"]] == [
        (case, who) for case in ("text-to-image", "edit") for who in ("graphs", "official")
    ]
    assert result["failed"] == [] and {"commit", "machine", "versions"} <= set(result["about"])
    assert output.count("| text-to-image | 1 |") == 2 and "measured in full" in output
    assert all(row["who"] in output for row in result["rows"])


def test_failing_runner_does_not_stop_the_others(monkeypatch, capsys):
    measure = EndToEnd.measure

    def fail(self, task):
        if task[1] == "graphs":
            raise RuntimeError("no kernel image")
        return measure(self, task)

    monkeypatch.setattr(EndToEnd, "measure", fail)
    options = ("--cases", "chat with an image", "--batches", "1")
    assert run_main(monkeypatch, "--tiny", "--who", "graphs,eager", *options) == 1
    output = capsys.readouterr().out
    assert "- chat with an image, batch 1: graphs: RuntimeError: no kernel image" in output and "| eager |" in output


def test_rejects_invalid_options(monkeypatch, capsys):
    assert run_main(monkeypatch) == 2
    assert "Use --tiny on a CPU" in capsys.readouterr().err
    for option, value in (("--who", "graphs,nobody"), ("--cases", "chess"), ("--batches", "0"), ("--batches", "x")):
        assert run_main(monkeypatch, "--tiny", option, value) == 2
        error = capsys.readouterr().err
        assert f"{option} must be from" in error and f"got {value.split(',')[-1]}." in error


def test_table_renders_incomplete_rows():
    bare = EndToEndRow("chat", 1, "eager", 2.0, 1.0)
    full = EndToEndRow("t2i", 4, "graphs", 10.0, 7.0, 0.2, 8.0, 0.01, 49, 3.0, 260.0, 0.02, 31_500_000_000, 3, 1.5,
                       0.0, "measured in full")  # fmt: skip
    header, _, first, second = table([bare, full]).splitlines()
    assert header.count("|") == first.count("|") == second.count("|")
    assert "| 24.50 | 400.0 | 3 | 260 | 2% | 31.5 | 70% | 3 in 1.5 s | 0.0e+00 | measured in full |" in second
    assert "| 2.00 |" in first and "50%" in first
    assert table([]) and json.dumps(asdict(full))
