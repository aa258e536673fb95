"""The page in headless Chromium: generate, edit, ask, chat, cancel; and no network.

Skipped where there is no browser (see ``browsing``), unless BAGEL_RT_NEEDS_BROWSER is set: then that is a failure.
"""

import importlib
import json
import os
import socket
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

NEEDED = bool(os.environ.get("BAGEL_RT_NEEDS_BROWSER"))
for module in ("gradio", "selenium"):
    importlib.import_module(module) if NEEDED else pytest.importorskip(module, reason=f"{module} is not installed")

from browsing import CHROMIUM, DRIVER, TABS, Browser, fetch, start_chromium  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from bagel_rt.engine import Engine  # noqa: E402
from bagel_rt.models.bagel.prompts import IMAGE_REQUEST  # noqa: E402
from bagel_rt.models.bagel.settings import TASKS  # noqa: E402
from bagel_rt.runtime.denoise import Denoiser  # noqa: E402
from bagel_rt.ui.app import Page  # noqa: E402
from bagel_rt.ui.controls import CONTROL_TEXTS  # noqa: E402
from bagel_rt.ui.examples import ASKED, CHATS, EDITED, GENERAL  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (NEEDED or (CHROMIUM and DRIVER)),
        reason="no Chromium with its driver here: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def looked_up():
    """Host names that this process looks up, other than its own."""
    asked, real = [], socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        if host not in (None, "", "localhost", "127.0.0.1", "0.0.0.0", "::1"):
            asked.append(host)
        return real(host, *args, **kwargs)

    socket.getaddrinfo = getaddrinfo
    yield asked
    socket.getaddrinfo = real


@pytest.fixture(scope="module")
def page(bagel, looked_up):
    """The page of a model that thinks and generates images in a chat."""
    with Page(bagel, "recorded", small=False) as page:
        page.open("127.0.0.1", 0)
        yield page


@pytest.fixture(scope="module")
def driver():
    made = start_chromium()
    yield made
    made.quit()


@pytest.fixture
def browser(driver, page):
    return Browser(driver, page.url)


def draw(browser, prompt="a red circle"):
    browser.type("#draw-prompt textarea", prompt)
    browser.run("draw", "draw-result")
    assert browser.ended() == "done"


@dataclass
class Slowness:
    """Extra seconds per step, and the indices of the steps done."""

    pause: float = 0.08
    steps: list[int] = field(default_factory=list)


@pytest.fixture
def slow(monkeypatch):
    """Slow down steps and tokens to the pace of a larger model."""
    slowness, step, decode = Slowness(), Denoiser.step, Engine._stream_text

    def slow(self, index):
        time.sleep(slowness.pause)
        slowness.steps.append(index)
        step(self, index)

    def slowly(self, *given):
        for piece in decode(self, *given):
            time.sleep(0.1)
            yield piece

    monkeypatch.setattr(Denoiser, "step", slow)
    monkeypatch.setattr(Engine, "_stream_text", slowly)
    return slowness


def test_previews_are_shown(browser, slow):
    draw(browser)
    previews = {source for source in browser.seen("images") if "preview" in source}
    assert len(previews) > 2 and "preview" not in browser.source("#draw-result")


def test_seed_repeats_an_image(browser, page):
    draw(browser)
    assert [stage for stage in browser.seen("stages") if stage in ("image", "done")] == ["image", "done"]
    assert "Seed " in browser.says("#draw-status") and "128x128" in browser.says("#draw-status")
    first, words = browser.source("#draw-result"), browser.says("#draw-status .message")
    browser.until(lambda: len(browser.all("#gallery img")) == 1)
    browser.click("#draw-settings button")
    browser.click("#draw-again")
    browser.until(lambda: browser.all("#draw-seed input")[0].get_attribute("value") in words)
    draw(browser)
    assert browser.says("#draw-status .message") == words
    browser.until(lambda: len(browser.all("#gallery img")) == 2)
    images = [fetch(source) for source in (first, browser.source("#draw-result"))]
    assert images[0].tobytes() == images[1].tobytes()
    assert json.loads(images[0].text["parameters"])["prompt"] == "a red circle"


