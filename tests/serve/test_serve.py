"""The server over real HTTP: OpenAI's own client, and refused requests."""

import io
import json
import socket
import time
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx
import openai
from commands import run
from PIL import Image
from serving import (
    CHAT,
    DRAW,
    EDIT,
    LIMITS,
    chat_body,
    data_url,
    decode_image,
    image_part,
    metric,
    png,
    running_server,
)

from bagel_rt.serve.limits import Limits

QUICK = {"num_timesteps": 3}


@pytest.fixture(scope="module")
def address():
    with running_server() as (address, _):
        yield address


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture
def http(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


# Requests of OpenAI's client


def test_generated_images_equal_the_library(client, bagel):
    response = client.images.generate(prompt="a cat", n=2, size="48x32", extra_body=QUICK | {"seed": 5})
    assert len(response.data) == 2
    for number, item in enumerate(response.data):
        expected = bagel.generate("a cat", size=(32, 48), seed=5 + number, **QUICK).image
        assert np.abs(np.asarray(decode_image(item.b64_json), int) - np.asarray(expected, int)).max() <= 1


def test_edit_takes_files_and_both_forms_of_cfg_interval(client, bagel):
    files = [("a.png", png(), "image/png"), ("b.png", png(32, 48, 1), "image/png")]
    sources = [Image.open(io.BytesIO(file[1])) for file in files]
    expected = bagel.edit(sources, "mix them", seed=2, cfg_interval=(0.2, 1), **QUICK).image
    for interval in ("[0.2, 1]", [0.2, 1]):
        request = QUICK | {"seed": 2, "cfg_interval": interval}
        response = client.images.edit(image=files, prompt="mix them", extra_body=request)
        assert (np.asarray(decode_image(response.data[0].b64_json)) == np.asarray(expected)).all()
    assert response.usage.input_tokens_details.image_tokens > response.usage.output_tokens > 0
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_edits_of_one_image_run_in_one_batch(client, bagel, http):
    before = metric(http, "bagel_rt_batch_size_count")
    response = client.images.edit(image=png(), prompt="brighter", n=3, extra_body=QUICK | {"seed": 2})
    for number, item in enumerate(response.data):
        expected = bagel.edit(Image.open(io.BytesIO(png())), "brighter", seed=2 + number, **QUICK).image
        assert np.abs(np.asarray(decode_image(item.b64_json), int) - np.asarray(expected, int)).max() <= 1
    assert metric(http, "bagel_rt_batch_size_count") == before + 1


def test_thought_is_returned_as_revised_prompt(client, bagel):
    request = QUICK | {"seed": 5, "think": True, "max_think_token_n": 6}
    response = client.images.generate(prompt="a cat", size="48x32", extra_body=request)
    result = bagel.generate("a cat", size=(32, 48), **request)
    assert response.data[0].revised_prompt == result.thought and response.data[0].seed == 5
    assert np.abs(np.asarray(decode_image(response.data[0].b64_json), int) - np.asarray(result.image, int)).max() <= 1


def test_shrinking_a_large_image_does_not_change_the_result(client, bagel):
    response = client.images.edit(image=png(250, 200), prompt="brighter", extra_body=QUICK | {"seed": 2})
    expected = bagel.edit(Image.open(io.BytesIO(png(250, 200))), "brighter", seed=2, **QUICK).image
    assert (np.asarray(decode_image(response.data[0].b64_json)) == np.asarray(expected)).all()


def test_chat_returns_text_and_usage(client, bagel):
    request = chat_body("look", image_part(data_url(png())), "what is it?", max_tokens=9, model="small")
    response = client.chat.completions.create(**request)
    assert response.choices[0].message.content and response.choices[0].finish_reason == "length"
    assert response.usage.completion_tokens == 9 and response.usage.prompt_tokens > 20
    plain = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "hello"}], max_completion_tokens=12
    )
    assert plain.choices[0].message.content == bagel.chat("hello", max_think_token_n=13)


