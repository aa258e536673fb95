"""The soak finds nothing wrong with the runtime, and finds what is wrong when something is."""

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
    """A runtime of its own: others hold slots."""
    return Bagel.from_pretrained(CHECKPOINT, device="cpu")


def test_many_requests_leave_nothing_and_repeat(runtime):
    told = []
    found = soak.soak(runtime, 40, seed=1, say=told.append)
    assert found.wrong == [] and found.taken == 0 and told == ["20 of 40, 0 wrong", "40 of 40, 0 wrong"]
    assert found.requests["out of memory"] == 2 and found.requests["cancelled"] >= 3
    assert {"generate", "edit", "chat", "interleave"} <= set(found.requests)
    assert sum(found.requests.values()) == 42
    assert found.compared >= 6 and found.equal == found.compared and found.worst == 0
    assert found.summary().endswith("all right")


def test_requests_repeat_with_their_seed_and_are_of_every_kind(runtime):
    def draw(seed):
        requests = RequestSampler(runtime, seed)
        return [requests.draw() for _ in range(60)]

    def shown(asked):
        return [(a.method, a.options, a.stop, a.abandons) for a in asked]

    first = draw(3)
    assert shown(first) == shown(draw(3)) != shown(draw(4))
    sizes = [asked.options.get("size") for asked in first if asked.method == "generate"]
    assert any(isinstance(size, list) for size in sizes) and any(isinstance(size, tuple) for size in sizes)
    assert any(asked.options.get("think") for asked in first) and any(asked.abandons for asked in first)
    assert all(asked.method == "chat" for asked in first if asked.abandons)


def wrong_lines(runtime, requests=6):
    return "\n".join(soak.soak(runtime, requests, seed=0).wrong)


@pytest.mark.slow
def test_a_slot_that_stays_taken_is_found(runtime):
    held = SlotRange(runtime.cache, 5)
    assert "5 slots are still taken" in wrong_lines(runtime)
    held.release()


@pytest.mark.slow
def test_memory_that_stays_allocated_is_found(runtime, monkeypatch):
    leaked, edit, chat = [], Bagel.edit, Bagel.chat
    leak = lambda call: lambda *a, **o: leaked.append(torch.zeros(1 << 18)) or call(*a, **o)  # noqa: E731
    monkeypatch.setattr(Bagel, "edit", leak(edit))
    monkeypatch.setattr(Bagel, "chat", leak(chat))
    assert "bytes are allocated since the warm-up" in wrong_lines(runtime)


@pytest.mark.slow
def test_another_result_behind_a_failure_is_found(runtime, monkeypatch):
    fails, generate = [], Bagel.generate

    def spoilt(self, *arguments, **options):
        if fails and options.get("seed") == 1:
            options["seed"] = 2
        return generate(self, *arguments, **options)

    exhaust = soak._run_out_of_memory
    monkeypatch.setattr(Bagel, "generate", spoilt)
    monkeypatch.setattr(soak, "_run_out_of_memory", lambda *arguments: fails.append(1) or exhaust(*arguments))
    assert "generate behind exhausted memory in generate gives another result than before" in wrong_lines(runtime, 3)


@pytest.mark.slow
def test_a_result_that_a_new_runtime_does_not_give_is_found(runtime, monkeypatch):
    generate = Bagel.generate

    def other(self, *arguments, **options):
        return generate(self, *arguments, **options | {"seed": options["seed"] + (self is not runtime)})

    monkeypatch.setattr(Bagel, "generate", other)
    found = soak.soak(runtime, 10, seed=1)
    assert any(line.startswith("generate") and "differs from a new runtime's" in line for line in found.wrong)
    assert found.equal < found.compared


@pytest.mark.slow
def test_a_request_that_raises_and_memory_that_does_not_run_out_are_found(runtime, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(Bagel, "edit", fail)
    lines = wrong_lines(runtime, 12)
    assert "edit: RuntimeError: no kernel image" in lines
    found = soak.SoakReport()
    soak._run_out_of_memory(runtime, SoakRequest("interleave", ("not a list",), {}), found)
    soak._run_out_of_memory(runtime, SoakRequest("release_memory", (), {}), found)
    assert [line.split(":")[0] for line in found.wrong] == [
        "interleave without memory",
        "release_memory without memory",
    ]
    assert "it did not run out" in found.wrong[1]


def test_a_refused_growth_is_over_when_the_block_is(runtime):
    runtime.release_memory()
    asked = SoakRequest("generate", ("a",), {"seed": 0, "size": (16, 16), "num_timesteps": 2})
    with soak.no_memory(runtime), pytest.raises(torch.OutOfMemoryError):
        asked.of(runtime)
    assert asked.of(runtime).latents.isfinite().all()


@pytest.mark.parametrize("abandons", [False, True], ids=["cancelled", "abandoned"])
def test_a_request_is_given_up_where_it_says(runtime, abandons):
    asked = SoakRequest("chat", ("why?",), {"max_think_token_n": 12}, stop=3, abandons=abandons)
    with pytest.raises(Cancelled):
        asked.of(runtime)
    late = SoakRequest("chat", ("why?",), {"max_think_token_n": 3}, stop=50)
    assert late.of(runtime) == runtime.chat("why?", max_think_token_n=3)


def test_results_are_compared_part_by_part(runtime):
    one, two = (runtime.generate("a", size=(16, 16), seed=seed, num_timesteps=2) for seed in (0, 1))
    assert soak._compare([one, "x"], [one, "x"]) == (True, 0.0)
    same, error = soak._compare([one], [two])
    assert not same and 0 < error < float("inf")
    for got, want in ((["x"], ["y"]), ([one], [one, one]), ([], [one])):
        assert soak._compare(got, want) == (False, float("inf"))


@pytest.mark.parametrize("wrong", [[], ["it leaks"]], ids=["right", "wrong"])
def test_the_command_tells_and_returns_what_came_of_it(tmp_path, monkeypatch, capsys, wrong):
    found = soak.SoakReport(wrong=wrong, worst=float("inf"))
    found.requests["chat"] += 3
    monkeypatch.setattr(soak, "soak", lambda bagel, requests, seed, say: found if (requests, seed) == (7, 2) else None)
    file = tmp_path / "soak.json"
    options = ["--requests", "7", "--seed", "2", "--device", "cpu", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["soak", *options])
    with pytest.raises(SystemExit) as ended:
        soak.main()
    assert ended.value.code == len(wrong) and "3 requests in 0 s: 3 chat" in capsys.readouterr().out
    told = json.loads(file.read_text())
    assert told["wrong"] == wrong and told["requests"] == {"chat": 3} and told["worst"] is None


def test_too_few_requests_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soak", "--requests", "2"])
    with pytest.raises(SystemExit) as ended:
        soak.main()
    assert ended.value.code == 2 and "allowed are numbers from 3" in capsys.readouterr().err
