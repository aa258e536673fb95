"""Operating the server: request ids, logs, metrics, health."""

import json
import logging
import ssl
import threading

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx
import openai
from conftest import CHECKPOINT
from serving import CHAT, DRAW, IMAGE, LIMITS, chat_body, metric, running_server, wait_until

from bagel_rt import Bagel
from bagel_rt.serve.app import create_app
from bagel_rt.serve.middleware import read_keys
from bagel_rt.serve.request_log import JsonFormatter, TextFormatter
from bagel_rt.serve.run import make_server


@pytest.fixture(scope="module")
def address():
    with running_server(keys=["secret"]) as (address, _):
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


def test_one_key_is_not_a_list_of_letters():
    with running_server(keys="secret") as (address, _):
        statuses = [
            httpx.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code
            for key in ("secret", "s", "t")
        ]
    assert statuses == [200, 401, 401]


def test_keys_are_read_from_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv("BAGEL_RT_API_KEY", raising=False)
    assert read_keys() == ()
    file = tmp_path / "keys"
    monkeypatch.setenv("BAGEL_RT_API_KEY_FILE", str(file))
    with pytest.raises(ValueError, match="BAGEL_RT_API_KEY_FILE must name a text file"):
        read_keys()
    file.write_text("\n")
    with pytest.raises(ValueError, match="set but empty"):
        read_keys()
    file.write_text("one\n\n two \n")
    assert read_keys() == ("one", "two")
    monkeypatch.setenv("BAGEL_RT_API_KEY", "three")
    with pytest.raises(ValueError, match="both set"):
        read_keys()


PAGE = "https://chat.example.com"


@pytest.fixture(scope="module")
def browsed():
    """A server for the browser of a user, with one allowed page."""
    with running_server(allowed_hosts=["localhost", "127.0.0.1"], origins=[PAGE]) as (address, _):
        yield address


@pytest.mark.parametrize(
    "headers, code",
    [
        ({}, None),
        ({"Host": "localhost:8000"}, None),
        ({"Host": "LOCALHOST"}, None),
        ({"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}, "host_not_allowed"),
        ({"Host": "[::1"}, "host_not_allowed"),
        ({"Host": "localhost", "Origin": "http://localhost"}, None),
        ({"Host": "localhost", "Origin": "http://localhost:3000"}, "origin_not_allowed"),
        ({"Origin": "https://evil.example"}, "origin_not_allowed"),
        ({"Origin": "null"}, "origin_not_allowed"),
        ({"Origin": PAGE}, None),
    ],
)
def test_pages_of_others_cannot_use_the_server(browsed, headers, code):
    response = httpx.get(f"{browsed}/v1/models", headers=headers)
    assert response.status_code == (403 if code else 200)
    if code:
        assert response.json()["error"]["code"] == code


def test_allowed_page_passes_the_browsers_checks(browsed):
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = httpx.options(f"{browsed}{CHAT}", headers=asked)
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    response = httpx.post(f"{browsed}{CHAT}", json=chat_body("x", max_tokens=2), headers={"Origin": PAGE}, timeout=60)
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == PAGE


def test_https_with_a_certificate(tmp_path):
    trustme = pytest.importorskip("trustme")
    authority, trusting = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(trusting)
    certificate, chain, key = authority.issue_cert("127.0.0.1"), tmp_path / "chain.pem", tmp_path / "key.pem"
    certificate.private_key_pem.write_to_path(key)
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(chain, append=True)
    with running_server(tls_cert=chain, tls_key=key) as (address, _):
        assert address.startswith("https") and httpx.get(f"{address}/health", verify=trusting).status_code == 200
    with pytest.raises(ValueError, match="cannot load the TLS certificate"), running_server(tls_cert=key, tls_key=key):
        pass


def test_server_listens_while_the_model_is_loaded():
    go, bagel = threading.Event(), Bagel.from_pretrained(CHECKPOINT, device="cpu")

    def load():
        go.wait(60)
        return bagel

    with running_server(bagel=load) as (address, _), httpx.Client(base_url=address, timeout=60) as http:
        try:
            assert http.get("/health/live").json() == {"status": "loading", "model": "small", "queue": 0}
            assert http.get("/health/ready").status_code == http.get("/health").status_code == 503
            response = http.post(DRAW, json=IMAGE)
            assert response.status_code == 503 and response.json()["error"]["code"] == "loading"
            assert response.headers["retry-after"] and http.get("/v1/models").status_code == 200
        finally:
            go.set()
        wait_until(lambda: http.get("/health/ready").status_code == 200)
        assert http.post(DRAW, json=IMAGE).status_code == 200


def test_server_that_is_stopped_does_not_wait_for_the_model():
    go = threading.Event()
    with running_server(bagel=lambda: go.wait(60)):
        pass
    go.set()


def test_server_ends_with_the_error_of_loading():
    def load():
        raise ValueError("the weights are damaged")

    server = make_server(create_app(load, "small"), port=0, log_level="error")
    with pytest.raises(ValueError, match="the weights are damaged"):
        server.run()


def test_openapi_document_describes_the_bodies(http):
    document = http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    def resolve(value):
        if isinstance(value, dict):
            if "$ref" in value:
                assert value["$ref"].removeprefix("#/components/schemas/") in schemas
            for inner in value.values():
                resolve(inner)
        elif isinstance(value, list):
            for inner in value:
                resolve(inner)

    resolve(document)
    assert set(document["paths"]) >= {DRAW, CHAT, "/v1/images/edits", "/health/live", "/metrics"}
    generation, chat = schemas["Generation"]["properties"], schemas["Chat"]["properties"]
    assert generation["num_timesteps"]["type"] == "integer" and "description" in generation["cfg_text_scale"]
    assert generation["quality"]["enum"] == ["auto", "standard", None] and "image" in schemas["Edit"]["properties"]
    assert chat["tools"]["enum"] == [[], None] and {"type": "string"} in chat["stop"]["anyOf"]
    assert {"type": "string"} in schemas["Message"]["properties"]["content"]["anyOf"]
