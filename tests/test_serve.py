"""The server over real HTTP: OpenAI's own client, raw requests, and what must be refused."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx  # noqa: E402
import openai  # noqa: E402
import uvicorn  # noqa: E402
from conftest import CHECKPOINT  # noqa: E402
from PIL import Image  # noqa: E402

from bagel_rt import Bagel  # noqa: E402
from bagel_rt.serve import pictures  # noqa: E402
from bagel_rt.serve.app import create_app  # noqa: E402
from bagel_rt.serve.limits import Limits  # noqa: E402

QUICK = {"num_timesteps": 3}
LIMITS = Limits(body=1 << 20, pixels=1 << 16, images=2, prompt_tokens=200, side=96, steps=2000, pictures=3, queue=4)


@contextmanager
def running(limits=LIMITS, key=None, hosts=frozenset()):
    """A server in a thread; its address and application."""
    app = create_app(Bagel.from_pretrained(CHECKPOINT, device="cpu"), "small", limits, key, hosts)
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address():
    with running() as (address, _):
        yield address


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture
def http(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def png(width=48, height=32, seed=0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def opened(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def metric(http, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


# What OpenAI's client asks for


def test_pictures_are_the_library_s(client, bagel):
    answer = client.images.generate(prompt="a cat", n=2, size="48x32", extra_body=QUICK | {"seed": 5})
    assert len(answer.data) == 2
    for number, item in enumerate(answer.data):
        wanted = bagel.generate("a cat", size=(32, 48), seed=5 + number, **QUICK).image
        assert np.abs(np.asarray(opened(item.b64_json), int) - np.asarray(wanted, int)).max() <= 1


def test_an_edit_takes_files(client, bagel):
    files = [("a.png", png(), "image/png"), ("b.png", png(32, 48, 1), "image/png")]
    answer = client.images.edit(image=files, prompt="mix them", extra_body=QUICK | {"seed": 2, "cfg_interval": "[0, 1]"})
    sources = [Image.open(io.BytesIO(file[1])) for file in files]
    wanted = bagel.edit(sources, "mix them", seed=2, **QUICK).image
    assert (np.asarray(opened(answer.data[0].b64_json)) == np.asarray(wanted)).all()


def test_a_chat_answers_and_counts(client, bagel):
    content = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": data_url(png())}},
        {"type": "text", "text": "what is it?"},
    ]
    answer = client.chat.completions.create(model="small", messages=[{"role": "user", "content": content}], max_tokens=9)
    assert answer.choices[0].message.content and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8 and answer.usage.prompt_tokens > 20
    plain = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "hello"}], max_completion_tokens=12
    )
    assert plain.choices[0].message.content == bagel.chat("hello", max_think_token_n=12)


def test_a_stream_is_the_whole_in_pieces(client):
    said = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**said)
    chunks = list(client.chat.completions.create(**said, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and len([piece for piece in pieces if piece]) > 1
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_sampling_follows_the_seed(client):
    said = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 2}
    one, two, other = (client.chat.completions.create(**said, seed=seed) for seed in (1, 1, 2))
    assert one.choices[0].message.content == two.choices[0].message.content != other.choices[0].message.content


def test_an_answer_of_texts_and_pictures(client):
    said = {"model": "small", "messages": [{"role": "user", "content": "draw"}], "max_tokens": 6}
    answer = client.chat.completions.create(**said, extra_body={"modalities": ["text", "image"], **QUICK})
    assert isinstance(answer.choices[0].message.content, str)


def test_models_health_and_metrics(client, http):
    assert [model.id for model in client.models.list()] == ["small"] and client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not here: allowed is 'small'"):
        client.models.retrieve("gpt-4")
    assert http.get("/health").json() == {"status": "ok", "model": "small", "queue": 0}
    before = metric(http, "bagel_rt_pictures_total")
    client.images.generate(prompt="a cat", size="32x32", extra_body=QUICK)
    assert metric(http, "bagel_rt_pictures_total") == before + 1
    assert metric(http, 'bagel_rt_requests_total{route="/v1/images/generations",status="200"}') >= 1


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_pictures_come_in_the_format_that_is_asked_for(http, form):
    body = {"prompt": "a cat", "size": "32x32", "output_format": form, **QUICK}
    answer = http.post("/v1/images/generations", json=body).json()
    assert opened(answer["data"][0]["b64_json"]).format.lower() == form


# What is refused, with a reason


def bomb() -> bytes:
    out = io.BytesIO()
    Image.new("1", (20000, 20000)).save(out, "PNG")
    return out.getvalue()


DRAW, CHAT = "/v1/images/generations", "/v1/chat/completions"


def asked(*parts) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def picture(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


REFUSED = {
    "no JSON": (DRAW, b"{", "the body is not JSON"),
    "no object": (DRAW, b"[1]", "the body is a JSON list"),
    "nesting": (DRAW, b"[" * 200_000, "the body is not JSON"),
    "no prompt": (DRAW, {}, "prompt: Field required"),
    "a prompt that is none": (DRAW, {"prompt": 3}, "prompt: Input should be a valid string"),
    "an unknown field": (DRAW, {"prompt": "x", "stlye": "vivid"}, "stlye: Extra inputs are not permitted"),
    "addresses of pictures": (DRAW, {"prompt": "x", "response_format": "url"}, "response_format"),
    "a size that is none": (DRAW, {"prompt": "x", "size": "big"}, "size is 'big'"),
    "a size off the grid": (DRAW, {"prompt": "x", "size": "50x50"}, "multiples of 16"),
    "a size beyond the limit": (DRAW, {"prompt": "x", "size": "512x512"}, "this server allows up to 96"),
    "digits of another script": (DRAW, {"prompt": "x", "size": "\u0663\u0662x32"}, "size is"),
    "too many pictures": (DRAW, {"prompt": "x", "n": 9}, "n is 9: this server allows up to 3"),
    "too many steps": (DRAW, {"prompt": "x", "num_timesteps": 1000000}, "num_timesteps is 1000000"),
    "guidance out of range": (DRAW, {"prompt": "x", "cfg_text_scale": 1e9}, "cfg_text_scale is"),
    "a number that is none": (DRAW, b'{"prompt": "x", "cfg_text_scale": NaN}', "cfg_text_scale is nan"),
    "a negative seed": (DRAW, {"prompt": "x", "seed": -1}, "seed is -1"),
    "a long prompt": (DRAW, {"prompt": "word " * 5000}, "this server allows up to 200"),
    "lone surrogates": (DRAW, b'{"prompt": "\\ud800"}', "surrogates"),
    "another model": (DRAW, {"prompt": "x", "model": "dall-e-3"}, "'dall-e-3' is not here"),
    "no messages": (CHAT, {"messages": []}, "messages"),
    "an unknown role": (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "role"),
    "several choices": (CHAT, {**asked({"type": "text", "text": "x"}), "n": 2}, "n: Input should be 1"),
    "too long an answer": (CHAT, {**asked({"type": "text", "text": "x"}), "max_tokens": 10**9}, "max_tokens is"),
    "a negative temperature": (CHAT, {**asked({"type": "text", "text": "x"}), "temperature": -1}, "temperature"),
    "a network address": (CHAT, asked(picture("http://example.com/a.png")), "allowed are data: URLs"),
    "a file": (CHAT, asked(picture("file:///etc/passwd")), "allowed are data: URLs"),
    "no base64": (CHAT, asked(picture("data:image/png,abc")), "without base64"),
    "damaged base64": (CHAT, asked(picture("data:image/png;base64,a!b")), "base64 is damaged"),
    "no picture": (CHAT, asked(picture("data:image/png;base64,aGVsbG8=")), "not a picture"),
    "half a picture": (CHAT, asked(picture(data_url(png()[:200]))), "damaged"),
    "a bomb": (CHAT, asked(picture(data_url(bomb()))), "20000 x 20000 pixels"),
    "many pictures": (CHAT, asked(*[picture(data_url(png()))] * 3), "3 pictures: this server allows up to 2"),
}


@pytest.mark.parametrize("route, body, message", REFUSED.values(), ids=REFUSED)
def test_a_bad_request_is_told_why(http, route, body, message):
    answer = http.post(route, **({"content": body} if isinstance(body, bytes) else {"json": body}))
    assert 400 <= answer.status_code < 500, answer.text
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "files, fields, message",
    [
        ({}, {"prompt": "x"}, "image is missing"),
        ({"image": png()}, {}, "prompt: Field required"),
        ({"image": b"GIF89a"}, {"prompt": "x"}, "the given 6 bytes"),
        ({"mask": png()}, {"prompt": "x"}, "mask is a file: allowed are files named image"),
        ({"image": png()}, {"prompt": "x", "cfg_interval": "[1"}, "not JSON"),
        ({"image": png()}, {"prompt": "x", "n": "many"}, "n: Input should be a valid integer"),
        ({"image": png()}, {"prompt": "x", "size": "32x32"}, "size: Input should be 'auto'"),
    ],
)
def test_a_bad_form_is_told_why(http, files, fields, message):
    answer = http.post("/v1/images/edits", files=files or {"other": ("", b"")}, data=fields)
    if not files:
        answer = http.post("/v1/images/edits", data=fields)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text


def test_a_large_body_is_refused_as_it_comes(http, address):
    answer = http.post(DRAW, content=b"x" * (LIMITS.body + 1))
    assert answer.status_code == 413 and "has over" in answer.json()["error"]["message"]

    def endless():
        for _ in range(400):
            yield b"y" * 65536

    with pytest.raises((httpx.HTTPError, AssertionError)):
        assert http.post(DRAW, content=endless()).status_code != 413


def test_a_key_is_asked_for():
    with running(key="schlüssel") as (address, _), httpx.Client(base_url=address) as http:
        assert http.get("/health").status_code == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic schl"}):
            answer = http.get("/v1/models", headers=header)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer schlüssel".encode()}
        assert http.get("/v1/models", headers=right).status_code == 200


def test_an_error_of_ours_says_nothing_of_itself(address, http, monkeypatch):
    def fail(*_):
        raise RuntimeError("secret of /root/model")

    monkeypatch.setattr("bagel_rt.engine.Engine.run_images", fail)
    answer = http.post(DRAW, json={"prompt": "x", "size": "32x32"})
    assert answer.status_code == 500 and "secret" not in answer.text and "Traceback" not in answer.text


@pytest.mark.parametrize(
    "host, addresses, allowed",
    [
        ("pictures.example", ["93.184.216.34"], True),
        ("inside.example", ["10.0.0.7"], False),
        ("mixed.example", ["93.184.216.34", "127.0.0.1"], False),
        ("metadata.example", ["169.254.169.254"], False),
        ("mapped.example", ["::ffff:192.168.0.1"], False),
        ("six.example", ["fd00::1"], False),
    ],
)
def test_only_public_addresses_are_fetched(monkeypatch, host, addresses, allowed):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    if allowed:
        assert pictures.public_address(host, 443) == addresses[0]
    else:
        with pytest.raises(ValueError, match="which is not public"):
            pictures.public_address(host, 443)
    with pytest.raises(ValueError, match="allowed are data: URLs, or https addresses on good.example"):
        pictures.read_url(f"https://{host}/a.png", LIMITS, frozenset({"good.example"}))


# Load, cancellation, and the end


def test_a_full_queue_answers_429_and_equal_sizes_are_drawn_together():
    with running(Limits(queue=3, steps=2000, batch=4)) as (address, app):
        slow = {"prompt": "x", "size": "32x32", "num_timesteps": 600, "seed": 1}
        codes, answers = [], []

        def post():
            answer = httpx.post(f"{address}{DRAW}", json=slow, timeout=120)
            codes.append(answer.status_code)
            answers.append(answer)

        threads = [threading.Thread(target=post) for _ in range(7)]
        for number, thread in enumerate(threads):
            thread.start()
            if number == 0:
                time.sleep(0.3)  # the first is being drawn, the others meet a queue of three
        for thread in threads:
            thread.join()
        assert sorted(set(codes)) == [200, 429] and codes.count(200) == 4
        busy = next(answer for answer in answers if answer.status_code == 429)
        assert busy.headers["retry-after"] and busy.json()["error"]["type"] == "rate_limit_error"
        with httpx.Client(base_url=address) as http:
            assert metric(http, "bagel_rt_batch_size_count") == 2 and metric(http, "bagel_rt_batch_size_sum") == 4


def test_a_client_that_leaves_frees_the_model():
    with running(Limits(steps=2000)) as (address, app), httpx.Client(base_url=address) as http:
        worker = app.state.server.worker
        with pytest.raises(httpx.ReadTimeout):
            http.post(DRAW, json={"prompt": "x", "num_timesteps": 1000}, timeout=0.5)
        with http.stream("POST", CHAT, json={**asked({"type": "text", "text": "x"}), "stream": True}) as answer:
            next(answer.iter_lines())
        end = time.monotonic() + 10
        while worker.running or worker.waiting:
            assert time.monotonic() < end
            time.sleep(0.02)
        cache = app.state.server.bagel.cache
        assert cache.free_slots == cache.slots


def test_a_request_that_takes_too_long_ends():
    with running(Limits(steps=2000, seconds=0.5)) as (address, app):
        answer = httpx.post(f"{address}{DRAW}", json={"prompt": "x", "num_timesteps": 1000}, timeout=30)
        assert answer.status_code == 504 and "took too long" in answer.json()["error"]["message"]
        assert httpx.post(f"{address}{DRAW}", json={"prompt": "x", "size": "32x32", **QUICK}).status_code == 200


def test_sigterm_lets_requests_finish(tmp_path):
    command = [sys.executable, "-m", "bagel_rt.cli", "serve", "--port", "0", "--model", str(CHECKPOINT), "--grace", "20",
               "--device", "cpu"]  # fmt: skip
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        lines = []
        while "running on" not in (lines or [""])[-1]:
            lines.append(server.stderr.readline())
            assert lines[-1], "".join(lines)
        address = next(word for word in lines[-1].split() if word.startswith("http"))
        codes = []

        def post():
            body = {"prompt": "x", "size": "96x96", "num_timesteps": 150}
            codes.append(httpx.post(f"{address}{DRAW}", json=body, timeout=60).status_code)

        threads = [threading.Thread(target=post) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert codes == [200] * 3
        assert server.wait(30) in (0, 143)
    finally:
        server.kill()
        server.stderr.close()


def test_serve_checks_its_options(tmp_path):
    def said(*options):
        command = [sys.executable, "-m", "bagel_rt.cli", "serve", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    assert said("--queue", "0") == (2, "bagel-rt: error: queue is 0: allowed are numbers above 0\n")
    assert said("--batch", "65")[1].startswith("bagel-rt: error: batch is 65")
    assert said("--model", str(tmp_path / "no"))[0] == 2


def test_the_body_of_an_error_is_json_everywhere(http):
    for answer in (http.get("/v1/nothing"), http.get(DRAW), http.post("/v1/models")):
        assert answer.status_code in (404, 405) and json.loads(answer.text)["error"]["message"]


def test_the_server_s_files_hold_no_route_that_fetches_by_itself():
    assert "follow_redirects" not in Path(pictures.__file__).read_text()
