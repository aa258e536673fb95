"""A small load test passes, and failures are reported."""

import json
import sys

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx
import numpy as np
from conftest import CHECKPOINT

from benchmarks import serve_load
from benchmarks.serve_load import CHAT, DRAW, KnownRequest, Report, same


@pytest.mark.slow
def test_load_test_passes():
    report = serve_load.load(CHECKPOINT, requests=40, clients=8, seed=0)
    assert report.wrong == [], report.table()
    assert sum(report.answered.values()) + report.left + report.refused == 40
    assert set(report.answered) == {"image", "edit", "chat", "stream", "interleaved"}
    assert report.refused == 2 and 1 <= report.left <= 4 and report.at_the_end == serve_load.RUNNING_AT_SHUTDOWN
    assert report.table().endswith("passed")


def test_same_compares_texts_and_images():
    image = np.zeros((2, 3, 3), np.uint8)
    assert same(["a", image], ["a", image + 1])
    for actual in (["b", image], ["a", image + 2], ["a"], ["a", image[:1]], [image, "a"], ["a", "a"]):
        assert not same(actual, ["a", image])


def test_incomplete_stream_is_detected():
    events = 'data: {"choices": [{"delta": {"content": "hel"}}]}\n\ndata: {"error": {"message": "late"}}\n\n'
    response = httpx.Response(200, text=events)
    [content] = serve_load.read(KnownRequest("stream", CHAT, {}, ["hello"]), response)
    assert "incomplete stream" in content and "late" in content
    assert serve_load.read(
        KnownRequest("stream", CHAT, {}, []), httpx.Response(200, text=events[:51] + "data: [DONE]\n\n")
    ) == ["hel"]


@pytest.fixture
def load(monkeypatch):
    """Runs a load test against a fake server that always sends one response."""

    def load(status, body):
        run = serve_load.Load("http://server", 0, [KnownRequest("chat", CHAT, {"json": {}}, ["yes"])], seed=0)
        transport = httpx.MockTransport(lambda request: httpx.Response(status, json=body))
        run._client = lambda _: httpx.AsyncClient(base_url="http://server", transport=transport)
        resident = iter([0, serve_load.SLACK + 1])
        run._resident = lambda: next(resident)
        serve_load.asyncio.run(run.run(60, 4))
        return run.report

    return load


def test_wrong_responses_and_memory_growth_are_reported(load):
    report = load(200, {"choices": [{"message": {"content": "no"}}]})
    lines = "\n".join(report.wrong)
    assert "differs from the library's result" in lines and "memory grew by" in lines
    assert any(line.startswith((DRAW, CHAT, serve_load.EDIT)) and ": 200" in line for line in report.wrong)
    assert not report.answered
    assert "chat: 500" in "\n".join(load(500, {}).wrong)


@pytest.mark.parametrize("wrong", [[], ["it leaks"]], ids=["passed", "failed"])
def test_command_writes_results_and_sets_exit_code(tmp_path, monkeypatch, capsys, wrong):
    report = Report(wrong=wrong)
    report.answered["chat"] += 3
    report.seconds["chat"] = [0.1, 0.2, 0.3]
    monkeypatch.setattr(serve_load, "load", lambda *arguments: report if arguments[1:] == (7, 2, 5) else None)
    file = tmp_path / "load.json"
    options = ["--requests", "7", "--clients", "2", "--seed", "5", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["serve_load", *options])
    with pytest.raises(SystemExit) as exit_info:
        serve_load.main()
    assert exit_info.value.code == len(wrong) and "3 responses in" in capsys.readouterr().out
    data = json.loads(file.read_text())
    assert data["wrong"] == wrong and data["answered"] == {"chat": 3} and data["clients"] == 2
