"""What API clients and frameworks send: values that ask for nothing, stop strings, formats, and errors they read."""

import base64
import io
import json
import random
import urllib.parse

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx
import numpy as np
import openai
import torch
from conftest import CHECKPOINT
from PIL import Image
from serving import CHAT, DRAW, EDIT, chat_body, data_url, decode_image, image_part, png, running_server

from bagel_rt import Bagel
from bagel_rt.serve.stops import StoppedText

QUICK = {"num_timesteps": 2}
SMALL = {"prompt": "x", "size": "32x32", **QUICK}


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


# Values that ask for nothing

NEUTRAL_CHAT = {
    "audio": None, "stop": [], "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": [],
    "function_call": "none", "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "store": False,
    "response_format": {"type": "text"}, "moderation": "auto", "stream": False, "n": 1, "frequency_penalty": 0,
    "presence_penalty": 0.0, "metadata": {"trace": "1"}, "service_tier": "auto", "prediction": None, "user": "u",
    "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h", "verbosity": "medium",
    "reasoning_effort": "none", "modalities": ["text"], "stream_options": {"include_usage": False}, "top_p": 1,
    "web_search_options": None, "max_completion_tokens": None,
}  # fmt: skip
"""Fields of OpenAI's API."""

NEUTRAL_ELSEWHERE = {
    "top_k": -1, "min_p": 0, "typical_p": 1, "repetition_penalty": 1.0, "best_of": 1, "use_beam_search": False,
    "ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True, "stop_token_ids": [], "echo": False,
    "max_tokens": -1, "n": 1.0, "options": {}, "extra_body": {}, "session_id": "", "bad_words": [],
    "chat_template_kwargs": {"enable_thinking": False}, "thinking": {"type": "disabled"}, "include_reasoning": False,
}  # fmt: skip
"""Fields of other servers' APIs."""

NEUTRAL_IMAGES = {
    "background": "auto", "moderation": "low", "partial_images": 0, "quality": "auto", "stream": False, "n": 1,
    "response_format": "b64_json", "output_format": "png", "output_compression": 100, "user": "u", "style": None,
    "safety_identifier": "s", "input_fidelity": "low", "size": "auto",
}  # fmt: skip


@pytest.mark.parametrize("fields", [NEUTRAL_CHAT, NEUTRAL_ELSEWHERE], ids=["openai", "others"])
def test_chat_accepts_fields_that_ask_for_nothing(http, fields):
    response = http.post(CHAT, json=chat_body("x", **{"max_tokens": 2} | fields))
    assert response.status_code == 200, response.text


def test_generation_and_edit_accept_fields_that_ask_for_nothing(http, client):
    fields = NEUTRAL_IMAGES | QUICK
    assert http.post(DRAW, json=fields | {"prompt": "x", "size": "32x32"}).status_code == 200
    client.images.edit(image=png(), prompt="x", extra_body=fields)
    form = {name: json.dumps(value).strip('"') for name, value in fields.items() if value is not None}
    response = http.post(EDIT, files={"image[0]": png()}, data=form | {"prompt": "x", "model": "small", "mask": ""})
    assert response.status_code == 200, response.text


def test_messages_of_frameworks_are_accepted(http):
    url = data_url(png(16, 16))
    earlier = {
        "role": "assistant", "content": "yes", "refusal": None, "annotations": [], "tool_calls": [], "audio": None,
        "function_call": None, "reasoning_content": "", "name": "bot",
    }  # fmt: skip
    parts = [
        "a plain string",
        {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "annotations": []},
        {"type": "image_url", "image_url": url},
        {"type": "image_url", "image_url": {"url": url, "detail": "original"}},
    ]
    messages = [{"role": "developer", "content": ""}, earlier, {"role": "user", "content": parts, "name": "u"}]
    response = http.post(CHAT, json={"messages": messages, "max_tokens": 2})
    assert response.status_code == 200, response.text