def test_result_is_sent_to_other_tabs(browser, slow):
    draw(browser)
    browser.click("#draw-to-edit")
    browser.until(lambda: browser.all("#edit-input img"))
    browser.type("#edit-prompt textarea", "make it blue")
    browser.run("edit", "edit-result")
    assert browser.ended() == "done"
    assert len(browser.seen("images")) > 1
    browser.click("#edit-to-ask")
    browser.until(lambda: browser.all("#ask-input img"))
    browser.type("#ask-prompt textarea", "what is it?")
    browser.click("#ask-settings button")
    browser.type("#ask-max_think_token_n input[type=number]", "30" + Keys.TAB)
    browser.run("ask", "ask-answer")
    assert browser.ended() == "done"
    assert len(browser.seen("texts")) > 2, "the answer did not grow"


EXAMPLES = {
    "draw": GENERAL,
    "edit": [text for _, text, _ in EDITED.values()],
    "ask": [text for _, text in ASKED],
    "chat": [text for _, text in CHATS],
}


@pytest.mark.parametrize("task", EXAMPLES)
def test_every_example_of_other_models_runs(browser, task):
    browser.tab(TABS[task])
    browser.click(f"#{task}-settings button")
    field, number = ("num_timesteps", 4) if task in ("draw", "edit") else ("max_think_token_n", 20)
    browser.type(f"#{task}-{field} input[type=number]", f"{number}{Keys.TAB}")
    for text in EXAMPLES[task]:
        browser.pick_example(task, text)
        browser.run(task)
        assert browser.ended() == "done", browser.says(f"#{task}-status")


def test_thoughts_are_shown_as_generated(browser, slow):
    browser.type("#draw-prompt textarea", "a cat")
    browser.click("#draw-settings button")
    browser.click("#draw-think input")
    browser.click("#draw-advanced button")
    browser.type("#draw-max_think_token_n input[type=number]", "40" + Keys.TAB)
    browser.run("draw", "draw-thought")
    assert browser.ended() == "done"
    assert browser.seen("stages")[-3:] == ["text", "image", "done"]
    assert len(browser.seen("texts")) > 1 and browser.says("#draw-thought").strip()


def say(browser, text):
    """Send a message; ``ended`` then waits for the turn."""
    browser.watch("chat-messages", "chat")
    browser.type("#chat-message textarea", text + Keys.ENTER)


def messages(browser, who):
    """Texts of the "user" or the "bot" in the conversation."""
    return [message.text for message in browser.all(f"#chat-messages .message.{who}")]


@pytest.fixture
def chat(browser):
    browser.tab("Interleaved chat")
    browser.click("#chat-settings button")
    browser.type("#chat-max_think_token_n input[type=number]", "30" + Keys.TAB)
    return browser


@pytest.fixture
def requests_an_image(monkeypatch):
    """Make the model request an image at the end of its first text."""
    texts, decode = [], Engine._stream_text

    def decoded(self, *given):
        texts.append(given)
        yield from decode(self, *given)
        if len(texts) == 1:
            yield IMAGE_REQUEST

    monkeypatch.setattr(Engine, "_stream_text", decoded)


def test_conversation_continues_and_restarts(chat):
    for turn in range(2):
        say(chat, f"number {turn}")
        chat.until(lambda turn=turn: f"number {turn}" in "".join(messages(chat, "user")))
        assert chat.ended() == "done"
    chat.click("#chat-new")
    chat.until(lambda: not chat.all("#chat-messages .message"))


def test_interleaved_answer_is_shown(chat, requests_an_image, slow, tmp_path):
    Image.new("RGB", (96, 64), "red").save(tmp_path / "red.png")
    chat.upload("chat-message", tmp_path / "red.png")
    chat.until(lambda: chat.all("#chat-message img"))
    say(chat, "and now?")
    assert chat.ended() == "done"
    given, *drawn = [image.get_attribute("src") for image in chat.all("#chat-messages img")]
    assert "red.png" in given and len(drawn) == 1 and "bagel-seed" in drawn[0]
    assert fetch(drawn[0]).size == fetch(given).size
    assert len(slow.steps) == 49
    assert messages(chat, "user") and "".join(messages(chat, "bot")).strip()
    assert not [button for button in chat.all("button[aria-label=Share]") if button.is_displayed()]
    chat.until(lambda: len(chat.all("#gallery img")) == 1)


