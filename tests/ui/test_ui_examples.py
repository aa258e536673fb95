"""The page of the embedded model in headless Chromium: its examples, and what it says about the model.

One process has one page at a time: Gradio's folder for uploads is an environment variable. Skipped as
``test_ui_browser`` is.
"""

import importlib
import os

import pytest

NEEDED = bool(os.environ.get("BAGEL_RT_NEEDS_BROWSER"))
for module in ("gradio", "selenium"):
    importlib.import_module(module) if NEEDED else pytest.importorskip(module, reason=f"{module} is not installed")

from browsing import CHROMIUM, DRIVER, TABS, Browser, fetch, start_chromium  # noqa: E402

from bagel_rt import Bagel  # noqa: E402
from bagel_rt.ui.app import Page  # noqa: E402
from bagel_rt.ui.examples import EDITED  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (NEEDED or (CHROMIUM and DRIVER)),
        reason="no Chromium with its driver here: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def driver():
    with Page(Bagel.from_pretrained(device="cpu"), "tiny", small=True) as page:
        page.open("127.0.0.1", 0)
        started = start_chromium()
        started.page_url = page.url
        yield started
        started.quit()


@pytest.fixture
def browser(driver):
    return Browser(driver, driver.page_url)


def pick_example(browser, task, text):
    """Open a task's tab and click the example with a text."""
    browser.tab(TABS[task])
    rows = f"#{task}-examples tr, #{task}-examples button"
    browser.until(lambda: [row for row in browser.all(rows) if text in row.text])[0].click()
    browser.until(lambda: browser.value(f"#{task}-{'message' if task == 'chat' else 'prompt'} textarea") == text)


def test_example_fills_in_the_request_and_its_result(browser):
    name, (_, text, seed) = next(iter(EDITED.items()))
    pick_example(browser, "edit", text)
    browser.until(lambda: browser.all("#edit-input img"))
    assert fetch(browser.source("#edit-result")).text.keys() == {"Software", "parameters"}
    assert f"/{name}.png" in browser.source("#edit-result")
    browser.click("#edit-settings button")
    assert browser.value("#edit-seed input") == str(seed)
    browser.click("#edit-to-ask")
    assert f"/{name}.png" in browser.source("#ask-input")
