"""The soak test passes on the runtime, and detects leaks, wrong results and errors."""

import json
import sys

import pytest
import torch
from conftest import CHECKPOINT

from bagel_rt import Bagel, Cancelled
from bagel_rt.runtime.slots import SlotRange
from benchmarks import soak
from benchmarks.soak import RequestSampler, SoakRequest


@pytest.fixture
def runtime():
    """A new runtime; shared ones hold slots."""
    return Bagel.from_pretrained(CHECKPOINT, device="cpu")


def test_soak_passes(runtime):
    lines = []
    report = soak.soak(runtime, 40, seed=1, log=lines.append)
    assert report.wrong == [] and report.taken == 0 and lines == ["20 of 40, 0 failures", "40 of 40, 0 failures"]
    assert report.requests["out of memory"] == 2 and report.requests["cancelled"] >= 3
    assert {"generate", "edit", "chat", "interleave"} <= set(report.requests)
    assert sum(report.requests.values()) == 42
    assert report.compared >= 6 and report.equal == report.compared and report.worst == 0
    assert report.summary().endswith("passed")


def test_sampler_is_reproducible_and_covers_every_kind(runtime):
    def sample(seed):
        requests = RequestSampler(runtime, seed)
        return [requests.sample() for _ in range(60)]

    def fields_of(samples):
        return [(r.method, r.options, r.stop, r.abandons) for r in samples]

    first = sample(3)
    assert fields_of(first) == fields_of(sample(3)) != fields_of(sample(4))
    sizes = [request.options.get("size") for request in first if request.method == "generate"]
    assert any(isinstance(size, list) for size in sizes) and any(isinstance(size, tuple) for size in sizes)
    assert any(request.options.get("think") for request in first) and any(request.abandons for request in first)
    assert all(request.method == "chat" for request in first if request.abandons)


def wrong_lines(runtime, requests=6):
    return "\n".join(soak.soak(runtime, requests, seed=0).wrong)


@pytest.mark.slow
def test_detects_leaked_slots(runtime):
    held = SlotRange(runtime.cache, 5)
    assert "5 slots are still in use" in wrong_lines(runtime)
    held.release()


@pytest.mark.slow
def test_detects_leaked_memory(runtime, monkeypatch):
    leaked, edit, chat = [], Bagel.edit, Bagel.chat
    leak = lambda call: lambda *a, **o: leaked.append(torch.zeros(1 << 18)) or call(*a, **o)  # noqa: E731
    monkeypatch.setattr(Bagel, "edit", leak(edit))
    monkeypatch.setattr(Bagel, "chat", leak(chat))
    assert "bytes since the warm-up" in wrong_lines(runtime)


@pytest.mark.slow
def test_detects_wrong_result_after_failure(runtime, monkeypatch):
    fails, generate = [], Bagel.generate

    def spoilt(self, *arguments, **options):
        if fails and options.get("seed") == 1:
            options["seed"] = 2
        return generate(self, *arguments, **options)

    exhaust = soak._run_out_of_memory
    monkeypatch.setattr(Bagel, "generate", spoilt)
    monkeypatch.setattr(soak, "_run_out_of_memory", lambda *arguments: fails.append(1) or exhaust(*arguments))
    assert "generate after out of memory in generate differs from its earlier result" in wrong_lines(runtime, 3)


@pytest.mark.slow
def test_detects_difference_from_new_runtime(runtime, monkeypatch):
    generate = Bagel.generate

    def other(self, *arguments, **options):
        return generate(self, *arguments, **options | {"seed": options["seed"] + (self is not runtime)})

    monkeypatch.setattr(Bagel, "generate", other)
    report = soak.soak(runtime, 10, seed=1)
    assert any(line.startswith("generate") and "differs from a new runtime" in line for line in report.wrong)
    assert report.equal < report.compared


@pytest.mark.slow
def test_detects_errors_and_missing_out_of_memory(runtime, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(Bagel, "edit", fail)
    lines = wrong_lines(runtime, 12)
    assert "edit: RuntimeError: no kernel image" in lines
    report = soak.SoakReport()
    soak._run_out_of_memory(runtime, SoakRequest("interleave", ("not a list",), {}), report)
    soak._run_out_of_memory(runtime, SoakRequest("release_memory", (), {}), report)
    assert [line.split(":")[0] for line in report.wrong] == [
        "interleave without memory",
        "release_memory without memory",
    ]
    assert "no OutOfMemoryError" in report.wrong[1]


def test_no_memory_ends_with_its_block(runtime):
    runtime.release_memory()
    request = SoakRequest("generate", ("a",), {"seed": 0, "size": (16, 16), "num_timesteps": 2})
    with soak.no_memory(runtime), pytest.raises(torch.OutOfMemoryError):
        request.run(runtime)
    assert request.run(runtime).latents.isfinite().all()


@pytest.mark.parametrize("abandons", [False, True], ids=["cancelled", "abandoned"])
def test_request_stops_at_its_step(runtime, abandons):
    request = SoakRequest("chat", ("why?",), {"max_think_token_n": 12}, stop=3, abandons=abandons)
    with pytest.raises(Cancelled):
        request.run(runtime)
    late = SoakRequest("chat", ("why?",), {"max_think_token_n": 3}, stop=50)
    assert late.run(runtime) == runtime.chat("why?", max_think_token_n=3)


def test_compare_recurses_into_lists(runtime):
    one, two = (runtime.generate("a", size=(16, 16), seed=seed, num_timesteps=2) for seed in (0, 1))
    assert soak._compare([one, "x"], [one, "x"]) == (True, 0.0)
    same, error = soak._compare([one], [two])
    assert not same and 0 < error < float("inf")
    for actual, expected in ((["x"], ["y"]), ([one], [one, one]), ([], [one])):
        assert soak._compare(actual, expected) == (False, float("inf"))


@pytest.mark.parametrize("wrong", [[], ["it leaks"]], ids=["passed", "failed"])
def test_command_writes_summary_and_sets_exit_code(tmp_path, monkeypatch, capsys, wrong):
    report = soak.SoakReport(wrong=wrong, worst=float("inf"))
    report.requests["chat"] += 3
    monkeypatch.setattr(soak, "soak", lambda bagel, requests, seed, log: report if (requests, seed) == (7, 2) else None)
    file = tmp_path / "soak.json"
    options = ["--requests", "7", "--seed", "2", "--device", "cpu", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["soak", *options])
    with pytest.raises(SystemExit) as exit_info:
        soak.main()
    assert exit_info.value.code == len(wrong) and "3 requests in 0 s: 3 chat" in capsys.readouterr().out
    data = json.loads(file.read_text())
    assert data["wrong"] == wrong and data["requests"] == {"chat": 3} and data["worst"] is None


def test_rejects_too_few_requests(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soak", "--requests", "2"])
    with pytest.raises(SystemExit) as exit_info:
        soak.main()
    assert exit_info.value.code == 2 and "--requests must be at least 3, got 2." in capsys.readouterr().err