def test_stopped_turn_returns_its_message(chat, requests_an_image, slow):
    slow.pause = 1.0  # a busy machine has time to stop it
    say(chat, "number 1")
    chat.until(lambda: "image" in chat.seen("stages"))
    chat.click("#chat-message .stop-button")
    assert chat.ended() == "cancelled" and slow.steps[-1] < 48
    slow.pause = 0.0
    field = chat.shown("#chat-message textarea")
    chat.until(lambda: field.get_attribute("value") == "number 1")
    assert not chat.all("#chat-messages .message")
    say(chat, "number 2")
    assert chat.ended() == "done"
    assert [text.strip() for text in messages(chat, "user")] == ["number 2"]


def test_empty_message_is_refused(chat):
    say(chat, "  ")
    assert chat.ended() == "failed"
    assert "nothing to send" in chat.says("#chat-status")


def test_cancel_stops_the_model_and_the_next_request_runs(browser, slow):
    slow.pause = 1.0
    browser.type("#draw-prompt textarea", "a cat")
    browser.run("draw", "draw-result")
    browser.until(lambda: "image" in browser.seen("stages"))
    browser.click("#draw-cancel")
    assert browser.ended() == "cancelled"
    assert "Cancelled after step" in browser.says("#draw-status") and slow.steps[-1] < 48
    slow.pause = 0.0
    draw(browser)


def test_missing_image_is_explained(browser):
    browser.tab("Image editing")
    browser.run("edit", "edit-result")
    assert browser.ended() == "failed"
    assert "There is no image to edit" in browser.says("#edit-status")
    browser.until(lambda: browser.all("#edit-run")[0].is_enabled())


@pytest.mark.parametrize("task, words", [("edit", "make it blue"), ("ask", "what is it")])
def test_invalid_upload_is_named(browser, tmp_path, task, words):
    (tmp_path / "holiday.png").write_text("not an image")
    browser.tab(TABS[task])
    browser.upload(f"{task}-input", tmp_path / "holiday.png")
    browser.until(lambda: browser.all(f"#{task}-input img"))
    browser.type(f"#{task}-prompt textarea", words)
    browser.run(task, f"{task}-status")
    assert browser.ended() == "failed"
    assert "holiday.png: not an image" in browser.says(f"#{task}-status")


def test_closed_page_cancels_its_request_and_deletes_its_files(browser, page, slow):
    slow.pause = 1.0

    def files():
        return {path for path in Path(page._folder.name).rglob("*") if path.name.startswith(("preview", "bagel-seed"))}

    first, before = browser.driver.current_window_handle, files()
    browser.driver.switch_to.new_window("tab")
    other = Browser(browser.driver, page.url)
    other.type("#draw-prompt textarea", "a cat")
    other.run("draw", "draw-result")
    other.until(lambda: any("preview" in source for source in other.seen("images")))
    assert files() - before
    other.driver.close()
    other.driver.switch_to.window(first)
    browser.until(lambda: not page._jobs._thread.running)
    browser.until(lambda: files() <= before)
    assert slow.steps[-1] < 48


def test_every_explanation_is_on_the_page(browser):
    everywhere, found = {"think", "seed"}, set()
    own = {
        "draw": (TASKS["generate"], {"count", "negative_prompt", "previews"}),
        "edit": (TASKS["edit"], {"count", "negative_prompt", "previews"}),
        "ask": (TASKS["chat"], set()),
        "chat": (TASKS["interleave"], {"max_rounds", "previews"}),
    }
    for task, (defaults, more) in own.items():
        names = everywhere | more | {field.name for part in defaults if part for field in fields(part)}
        browser.tab(TABS[task])
        for part in ("settings", "advanced"):
            browser.click(f"#{task}-{part} button")
        browser.shown(f"#{task}-seed")
        browser.shown(f"#{task}-advanced h3")
        words = browser.says("body")
        for name in names:
            title, info = CONTROL_TEXTS[name]
            assert title in words and info in words, (task, name)
        found |= names
    assert found == CONTROL_TEXTS.keys()


def test_page_contacts_no_other_host(browser, driver, page, looked_up):
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    others = {url for url in urls if urlsplit(url).scheme not in ("data", "blob") and not url.startswith(page.url)}
    assert urls and not others and not looked_up
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [error for error in errors if "AbortError" not in error]  # which tell that a page was left