UNSUPPORTED = {  # path of the error -> (route, fields, code, part of the message)
    "tools": (CHAT, {"tools": [{"type": "function"}]}, "unsupported_parameter", "The model calls no tools"),
    "tool_choice": (CHAT, {"tool_choice": "required"}, "invalid_value", '"none", "auto" or left out'),
    "logprobs": (CHAT, {"logprobs": True}, "unsupported_parameter", "false or left out, got True"),
    "logit_bias": (CHAT, {"logit_bias": {"1": 5}}, "unsupported_parameter", "{} or left out"),
    "store": (CHAT, {"store": True}, "unsupported_parameter", "stores nothing"),
    "frequency_penalty": (CHAT, {"frequency_penalty": 1}, "unsupported_parameter", "0 or left out, got 1"),
    "response_format": (
        CHAT, {"response_format": {"type": "json_object"}}, "unsupported_parameter", '{} or left out'),
    "reasoning_effort": (CHAT, {"reasoning_effort": "high"}, "invalid_value", "set think to true"),
    "web_search_options": (CHAT, {"web_search_options": {}}, "unsupported_parameter", "must be left out"),
    "modalities[1]": (CHAT, {"modalities": ["text", "audio"]}, "invalid_value", "'text' or 'image', got 'audio'"),
    "stream_options.include_obfuscation": (
        CHAT, {"stream_options": {"include_obfuscation": True}}, "unsupported_parameter", "false or left out"),
    "stop[0]": (CHAT, {"stop": [3]}, "invalid_type", "must be a string, got 3"),
    "stop": (CHAT, {"stop": ["x"] * 17}, "invalid_value", "must have at most 16 entries, got 17"),
    "n": (CHAT, {"n": 9.0}, "invalid_value", "at most 3 on this server"),
    "temperature": (CHAT, {"temperature": "warm"}, "invalid_type", "must be a number, got 'warm'"),
    "top_p": (CHAT, {"top_p": 0.5}, "invalid_value", "no effect without sampling"),
    "model": (DRAW, {"model": "gpt-image-1"}, "model_not_found", "must be 'small' or left out"),
    "stlye": (DRAW, {"stlye": "vivid"}, "unknown_parameter", "Supported are prompt, model, n,"),
    "quality": (DRAW, {"quality": "high"}, "invalid_value", '"auto", "standard" or left out'),
    "background": (DRAW, {"background": "transparent"}, "invalid_value", "no transparency"),
    "response_format ": (DRAW, {"response_format": "url"}, "invalid_value", '"b64_json" or left out'),
    "stream": (DRAW, {"stream": True}, "unsupported_parameter", "false or left out"),
    "partial_images": (DRAW, {"partial_images": 2}, "unsupported_parameter", "0 or left out"),
    "output_format": (DRAW, {"output_format": "gif"}, "invalid_value", "'png', 'jpeg' or 'webp'"),
    "output_compression": (DRAW, {"output_compression": 50}, "invalid_value", "Set output_format to jpeg or webp"),
    "size": (DRAW, {"size": "huge"}, "invalid_value", "auto or WIDTHxHEIGHT"),
    "seed": (DRAW, {"seed": 1.5}, "invalid_type", "must be an integer, got 1.5"),
    "cfg_interval": (DRAW, {"cfg_interval": [1, 0]}, "invalid_value", "0 <= low <= high <= 1"),
    "guidance_scale": (DRAW, {"guidance_scale": 7}, "unsupported_parameter", "Set cfg_text_scale"),
    "prompt": (DRAW, {"prompt": " \n"}, "invalid_value", "at least one visible character"),
    "think": (DRAW, {"think": "yes"}, "invalid_type", "true or false, got 'yes'"),
    "do_sample": (DRAW, {"do_sample": True}, "invalid_value", "Set think to true"),
}  # fmt: skip


@pytest.mark.parametrize("param", UNSUPPORTED)
def test_unsupported_values_are_refused_with_code_and_param(http, param):
    route, fields, code, message = UNSUPPORTED[param]
    response = http.post(route, json=(chat_body("x", max_tokens=2) if route == CHAT else SMALL) | fields)
    error = response.json()["error"]
    assert response.status_code == (404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"], error["type"]) == (param.strip(), code, "invalid_request_error")
    assert message in error["message"] and error["message"].startswith(param.strip())


MESSAGES = {  # path of the error -> (messages, part of the message)
    "messages": ([{"role": "user", "content": " "}], "at least one visible character"),
    "messages[0].role": ([{"role": "tool", "content": "x"}], "'developer', 'user' or 'assistant', got 'tool'"),
    "messages[0].content": ([{"role": "user", "content": 5}], "a string or a list of parts, got int"),
    "messages[0].content[0].type": ([{"role": "user", "content": [{"type": "file"}]}], "must be 'text' or 'image_url'"),
    "messages[0].content[0].text": ([{"role": "user", "content": [{"type": "text"}]}], "is missing"),
    "messages[0].content[0]": ([{"role": "user", "content": [5]}], "must be an object, got 5"),
    "messages[1].tool_calls": (
        [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"id": "1"}]}], "[] or left out"),
    "messages[0].content[1].image_url.url": (
        chat_body("x", image_part("https://example.com/a.png"))["messages"], "must be a data: URL"),
    "messages[0].content[0].image_url.url": (
        chat_body(image_part("data:image/png;base64,aGVsbG8="))["messages"], "not an image"),
    "messages[0].content[0].image_url": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}], "must be an object, got 5"),
}  # fmt: skip


