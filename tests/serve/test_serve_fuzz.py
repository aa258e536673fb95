"""Ten thousand slightly broken bodies, forms and images: none causes a 5xx, and every refusal has a message.

Requests pass through the whole application, in process. Of the accepted ones, every fourth runs the model; the others
get a stored response.
"""

import asyncio
import base64
import io
import itertools
import json
import random
import struct
import zlib
from collections import Counter

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import numpy as np
from conftest import CHECKPOINT
from PIL import Image
from serving import CHAT, DRAW, EDIT, chat_body, data_url, image_part, png

from bagel_rt import Bagel
from bagel_rt.serve.app import create_app
from bagel_rt.serve.limits import Limits

LIMITS = Limits(
    body=1 << 17, pixels=1 << 12, images=2, prompt_tokens=60, side=32, steps=3, written_tokens=2, outputs=2, seconds=60
)
CASES = 1000
GONE = 499

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def nested(depth, value=0):
    for _ in range(depth):
        value = [value]
    return value


ODD = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 0.5, 1e308, -1e308, 1e-320,
    float("nan"), float("inf"), "", " ", "x", "a" * 3000, "\ud800", "x\udfffy", "\0", "\u202e", "🦥" * 40, "\u0663",
    "null", "auto", "32x32", "99999999999x1", "1e5", "-0", "true", "text", "image", "data:image/png;base64,", "data:,",
    "data:image/png;base64,AAAA", "http://127.0.0.1/x", "https://[::1/x", "https://a:99999/", "file:///etc/passwd",
    [], {}, [[]], [None], {"a": {}}, [1, 2], [0.5, 0.9], ["text", "image"], [1] * 40, nested(30), nested(800),
    {"role": "user", "content": "x"}, {"type": "text", "text": "x"}, {"url": "x"},
]  # fmt: skip
"""Values for any field."""


def odd(rng):
    """A copy of a random value of ``ODD``."""
    return json.loads(json.dumps(rng.choice(ODD)))


def bodies():
    """(route, body) of valid requests."""
    how = {"num_timesteps": 2, "cfg_text_scale": 4.0, "cfg_interval": [0.0, 1.0], "timestep_shift": 3.0, "seed": 1}
    thinks = {"think": True, "max_think_token_n": 2, "do_sample": True, "text_temperature": 0.5}
    options = {"max_tokens": 2, "temperature": 0.7, "top_p": 0.9, "seed": 3, "stream_options": {"include_usage": True}}
    seen = chat_body("look", image_part(data_url(png(16, 16))), "what?", **options)
    return [
        (DRAW, {"prompt": "x", "size": "16x16", "n": 2, "model": "small", **how}),
        (DRAW, {"prompt": "x", "negative_prompt": "y", "size": "16x16", "output_format": "jpeg", **how, **thinks}),
        (CHAT, seen),
        (CHAT, seen | {"stream": True}),
        (CHAT, {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], **options}),
        (CHAT, chat_body("x", modalities=["text", "image"], max_rounds=2, size="16x16", think=False, **how)),
    ]


def places(value, path=()):
    """The paths of all values in a body."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*path, key))


def changed(body, rng):
    """A body with random changes."""
    body = json.loads(json.dumps(body))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        path = rng.choice([path for path in places(body) if path] or [None])
        if path is None:
            return odd(rng)
        *way, last = path
        holder = body
        for key in way:
            holder = holder[key]
        what = rng.randrange(6)
        if what < 3:
            holder[last] = odd(rng)
        elif what == 3:
            del holder[last]
        elif what == 4:
            holder[last] = [holder[last]] * rng.choice((1, 2, 30))
        elif isinstance(holder, dict):
            holder[rng.choice(("", "x", "prompt", "\ud800", "size", "n", "type", "images", last * 2))] = odd(rng)
        else:
            holder += json.loads(json.dumps(holder))
    return body


def scrambled(data, rng):
    """Bytes with random changes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 4, 16, 100))
        what = rng.randrange(6)
        if what == 0:
            del data[at:]
        elif what == 1:
            del data[at : at + length]
        elif what == 2:
            data[at:at] = rng.randbytes(length)
        elif what == 3:
            data[at:at] = data[at : at + length] * rng.choice((1, 3))
        else:
            data[at : at + length] = rng.choice((rng.randbytes(length), b"\xff" * length, b"\0" * length))
    return bytes(data)


def written(body, rng):
    """A body as JSON in a random encoding, sometimes scrambled."""
    sent = json.dumps(body, ensure_ascii=rng.random() < 0.5)
    data = sent.encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-16", "utf-32-be")), "surrogatepass")
    return scrambled(data, rng) if rng.random() < 0.3 else data