def test_stream_pieces_join_to_the_whole_text(client):
    request = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and len([piece for piece in pieces if piece]) > 1
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_sampling_follows_the_seed(client):
    request = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 2}
    one, two, other = (client.chat.completions.create(**request, seed=seed) for seed in (1, 1, 2))
    assert one.choices[0].message.content == two.choices[0].message.content != other.choices[0].message.content


def test_interleaved_answer_equals_the_library(client, bagel, monkeypatch):
    # A text that every text contains: the model always draws.
    monkeypatch.setattr("bagel_rt.models.bagel.model.BagelModel.image_request", "")
    request = {"model": "small", "messages": [{"role": "user", "content": "draw"}], "max_tokens": 6, "seed": 3}
    how = {"modalities": ["text", "image"], "max_rounds": 2, "size": "48x32", **QUICK}
    expected = bagel.interleave(["draw"], max_rounds=2, size=(32, 48), seed=3, max_think_token_n=7, **QUICK)
    response = client.chat.completions.create(**request, extra_body=how)
    message = response.choices[0].message
    assert message.content == expected[0] + expected[2] and len(message.images) == 2
    assert response.usage.completion_tokens == 12 and response.choices[0].finish_reason == "length"
    for item, result in zip(message.images, expected[1::2], strict=True):
        drawn = decode_image(item["image_url"]["url"].partition(",")[2])
        assert (np.asarray(drawn) == np.asarray(result.image)).all()

    chunks = list(client.chat.completions.create(**request, extra_body=how, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    kinds = ["image" if hasattr(delta, "images") else "text" for delta in deltas if delta.content != ""]
    assert kinds[:4] == ["text", "image"] * 2

    again = [*request["messages"], message, {"role": "user", "content": "once more"}]
    response = client.chat.completions.create(**request | {"messages": again}, extra_body=how)
    assert len(response.choices[0].message.images) == 2


def test_system_prompt_does_not_count_against_the_limit(client):
    request = {"model": "small", "messages": [{"role": "user", "content": "draw"}], "max_tokens": 4}
    response = client.chat.completions.create(**request, extra_body={"modalities": ["text", "image"], **QUICK})
    assert response.usage.prompt_tokens > LIMITS.prompt_tokens  # it is counted, though


def test_null_and_neutral_values_are_accepted(http):
    request = chat_body("x", max_tokens=2, temperature=None, top_p=1, seed=None, frequency_penalty=0, stream=None)
    assert http.post(CHAT, json=request).status_code == 200
    assert http.post(DRAW, json={"prompt": "x", "size": "32x32", "n": None, **QUICK}).status_code == 200


def test_defaults_stay_within_the_limits(http):
    with running_server(replace(LIMITS, steps=2, written_tokens=3, side=50)) as (address, _):
        drawn = httpx.post(f"{address}{DRAW}", json={"prompt": "x", "think": True}, timeout=60).json()
        assert drawn["size"] == "48x48" and len(drawn["data"][0]["revised_prompt"]) > 0
        request = httpx.post(f"{address}{CHAT}", json=chat_body("x"), timeout=60).json()
        assert request["usage"]["completion_tokens"] <= 3


def test_models_health_and_metrics(client, http):
    assert [model.id for model in client.models.list()] == ["small"] and client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="must be 'small' or left out, got 'gpt-4'"):
        client.models.retrieve("gpt-4")
    assert http.get("/health").json() == {"status": "ok", "model": "small", "queue": 0}
    before = metric(http, "bagel_rt_images_total")
    client.images.generate(prompt="a cat", size="32x32", extra_body=QUICK)
    assert metric(http, "bagel_rt_images_total") == before + 1
    assert metric(http, 'bagel_rt_requests_total{route="/v1/images/generations",status="200"}') >= 1


def test_wrong_method_returns_the_allowed_one(http):
    response = http.get(DRAW)
    assert response.status_code == 405 and response.headers["allow"] == "POST"


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_image_has_the_requested_format(http, form):
    body = {"prompt": "a cat", "size": "32x32", "output_format": form, **QUICK}
    response = http.post("/v1/images/generations", json=body).json()
    assert decode_image(response["data"][0]["b64_json"]).format.lower() == form


# Refused requests


def bomb(side) -> bytes:
    out = io.BytesIO()
    Image.new("1", (side, side)).save(out, "PNG")
    return out.getvalue()


REFUSED = {
    "invalid JSON": (DRAW, b"{", "the body must be JSON"),
    "a JSON array": (DRAW, b"[1]", "the body must be a JSON object, got list"),
    "nesting": (DRAW, b"[" * 60_000, "the body must be JSON"),
    "many values": (DRAW, b'{"prompt": [' + b"[]," * 99_999 + b"0]}", "commas, colons and brackets"),
    "a surrogate as a name": (
        DRAW,
        b'{"prompt": "x", "\\ud800": 1}',
        r"\ud800 is not a supported field",
    ),
    "no prompt": (DRAW, {}, "prompt is missing"),
    "a prompt of another type": (DRAW, {"prompt": 3}, "prompt must be a string, got 3"),
    "an unknown field": (
        DRAW,
        {"prompt": "x", "stlye": "vivid"},
        "stlye is not a supported field. Supported are prompt,",
    ),
    "image URLs": (DRAW, {"prompt": "x", "response_format": "url"}, "response_format"),
    "a malformed size": (DRAW, {"prompt": "x", "size": "big"}, "size must be auto or WIDTHxHEIGHT"),
    "a size off the grid": (DRAW, {"prompt": "x", "size": "50x50"}, "multiples of 16"),
    "a size beyond the limit": (
        DRAW,
        {"prompt": "x", "size": "512x512"},
        "size must be at most 96 pixels on the longer side",
    ),
    "digits of another script": (DRAW, {"prompt": "x", "size": "\u0663\u0662x32"}, "size must be auto"),
    "too many images": (DRAW, {"prompt": "x", "n": 9}, "n must be at most 3 on this server, got 9"),
    "too many steps": (
        DRAW,
        {"prompt": "x", "num_timesteps": 1000000},
        "num_timesteps must be an integer from 2 to 1000",
    ),
    "guidance out of range": (DRAW, {"prompt": "x", "cfg_text_scale": 1e9}, "must be a number from 0 to 100"),
    "NaN": (
        DRAW,
        b'{"prompt": "x", "cfg_text_scale": NaN}',
        "the body must be JSON, which has no NaN",
    ),
    "a negative seed": (DRAW, {"prompt": "x", "seed": -1}, "seed must be an integer from 0"),
    "a long prompt": (DRAW, {"prompt": "word " * 1000}, "prompt must have at most 200 tokens on this server, got"),
    "a very long prompt": (DRAW, {"prompt": "word " * 9999}, "at most 200 tokens on this server, got 49995 characters"),
    "settings of thoughts without one": (DRAW, {"prompt": "x", "do_sample": True}, "do_sample has no effect"),
    "many marks": (DRAW, {"prompt": "a" + "\u0315\u0f73" * 50}, "at most 64 combining marks"),
    "lone surrogates": (DRAW, b'{"prompt": "\\ud800"}', "prompt must be valid Unicode"),
    "the name of another model": (DRAW, {"prompt": "x", "model": "dall-e-3"}, "got 'dall-e-3'"),
    "no messages": (CHAT, {"messages": []}, "messages"),
    "no content": (CHAT, {"messages": [{"role": "user"}]}, "messages must have content"),
    "an unknown role": (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "role"),
    "too many choices": (CHAT, chat_body("x", n=4), "n must be at most 3 on this server, got 4"),
    "choices with images": (CHAT, chat_body("x", n=2, modalities=["image"]), "n must be 1 if the answer"),
    "a large max_tokens": (CHAT, chat_body("x", max_tokens=10**9), "max_tokens must be at most"),
    "max_tokens of 0": (CHAT, chat_body("x", max_tokens=0), "max_tokens must be >= 1, got 0"),
    "a negative temperature": (CHAT, chat_body("x", temperature=-1), "temperature"),
    "sampling without a temperature": (CHAT, chat_body("x", top_p=0.5), "Set temperature above 0"),
    "a size without images": (CHAT, chat_body("x", size="32x32"), "size has no effect without images"),
    "many rounds": (
        CHAT,
        chat_body("x", modalities=["image"], max_rounds=4),
        "max_rounds must be at most 3",
    ),
    "max_rounds of 0": (CHAT, chat_body("x", modalities=["image"], max_rounds=0), "max_rounds must be >= 1, got 0"),
    "a network address": (CHAT, chat_body(image_part("http://example.com/a.png")), "must be a data: URL"),
    "a file": (CHAT, chat_body(image_part("file:///etc/passwd")), "must be a data: URL"),
    "a data URL without data": (CHAT, chat_body(image_part("data:image/png;base64")), "got one without a comma"),
    "damaged base64": (CHAT, chat_body(image_part("data:image/png;base64,a!b")), "with valid base64"),
    "not an image": (CHAT, chat_body(image_part("data:image/png;base64,aGVsbG8=")), "not an image"),
    "half an image": (CHAT, chat_body(image_part(data_url(png()[:200]))), "damaged"),
    "a bomb": (CHAT, chat_body(image_part(data_url(bomb(9000)))), "got 9000x9000"),
    "a larger bomb": (CHAT, chat_body(image_part(data_url(bomb(20000)))), "decompression bomb"),
    "many images": (CHAT, chat_body(*[image_part(data_url(png()))] * 3), "at most 2 images, got 3"),
}


@pytest.mark.parametrize("route, body, message", REFUSED.values(), ids=REFUSED)
def test_invalid_request_is_refused_with_a_reason(http, route, body, message):
    response = http.post(route, **({"content": body} if isinstance(body, bytes) else {"json": body}))
    assert 400 <= response.status_code < 500, response.text
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "files, fields, message",
    [
        ({}, {"prompt": "x"}, "image is missing"),
        ({"image": png()}, {}, "prompt is missing"),
        ({"image": b"GIF89a"}, {"prompt": "x"}, "not an image in one of the formats PNG"),
        ({"mask": png()}, {"prompt": "x"}, "mask must be left out"),
        ({"photo": png()}, {"prompt": "x"}, "must have files named image or image[], got photo"),
        ({}, {"prompt": "x", "image": "cat.png"}, "image must be a file, got a text"),
        ({"image": png()}, {"prompt": "x", "cfg_interval": "[1"}, "must be JSON"),
        ({"image": png()}, {"prompt": "x", "cfg_interval": '[0, 1], "n": 2'}, "cfg_interval must be JSON"),
        ({"image": png()}, {"prompt": "x", "seed": "1_0"}, "seed must be an integer, got '1_0'"),
        ({"image": png()}, {"prompt": "x", "seed": " 1"}, "seed must be an integer, got ' 1'"),
        ({"image": png()}, {"prompt": ["x", "y"]}, "prompt must be given once"),
        ({"image": png()}, {"prompt": "x", "cfg_interval": ["[0, 1]", "[0, 1]"]}, "cfg_interval must be given once"),
        (
            {"image": png()},
            {"prompt": "x", "cfg_interval": "1", "cfg_interval[]": "2"},
            "got cfg_interval and cfg_interval[]",
        ),
        (
            {"image": png()},
            {"prompt": "x", "cfg_interval[]": "2", "cfg_interval": "1"},
            "got cfg_interval and cfg_interval[]",
        ),
        ({"image": png()}, {"prompt": "x", "n": "many"}, "n must be an integer, got 'many'"),
        (
            {"image": png()},
            {"prompt": "x", "size": "32x32"},
            "size must be auto or 96x64, the size of the last image for the model, got '32x32'",
        ),
    ],
)
def test_invalid_form_is_refused_with_a_reason(http, files, fields, message):
    response = http.post(EDIT, files=files, data=fields)
    assert response.status_code == 400 and message in response.json()["error"]["message"], response.text


