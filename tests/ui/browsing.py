"""A headless Chromium that uses the page as a person does; for the tests, and for the screenshots in docs/.

Needs selenium, and Debian's packages chromium and chromium-driver or others of their kind.
"""

import io
import shutil
import time
from urllib.request import urlopen

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
LONG = 120  # seconds for anything, on a busy machine
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1360,1400")
TABS = {
    "draw": "Text to image",
    "edit": "Image editing",
    "ask": "Image understanding",
    "chat": "Interleaved chat",
}
SHOWN = {"draw": "draw-result", "edit": "edit-result", "ask": "ask-answer", "chat": "chat-messages"}
PROMPTS = {"draw": "prompt", "edit": "prompt", "ask": "prompt", "chat": "message"}

WATCH = """
const [shown, line] = arguments;
const find = selector => document.querySelector(selector);
find(`#${line} .status`).removeAttribute('data-stage');  // of a request before this one
window.seen = {stages: [], images: [], texts: []};
const note = (list, value) => { if (value && list[list.length - 1] !== value) list.push(value); };
window.watching?.disconnect();
window.watching = new MutationObserver(() => {
  note(seen.stages, find(`#${line} .status`)?.dataset.stage);
  note(seen.images, find(`#${shown} img`)?.src);
  note(seen.texts, find(`#${shown}`)?.innerText);
});
watching.observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
"""


def start_chromium() -> webdriver.Chrome:
    """Start the browser; call its ``quit()`` at the end."""
    if not (CHROMIUM and DRIVER):
        raise RuntimeError("there is no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    made.set_script_timeout(LONG)
    return made


class Browser:
    """The page as a user sees it; controls are named by their ids."""

    def __init__(self, driver: webdriver.Chrome, url: str):
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

    def shown(self, selector: str):
        """The first one that can be seen, as soon as there is one."""
        return self.until(lambda: [part for part in self.all(selector) if part.is_displayed()])[0]

    def click(self, selector: str) -> None:
        self.until(lambda: [part for part in self.all(selector) if part.is_displayed() and part.is_enabled()])[
            0
        ].click()

    def tab(self, title: str) -> None:
        self.until(lambda: [tab for tab in self.all("button[role=tab]") if tab.text == title])[0].click()

    def type(self, selector: str, text: str) -> None:
        """Put a text into a field, in place of what was in it."""
        field = self.shown(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def upload(self, name: str, path) -> None:
        """Give a file to a control, as its file chooser does."""
        self.until(lambda: self.all(f"#{name} input[type=file]"))[0].send_keys(str(path))

    def watch(self, shown: str, task: str) -> None:
        self.driver.execute_script(WATCH, shown, f"{task}-status")

    def seen(self, what: str) -> list[str]:
        return self.driver.execute_script("return seen[arguments[0]]", what)

    def run(self, task: str, shown: str | None = None) -> None:
        """Click a tab's button, and note from then on what a control and the status line show; see :meth:`seen`."""
        self.watch(shown or SHOWN[task], task)
        self.click("#chat-message .submit-button" if task == "chat" else f"#{task}-run")

    def pick_example(self, task: str, text: str) -> None:
        """Open a task's tab and click the example with a text."""
        self.tab(TABS[task])
        rows = f"#{task}-examples tr, #{task}-examples button"
        self.until(lambda: [row for row in self.all(rows) if text[:30] in row.text])[0].click()  # long ones are cut
        self.until(lambda: text in self.value(f"#{task}-{PROMPTS[task]} textarea"))
        if task == "chat":
            self.until(lambda: self.all("#chat-message img"))

    def ended(self) -> str:
        """How the request that is watched ended: "done", "failed" or "cancelled"."""
        return self.until(lambda: [stage for stage in self.seen("stages") if stage in ("done", "failed", "cancelled")])[
            0
        ]

    def value(self, selector: str) -> str:
        """The content of an input field."""
        return self.shown(selector).get_attribute("value")

    def says(self, selector: str) -> str:
        return self.all(selector)[0].text

    def source(self, selector: str) -> str:
        """The URL of the image in a control."""
        return self.until(lambda: self.all(f"{selector} img"))[0].get_attribute("src")


def fetch(url: str):
    """The image at a URL of the page."""
    with urlopen(url) as answer:
        return Image.open(io.BytesIO(answer.read()))