@pytest.mark.parametrize("param", MESSAGES)
def test_errors_name_the_path_in_the_messages(http, param):
    messages, message = MESSAGES[param]
    response = http.post(CHAT, json={"messages": messages, "max_tokens": 2})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and message in error["message"], error


def test_repeated_names_are_refused(http):
    response = http.post(DRAW, content=b'{"prompt": "x", "seed": 1, "seed": 2}')
    assert response.status_code == 400 and response.json()["error"]["param"] == "seed"


# Stop strings


@pytest.fixture(scope="module")
def whole(address):
    """The response without a stop string."""
    response = httpx.post(f"{address}{CHAT}", json=chat_body("hello", max_tokens=16), timeout=60).json()
    return response["choices"][0]["message"]["content"]


@pytest.mark.parametrize("start, length", [(0, 1), (4, 1), (4, 5), (7, 9)])
def test_stop_string_ends_the_answer_and_is_left_out(client, whole, start, length):
    stop = whole[start : start + length]
    request = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16, "stop": stop}
    expected = whole[: whole.find(stop)]
    response = client.chat.completions.create(**request)
    assert response.choices[0].message.content == expected and response.choices[0].finish_reason == "stop"
    assert response.usage.completion_tokens < 16
    chunks = list(client.chat.completions.create(**request | {"stop": ["never", stop]}, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_stop_string_that_does_not_occur_changes_nothing(client, whole):
    request = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16}
    stops = [whole[-3:] + "#", "", "\0"]
    chunks = list(client.chat.completions.create(**request, stop=stops, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"


def test_stop_string_ends_an_interleaved_answer(client, monkeypatch):
    monkeypatch.setattr("bagel_rt.models.bagel.model.BagelModel.image_request", "")
    request = {"model": "small", "messages": [{"role": "user", "content": "draw"}], "max_tokens": 6, "seed": 3}
    how = {"modalities": ["text", "image"], "max_rounds": 2, "size": "48x32", **QUICK}
    text = client.chat.completions.create(**request, extra_body=how).choices[0].message.content
    response = client.chat.completions.create(**request, stop=text[2:4], extra_body=how).choices[0]
    assert response.message.content == text[: text.find(text[2:4])] and response.finish_reason == "stop"
    assert not hasattr(response.message, "images")


def test_stopped_text_does_not_depend_on_the_pieces():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=rng.randrange(12)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randrange(4))]
        ends = [min((text[:end].rfind(s), s) for s in stops if text[:end].endswith(s)) for end in range(len(text) + 1)
                if any(text[:end].endswith(s) for s in stops)]  # fmt: skip
        expected = text[: ends[0][0]] if ends else text
        cuts = sorted(rng.choices(range(len(text) + 1), k=3))
        stopped, found = StoppedText(stops), ""
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            found += stopped.feed(text[start:end])
            if stopped.stopped:
                break
        assert (found + stopped.finish(), stopped.stopped) == (expected, bool(ends))


# Several choices, formats, and encodings


def test_several_choices_have_consecutive_seeds(client):
    request = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 2}
    alone = [client.chat.completions.create(**request, seed=seed) for seed in (4, 5, 6)]
    texts = [response.choices[0].message.content for response in alone]
    response = client.chat.completions.create(**request, seed=4, n=3)
    assert [choice.message.content for choice in response.choices] == texts
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    assert response.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    assert response.usage.prompt_tokens == alone[0].usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**request, seed=4, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_ten_images_in_one_request():
    with running_server(limits=None) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        response = client.images.generate(prompt="x", n=10, size="32x32", extra_body=QUICK)
        assert len(response.data) == 10
        with pytest.raises(openai.BadRequestError, match="n must be at most 10 on this server, got 11"):
            client.images.generate(prompt="x", n=11, size="32x32", extra_body=QUICK)


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_output_compression_is_the_quality(client, form):
    request = {"prompt": "a cat", "size": "64x64", "output_format": form, "extra_body": QUICK | {"seed": 1}}
    replies = [client.images.generate(**request, output_compression=quality) for quality in (0, 50, 100)]
    files = [base64.b64decode(response.data[0].b64_json) for response in replies]
    assert len(files[0]) < len(files[1]) < len(files[2]) and replies[0].output_format == form
    assert all(Image.open(io.BytesIO(file)).format.lower() == form for file in files)