def test_many_combining_marks_do_not_block_the_server(http):
    begun = time.monotonic()  # normalizing them would block the server for a minute
    for prompt in ("a" + "\u0315" * 1500 + "\u0300" * 1500, "a" + "\u0f73" * 3000):
        assert "combining marks" in http.post(DRAW, json={"prompt": prompt}).json()["error"]["message"]
    request = chat_body("हिन्दी ข้อความ́ é", max_tokens=2)
    assert http.post(CHAT, json=request).status_code == 200
    assert time.monotonic() - begun < 20


def test_only_forms_in_utf_8_are_decoded(http):
    # Python decodes a text of 1 MB in Punycode for hours, and would do so in the server's only loop.
    body = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + b"-a" * 100_000 + b"\r\n--b--\r\n"
    for charset in ("punycode", "utf-7", "utf-16"):
        kind = {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}
        response = http.post(EDIT, content=body, headers=kind, timeout=10)
        assert response.status_code == 400 and charset in response.json()["error"]["message"]


@pytest.mark.parametrize("route", [DRAW, EDIT])
def test_large_body_is_refused_while_received(http, route):
    def pieces():  # without a length
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        for _ in range(LIMITS.body // 65536 + 1):
            yield b"y" * 65536

    kind = {"content-type": "multipart/form-data; boundary=b"} if route == EDIT else {}
    for content in (b"x" * (LIMITS.body + 1), pieces()):
        response = http.post(route, content=content, headers=kind)
        assert response.status_code == 413 and "must have at most" in response.json()["error"]["message"]


def test_api_key_is_required():
    with running_server(keys=["other", "schlüssel"]) as (address, _), httpx.Client(base_url=address) as http:
        assert http.get("/health").status_code == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic schl"}):
            response = http.get("/v1/models", headers=header)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer schlüssel".encode()}
        assert http.get("/v1/models", headers=right).status_code == 200


def test_server_error_does_not_leak_details(address, http, monkeypatch):
    def fail(*_):
        raise RuntimeError("secret of /root/model")

    monkeypatch.setattr("bagel_rt.engine.Engine.run_images", fail)
    response = http.post(DRAW, json={"prompt": "x", "size": "32x32"})
    assert response.status_code == 500 and "secret" not in response.text and "Traceback" not in response.text


def test_serve_checks_its_options(tmp_path):
    def serve(*options, **environment):
        result = run("serve", *options, env=environment)
        return result.exit_code, result.stderr

    assert serve("--queue", "0") == (2, "bagel-rt: error: --queue must be an integer >= 1, got 0.\n")
    assert serve("--batch", "65")[1].startswith("bagel-rt: error: --batch must be an integer from 1 to 64, got 65")
    assert serve("--model", str(tmp_path / "no"), "--port", "0")[0] == 2
    assert "BAGEL_RT_API_KEY is set but empty" in serve(BAGEL_RT_API_KEY=" ")[1]
    assert "--replicas 2 needs --ray: a process has one model" in serve("--replicas", "2", "--port", "0")[1]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, message = serve("--port", str(taken.getsockname()[1]))
        assert code == 2 and "cannot bind" in message


@pytest.mark.parametrize("fields", [{"seconds": float("nan")}, {"grace": float("inf")}, {"steps": 1}, {"images": 64}])
def test_invalid_limits_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Limits(**fields)


def test_every_error_body_is_json(http):
    for response in (http.get("/v1/nothing"), http.get(DRAW), http.post("/v1/models"), http.post(f"{DRAW}/")):
        assert response.status_code in (404, 405) and json.loads(response.text)["error"]["message"]


def test_unknown_model_name_is_not_logged_as_a_fault(http, caplog):
    assert http.get("/v1/models/nope").status_code == 404
    assert not [record for record in caplog.records if record.exc_info]
