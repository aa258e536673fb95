"""Operating the server: request ids, logs, metrics, health."""

import json
import logging

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx  # noqa: E402
import openai  # noqa: E402
from serving import CHAT, DRAW, IMAGE, LIMITS, chat_body, metric, running_server, wait_until  # noqa: E402

from bagel_rt.serve.request_log import JsonFormatter, TextFormatter  # noqa: E402


@pytest.fixture(scope="module")
def address():
    with running_server(key="secret") as (address, _):
        yield address


@pytest.fixture
def http(address):
    with httpx.Client(base_url=address, timeout=60, headers={"Authorization": "Bearer secret"}) as client:
        yield client


def test_every_response_has_a_request_id(address, http):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret")
    response = client.chat.completions.create(**chat_body("x", max_tokens=2, model="small"))
    assert len(response._request_id) == 32
    assert http.get("/v1/nothing").headers["x-request-id"] != http.get("/v1/nothing").headers["x-request-id"]
    refused = httpx.get(f"{address}/v1/models")
    assert refused.status_code == 401 and refused.headers["x-request-id"]


def test_id_of_a_client_is_kept_unless_it_could_forge_a_log_line(http):
    for sent, kept in (("trace-1.a_b", True), ("x" * 65, False), ("a b", False), ("", False)):
        headers = {"X-Request-Id": sent}
        assert (http.get("/v1/models", headers=headers).headers["x-request-id"] == sent) is kept


def test_log_line_has_id_status_and_duration(http, caplog):
    with caplog.at_level(logging.INFO, "bagel_rt.access"):
        http.post(DRAW, json={}, headers={"X-Request-Id": "first"})
        http.get("/v1/a%0Ab", headers={"X-Request-Id": "second"})
        http.get("/health")
        wait_until(lambda: len(caplog.records) == 2)
    first, second = caplog.records
    assert (first.request_id, first.method, first.path, first.status) == ("first", "POST", DRAW, 400)
    assert first.seconds > 0 and f"POST {DRAW} 400 in " in first.getMessage()
    assert second.path == "/v1/a%0Ab" and second.status == 404
    line = json.loads(JsonFormatter().format(first))
    assert (line["request_id"], line["status"], line["level"]) == ("first", 400, "INFO")
    assert "\n" not in TextFormatter().format(second)


def test_failure_of_the_model_is_logged_with_the_request_id(http, caplog, monkeypatch):
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr("bagel_rt.engine.Engine.run_images", fail)
    assert http.post(DRAW, json=IMAGE, headers={"X-Request-Id": "the-id"}).status_code == 500
    assert any(record.exc_info and "the-id" in record.getMessage() for record in caplog.records)


def test_metrics_count_refused_requests(address, http):
    def count(route, status):
        return metric(http, f'bagel_rt_requests_total{{route="{route}",status="{status}"}}')

    before = [count(DRAW, 401), count(DRAW, 413), count("other", 404)]
    httpx.post(f"{address}{DRAW}", json=IMAGE)
    http.post(DRAW, content=b"x" * (LIMITS.body + 1))
    http.get("/v1/nothing")
    http.get("/somewhere/else")
    wait_until(
        lambda: (
            [count(DRAW, 401), count(DRAW, 413), count("other", 404)] == [before[0] + 1, before[1] + 1, before[2] + 2]
        )
    )


def test_metrics_have_the_time_to_the_first_token(http):
    before = metric(http, "bagel_rt_first_token_seconds_count")
    for stream in (False, True):
        assert http.post(CHAT, json=chat_body("x", max_tokens=2, stream=stream)).status_code == 200
    wait_until(lambda: metric(http, "bagel_rt_first_token_seconds_count") == before + 2)
    assert metric(http, "bagel_rt_first_token_seconds_sum") > 0