def test_edit_accepts_the_size_that_results(client):
    for size in ("auto", "96x64"):
        response = client.images.edit(image=png(), prompt="x", size=size, extra_body=QUICK)
        assert response.size == "96x64" and decode_image(response.data[0].b64_json).size == (96, 64)


CONTENT = png(20, 20)  # whose base64 has +, / and padding
ENCODED = base64.b64encode(CONTENT).decode()
DATA_URLS = {
    "no padding": "data:image/png;base64," + ENCODED.rstrip("="),
    "wrapped": "data:image/png;base64,\r\n" + base64.encodebytes(CONTENT).decode(),
    "percent-encoded base64": "data:image/png;base64," + urllib.parse.quote(ENCODED, safe=""),
    "percent-encoded bytes": "data:image/png," + urllib.parse.quote_from_bytes(CONTENT),
    "alphabet of URLs": "data:image/png;base64," + base64.urlsafe_b64encode(CONTENT).decode(),
    "parameters": "data:image/png;charset=utf-8;base64," + ENCODED,
    "no media type": "data:;base64," + ENCODED,
    "capitals and spaces": " DATA:image/PNG;BASE64," + ENCODED + "\n",
}


@pytest.mark.parametrize("url", DATA_URLS.values(), ids=DATA_URLS)
@pytest.mark.parametrize("plain", [False, True], ids=["object", "string"])
def test_data_urls_of_all_kinds_are_read(http, url, plain):
    part = {"type": "image_url", "image_url": url if plain else {"url": url}}
    replies = [http.post(CHAT, json=chat_body(one, "x", max_tokens=4)) for one in (part, image_part(data_url(CONTENT)))]
    texts = [response.json()["choices"][0]["message"]["content"] for response in replies]
    assert texts[0] == texts[1]


def test_photo_with_an_orientation_is_edited_upright(client, bagel):
    image = Image.open(io.BytesIO(png(40, 24)))
    image.save(out := io.BytesIO(), "JPEG", exif=_orientation(6), quality=95)
    response = client.images.edit(image=out.getvalue(), prompt="x", extra_body=QUICK | {"seed": 1})
    upright = Image.fromarray(np.rot90(np.asarray(Image.open(out)), -1))
    expected = bagel.edit(upright, "x", seed=1, **QUICK).image
    assert (np.asarray(decode_image(response.data[0].b64_json)) == np.asarray(expected)).all()


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_unknown_routes_name_the_known_ones(client, http):
    with pytest.raises(openai.NotFoundError, match="there is no route POST /v1/responses. Routes are POST /v1/images/"):
        client.responses.create(model="small", input="x")
    error = http.post("/chat/completions", json={}).json()["error"]
    assert error["code"] == "unknown_url" and "POST /v1/chat/completions" in error["message"]


def test_bracketed_fields_of_a_form_have_the_reason_of_their_field(client):
    with pytest.raises(openai.BadRequestError, match="svg must be left out"):
        client.images.edit(image=png(), prompt="x", extra_body={"svg": {"model": "x"}})


def test_weights_that_are_not_finite_fail_texts_like_images():
    bagel = Bagel.from_pretrained(CHECKPOINT, device="cpu")
    with torch.inference_mode():
        bagel.model.weights.embed_tokens.fill_(torch.nan)
    with running_server(bagel=bagel) as (address, _), httpx.Client(base_url=address, timeout=60) as http:
        drawn, written = http.post(DRAW, json=SMALL), http.post(CHAT, json=chat_body("x", max_tokens=4))
        interleaved = http.post(CHAT, json=chat_body("x", max_tokens=4, modalities=["text", "image"], **QUICK))
        streamed = http.post(CHAT, json=chat_body("x", max_tokens=4, stream=True))
    assert [one.status_code for one in (drawn, written, interleaved, streamed)] == [500, 500, 500, 200]
    last = json.loads(streamed.text.strip().splitlines()[-1].removeprefix("data: "))
    for body in (drawn.json(), written.json(), interleaved.json(), last):
        assert body["error"]["code"] == "not_finite" and "[DONE]" not in streamed.text
