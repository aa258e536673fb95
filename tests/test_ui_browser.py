"""The page in headless Chromium, from the click to the picture: draw, edit, ask, talk, cancel; and no network.

Needs Debian's packages chromium and chromium-driver, or others of their kind; skipped where there are none.
"""

import io
import json
import shutil
import socket
import time
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra [ui] is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from bagel_rt.denoise import Denoiser  # noqa: E402
from bagel_rt.ui.app import Page  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with its driver here: apt-get install chromium chromium-driver"
)
LONG = 120  # seconds for anything, on a busy machine
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1360,1400")

WATCH = """
const [shown, line] = arguments;
const find = selector => document.querySelector(selector);
find(`#${line} .status`).removeAttribute('data-stage');  // of a request before this one
window.seen = {stages: [], pictures: [], texts: []};
const note = (list, value) => { if (value && list[list.length - 1] !== value) list.push(value); };
window.watching?.disconnect();
window.watching = new MutationObserver(() => {
  note(seen.stages, find(`#${line} .status`)?.dataset.stage);
  note(seen.pictures, find(`#${shown} img`)?.src);
  note(seen.texts, find(`#${shown}`)?.innerText);
});
watching.observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
"""


class Browser:
    """The page as a user sees it; controls are named by their ids."""

    def __init__(self, driver, url: str):
        self.driver = driver
        driver.get(url)
        self.until(lambda: self.all("#draw-run"))

    def until(self, met):
        """What ``met()`` gives as soon as that is true."""
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            if found := met():
                return found
            time.sleep(0.05)
        raise AssertionError(
            f"not met in {LONG} s; the page says: {self.driver.find_element(By.TAG_NAME, 'body').text}"
        )

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def click(self, selector: str) -> None:
        self.until(lambda: [part for part in self.all(selector) if part.is_displayed() and part.is_enabled()])[
            0
        ].click()

    def tab(self, title: str) -> None:
        self.until(lambda: [tab for tab in self.all("button[role=tab]") if tab.text == title])[0].click()

    def type(self, selector: str, text: str) -> None:
        """Put a text into a field, in place of what was in it."""
        field = self.until(lambda: [part for part in self.all(selector) if part.is_displayed()])[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def watch(self, shown: str, task: str) -> None:
        self.driver.execute_script(WATCH, shown, f"{task}-status")

    def seen(self, what: str) -> list[str]:
        return self.driver.execute_script("return seen[arguments[0]]", what)

    def run(self, task: str, shown: str) -> None:
        """Click a tab's button, and note from then on what a control and the status line show; see :meth:`seen`."""
        self.watch(shown, task)
        self.click(f"#{task}-run")

    def ended(self) -> str:
        """How the request that is watched ended: "done", "failed" or "cancelled"."""
        return self.until(lambda: [stage for stage in self.seen("stages") if stage in ("done", "failed", "cancelled")])[
            0
        ]

    def says(self, selector: str) -> str:
        return self.all(selector)[0].text

    def source(self, selector: str) -> str:
        """The address of the picture that a control shows."""
        return self.until(lambda: self.all(f"{selector} img"))[0].get_attribute("src")


@pytest.fixture(scope="module")
def looked_up():
    """Names and addresses that this process asked for, other than its own machine's."""
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
    with Page(bagel, "recorded", small=True) as page:
        page.open("127.0.0.1", 0)
        yield page


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    made.set_script_timeout(LONG)
    yield made
    made.quit()


@pytest.fixture
def browser(driver, page):
    return Browser(driver, page.url)


def draw(browser, prompt="a red circle"):
    browser.type("#draw-prompt textarea", prompt)
    browser.run("draw", "draw-result")
    assert browser.ended() == "done"


@pytest.fixture
def slow(monkeypatch):
    """Steps of a picture that take as long as a larger model's; gives the numbers of those that were done."""
    steps, step = [], Denoiser.step

    def slow(self, index):
        time.sleep(0.08)
        steps.append(index)
        step(self, index)

    monkeypatch.setattr(Denoiser, "step", slow)
    return steps


def test_a_picture_is_seen_as_it_is_drawn(browser, slow):
    draw(browser)
    previews = {source for source in browser.seen("pictures") if "preview" in source}
    assert len(previews) > 2 and "preview" not in browser.source("#draw-result")


def test_a_seed_repeats_its_picture(browser, page):
    draw(browser)
    assert [stage for stage in browser.seen("stages") if stage in ("image", "done")] == ["image", "done"]
    assert "Seed " in browser.says("#draw-status") and "128 × 128" in browser.says("#draw-status")
    first, said = browser.source("#draw-result"), browser.says("#draw-status .message")
    browser.until(lambda: len(browser.all("#gallery img")) == 1)
    browser.click("#draw-settings button")
    browser.click("#draw-again")
    browser.until(lambda: browser.all("#draw-seed input")[0].get_attribute("value") in said)
    draw(browser)
    assert browser.says("#draw-status .message") == said
    browser.until(lambda: len(browser.all("#gallery img")) == 2)
    pictures = [fetch(source) for source in (first, browser.source("#draw-result"))]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert json.loads(pictures[0].text["parameters"])["prompt"] == "a red circle"


def test_a_drawn_picture_is_edited_and_asked_about(browser):
    draw(browser)
    browser.click("#draw-to-edit")
    browser.until(lambda: browser.all("#edit-given img"))
    browser.type("#edit-prompt textarea", "make it blue")
    browser.run("edit", "edit-result")
    assert browser.ended() == "done"
    assert len(browser.seen("pictures")) > 1
    browser.click("#edit-to-ask")
    browser.until(lambda: browser.all("#ask-given img"))
    browser.type("#ask-prompt textarea", "what is it?")
    browser.run("ask", "ask-answer")
    assert browser.ended() == "done"
    assert len(browser.seen("texts")) > 2, "the answer did not grow"


def test_an_example_fills_in_what_is_asked_for(browser):
    browser.tab("Image editing")
    browser.until(lambda: [row for row in browser.all("tr") if "make the squares blue" in row.text])[0].click()
    browser.until(lambda: browser.all("#edit-given img"))
    assert browser.all("#edit-prompt textarea")[0].get_attribute("value") == "make the squares blue"


def test_thoughts_are_shown_as_they_are_written(browser):
    browser.click("#draw-think input")
    browser.type("#draw-prompt textarea", "a cat")
    browser.click("#draw-settings button")
    browser.type("#draw-max_think_token_n input[type=number]", "40" + Keys.TAB)
    browser.run("draw", "draw-thought")
    assert browser.ended() == "done"
    assert browser.seen("stages")[-3:] == ["text", "image", "done"]
    assert browser.seen("texts") and browser.says("#draw-thought").strip()


def test_a_conversation_goes_on_and_begins_anew(browser):
    browser.tab("Interleaved chat")
    browser.click("#chat-settings button")
    browser.type("#chat-max_think_token_n input[type=number]", "30" + Keys.TAB)
    for turn in range(2):
        browser.watch("chat-messages", "chat")
        browser.type("#chat-message textarea", f"number {turn}" + Keys.ENTER)
        browser.until(
            lambda turn=turn: len(browser.all("#chat-messages .user.message, #chat-messages .message.user")) > turn
        )
        assert browser.ended() == "done"
    browser.click("#chat-new")
    browser.until(lambda: not browser.all("#chat-messages .message"))


def test_cancelling_stops_the_model_and_the_next_request_is_done(browser, slow):
    browser.type("#draw-prompt textarea", "a cat")
    browser.run("draw", "draw-result")
    browser.until(lambda: "image" in browser.seen("stages"))
    browser.click("#draw-cancel")
    assert browser.ended() == "cancelled"
    assert "Cancelled after step" in browser.says("#draw-status") and slow[-1] < 48
    draw(browser)


def test_a_mistake_is_explained(browser):
    browser.tab("Image editing")
    browser.run("edit", "edit-result")
    assert browser.ended() == "failed"
    assert "There is no picture to edit" in browser.says("#edit-status")
    browser.until(lambda: browser.all("#edit-run")[0].is_enabled())


def test_every_explanation_is_on_the_page(browser):
    for task, title in (("draw", "Text to image"), ("edit", "Image editing"), ("chat", "Interleaved chat")):
        browser.tab(title)
        browser.click(f"#{task}-settings button")
        for name in ("cfg_text_scale", "cfg_img_scale", "cfg_renorm_type", "num_timesteps", "timestep_shift"):
            found = browser.until(lambda name=name, task=task: browser.all(f"#{task}-{name}"))[0]
            assert name in found.text and len(found.text) > 60


def test_nothing_was_asked_of_another_machine(driver, page, looked_up):
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    others = {url for url in urls if urlsplit(url).scheme not in ("data", "blob") and not url.startswith(page.url)}
    assert urls and not others and not looked_up
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [error for error in errors if "AbortError" not in error]  # which tell that a page was left


def fetch(url: str):
    """The picture at an address of the page."""
    with urlopen(url) as answer:
        return Image.open(io.BytesIO(answer.read()))