def image_files():
    """Image files of every supported kind."""
    noise = np.random.default_rng(0).integers(0, 256, (18, 26, 4), np.uint8)
    rgba = Image.fromarray(noise)
    rgb, gray, palette = rgba.convert("RGB"), rgba.convert("L"), rgba.convert("P")
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    turned = {"save_all": True, "append_images": [rgb.rotate(90)]}
    kinds = [
        *(("PNG", image, {}) for image in (rgb, rgba, gray, palette, deep, gray.convert("1"), rgba.convert("LA"))),
        *(("PNG", palette, {"transparency": value}) for value in (3, bytes(range(9)))),
        ("PNG", rgb, {"transparency": (1, 2, 3)}),
        *(("JPEG", image, {}) for image in (rgb, gray, rgba.convert("CMYK"))),
        ("JPEG", rgb, {"progressive": True}),
        *(("WEBP", rgba, options) for options in ({}, {"lossless": True}, turned)),
        *(("GIF", palette, options) for options in ({}, {"transparency": 2}, turned)),
    ]
    files = []
    for form, image, options in kinds:
        image.save(out := io.BytesIO(), form, **options)
        files.append(out.getvalue())
    return files


def consistent(data, rng):
    """A PNG file with its checksums corrected, mostly."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or rng.random() < 0.3:
        return data
    data, at = bytearray(data), 8
    while at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        end = at + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def form(parts, rng, boundary=b"b"):
    """The body of a form with (name, value or file) parts."""
    lines = []
    for name, value in parts:
        lines.append(b"--" + boundary)
        sent = f'form-data; name="{name}"'.encode("utf-8", "surrogatepass")
        sent += b'; filename="a.png"' if isinstance(value, bytes) else b""
        headers = [b"Content-Disposition: " + sent]
        if rng.random() < 0.1:
            headers = rng.choice(([], [b"Content-Disposition"], [b"Content-Type: text/plain; charset=x"] + headers))
        lines += [*headers, b"", value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")]
    return b"\r\n".join([*lines, b"--" + boundary + b"--", b""])


TYPES = [
    b"multipart/form-data; boundary=b", b"multipart/form-data; boundary=b", b"multipart/form-data; boundary=b",
    b"multipart/form-data; boundary=", b"multipart/form-data", b"multipart/form-data; boundary=b; charset=utf-7",
    b"multipart/form-data; boundary=b; charset=punycode", b"multipart/form-data; boundary=b; charset=",
    b'multipart/form-data; boundary="b', b"multipart/form-data; boundary=\xff\xfe", b"multipart/mixed; boundary=b",
    b"multipart/form-data; boundary=b; charset*=utf-8''utf-16", b"multipart/form-data; boundary=" + b"b" * 999,
    b"application/x-www-form-urlencoded", b"application/json", b"text/plain", b"", b";", b"\0", b"image/png",
]  # fmt: skip


def body_case(rng, known=bodies()):  # noqa: B008
    route, body = rng.choice(known)
    if rng.random() < 0.05:
        route = rng.choice((DRAW, EDIT, CHAT))
    kind = b"application/json" if rng.random() < 0.9 else rng.choice(TYPES)
    return route, kind, written(changed(body, rng), rng)


def form_case(rng, file=png(16, 16)):  # noqa: B008
    parts = [("prompt", "x"), ("image", file), ("num_timesteps", "3"), ("seed", "1"), ("cfg_interval", "[0, 1]")]
    parts = parts[: rng.randint(1, 5)]
    for _ in range(rng.choice((0, 1, 2, 3))):
        names = ["image", "image[]", "mask", "prompt", "n", "", "\ud800", 'a"b', "think", "x" * 300]
        names += ["cfg_interval", "cfg_interval[]"]
        value = odd(rng)
        value = file if rng.random() < 0.3 else json.dumps(value) if rng.random() < 0.5 else str(value)
        parts.insert(rng.randrange(len(parts) + 1), (rng.choice(names), value))
    body = form(parts, rng)
    kind = TYPES[0] if rng.random() < 0.7 else rng.choice(TYPES)
    return EDIT, kind, scrambled(body, rng) if rng.random() < 0.4 else body


def image_case(rng, files=image_files()):  # noqa: B008
    data = rng.choice(files)
    if rng.random() < 0.95:
        data = consistent(scrambled(data, rng), rng)
    if rng.random() < 0.1:
        other = rng.choice(files)
        data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]
    if rng.random() < 0.5:
        return EDIT, TYPES[0], form([("prompt", "x"), ("num_timesteps", "2"), ("image", data)], random.Random(1))
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    if rng.random() < 0.1:
        url = scrambled(url.encode(), rng).decode("latin-1")
    return CHAT, b"application/json", json.dumps(chat_body("x", image_part(url), max_tokens=1)).encode()


async def post(app, route, kind, body, rng=None):
    """(status, body) of a response. With ``rng`` some bodies are sent in pieces, and some clients disconnect early."""
    cuts = sorted(rng.sample(range(len(body) + 1), min(3, len(body)))) if rng and rng.random() < 0.3 else []
    pieces = [body[start:end] for start, end in itertools.pairwise([0, *cuts, len(body)])]
    messages = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces)}
        for number, piece in enumerate(pieces, start=1)
    ]
    if cuts and rng.random() < 0.1:
        messages[-1] = {"type": "http.disconnect"}
    sent, answered = [], asyncio.Event()

    async def receive():
        if messages:
            return messages.pop(0)
        await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            answered.set()

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST"}
    scope |= {"path": route, "raw_path": route.encode(), "query_string": b"", "root_path": "", "scheme": "http"}
    scope |= {"headers": [(b"host", b"x"), (b"content-type", kind)], "client": ("x", 1), "server": ("x", 80)}
    await asyncio.wait_for(app(scope, receive, send), 120)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def quick(engine):
    """Make an engine return stored replies, except for every fourth request."""
    draw, response, interleave = engine.run_images, engine.run_answer, engine.run_interleaved
    turn, last = itertools.count(), {}

    def run_images(requests, progress):
        if next(turn) % 4 and "image" in last:
            return [last["image"]] * len(requests)
        *_, last["image"] = results = draw(requests, progress)
        return results

    def run_answer(request, progress):
        return (piece for piece in ["x"]) if next(turn) % 4 else response(request, progress)

    def run_interleaved(request, progress):
        return ["x"] if next(turn) % 4 else interleave(request, progress)

    engine.run_images, engine.run_answer, engine.run_interleaved = run_images, run_answer, run_interleaved


def check(status, body, case):
    """Check that a response is a success, or an error with a message."""
    assert 200 <= status < 500, (status, body, case)
    if status == 200 and body.startswith(b"data: "):
        assert b'"error"' not in body, (body, case)
        return
    sent = json.loads(body)
    if status != 200:
        message = sent["error"]["message"]
        assert isinstance(message, str) and message.strip(": "), (status, body, case)


@pytest.fixture(scope="module")
def app():
    bagel = Bagel.from_pretrained(CHECKPOINT, device="cpu")
    quick(bagel.engine)
    return create_app(bagel, "small", LIMITS)


def run(app, cases, whole=False):
    """Post cases one by one and check every response; returns the count of each status. Unless ``whole``, some are
    sent in pieces, and some of those incompletely."""
    found = Counter()

    async def post_all():
        async with app.router.lifespan_context(app):
            for number, (route, kind, body) in enumerate(cases):
                status, response = await post(app, route, kind, body, None if whole else random.Random(number))
                check(status, response, (number, route, kind, body))
                found[status] += 1
            assert app.state.server.worker.failure is None

    asyncio.run(post_all())
    return found


def seeds(count):
    """Seeds, of which only the first is not slow."""
    return [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, count))]


@pytest.mark.slow
@pytest.mark.parametrize("known", bodies(), ids=itertools.count())
def test_every_odd_value_in_every_place(known):
    route, body = known
    cases = []
    for path in filter(None, places(body)):
        for value in ODD:
            holder = options = json.loads(json.dumps(body))
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = value
            cases.append((route, b"application/json", json.dumps(options).encode()))
    app = create_app(Bagel.from_pretrained(CHECKPOINT, device="cpu"), "small", LIMITS)
    found = run(app, cases, whole=True)
    assert found[200] > len(cases) / 50 and found[400] > len(cases) / 2


@pytest.mark.parametrize("seed", seeds(3))
def test_bodies(app, seed):
    rng = random.Random(seed)
    found = run(app, [body_case(rng) for _ in range(CASES)])
    assert found[200] > CASES / 50 and found[400] > CASES / 2 and found[GONE]


@pytest.mark.parametrize("seed", seeds(2))
def test_forms(app, seed):
    rng = random.Random(100 + seed)
    found = run(app, [form_case(rng) for _ in range(CASES)])
    assert found[200] > CASES / 50 and found[400] > CASES / 2 and found[GONE]


@pytest.mark.parametrize("seed", seeds(4))
def test_images(app, seed):
    rng = random.Random(200 + seed)
    found = run(app, [image_case(rng) for _ in range(CASES)])
    assert found[200] > CASES / 20 and found[400] > CASES / 4 and found[GONE]


def test_unchanged_cases_are_accepted(app):
    cases = [(route, b"application/json", json.dumps(body).encode()) for route, body in bodies()]
    files = [
        form([("prompt", "x"), ("num_timesteps", "2"), ("image", file)], random.Random(1)) for file in image_files()
    ]
    cases += [(EDIT, TYPES[0], file) for file in files]
    assert run(app, cases, whole=True) == {200: len(cases)}
