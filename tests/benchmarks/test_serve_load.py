"""A small load: everyone is answered rightly, and what is wrong would be found."""

import json
import sys

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx  # noqa: E402
import numpy as np  # noqa: E402
from conftest import CHECKPOINT  # noqa: E402

from benchmarks import serve_load  # noqa: E402
from benchmarks.serve_load import CHAT, DRAW, Asked, Found, same  # noqa: E402


@pytest.mark.slow
def test_concurrent_clients_get_correct_answers():
    found = serve_load.load(CHECKPOINT, requests=40, clients=8, seed=0)
    assert found.wrong == [], found.table()
    assert sum(found.answered.values()) + found.left + found.refused == 40
    assert set(found.answered) == {"picture", "edit", "chat", "stream", "interleaved"}
    assert found.refused == 2 and 1 <= found.left <= 4 and found.at_the_end == serve_load.AT_THE_END
    assert found.table().endswith("all right")


def test_responses_are_compared_part_by_part():
    picture = np.zeros((2, 3, 3), np.uint8)
    assert same(["a", picture], ["a", picture + 1])
    for got in (["b", picture], ["a", picture + 2], ["a"], ["a", picture[:1]], [picture, "a"], ["a", "a"]):
        assert not same(got, ["a", picture])


def test_broken_stream_is_no_answer():
    events = 'data: {"choices": [{"delta": {"content": "hel"}}]}\n\ndata: {"error": {"message": "late"}}\n\n'
    answer = httpx.Response(200, text=events)
    [read] = serve_load.read(Asked("stream", CHAT, {}, ["hello"]), answer)
    assert "a stream that ends with" in read and "late" in read
    assert serve_load.read(
        Asked("stream", CHAT, {}, []), httpx.Response(200, text=events[:51] + "data: [DONE]\n\n")
    ) == ["hel"]


@pytest.fixture
def told(monkeypatch):
    """Answers in place of a server: runs a load that is told this and nothing else."""

    def told(status, body):
        run = serve_load.Load("http://server", 0, [Asked("chat", CHAT, {"json": {}}, ["yes"])], seed=0)
        transport = httpx.MockTransport(lambda request: httpx.Response(status, json=body))
        run._client = lambda _: httpx.AsyncClient(base_url="http://server", transport=transport)
        resident = iter([0, serve_load.SLACK + 1])
        run._resident = lambda: next(resident)
        serve_load.asyncio.run(run.run(60, 4))
        return run.found

    return told


def test_wrong_answers_and_growth_are_found(told):
    found = told(200, {"choices": [{"message": {"content": "no"}}]})
    lines = "\n".join(found.wrong)
    assert "another answer than the library's" in lines and "the server grew by" in lines
    assert any(line.startswith((DRAW, CHAT, serve_load.EDIT)) and ": 200" in line for line in found.wrong)
    assert not found.answered
    assert "chat: 500" in "\n".join(told(500, {}).wrong)


@pytest.mark.parametrize("wrong", [[], ["it leaks"]], ids=["right", "wrong"])
def test_the_command_tells_and_returns_what_came_of_it(tmp_path, monkeypatch, capsys, wrong):
    found = Found(wrong=wrong)
    found.answered["chat"] += 3
    found.seconds["chat"] = [0.1, 0.2, 0.3]
    monkeypatch.setattr(serve_load, "load", lambda *arguments: found if arguments[1:] == (7, 2, 5) else None)
    file = tmp_path / "load.json"
    options = ["--requests", "7", "--clients", "2", "--seed", "5", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["serve_load", *options])
    with pytest.raises(SystemExit) as ended:
        serve_load.main()
    assert ended.value.code == len(wrong) and "3 answers in" in capsys.readouterr().out
    told = json.loads(file.read_text())
    assert told["wrong"] == wrong and told["answered"] == {"chat": 3} and told["clients"] == 2
