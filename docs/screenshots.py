"""Take the screenshots of the web page, ``docs/ui/TAB.webp``: ``python docs/screenshots.py``.

A headless Chromium uses every tab with the embedded model, then takes its screenshot.
"""

import io
import sys
import time
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "ui"))

from browsing import Browser, start_chromium  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from bagel_rt import Bagel  # noqa: E402
from bagel_rt.pipeline import DEFAULT_MODEL  # noqa: E402
from bagel_rt.ui.app import Page  # noqa: E402

WIDTH = 1240


def set_seed(browser: Browser, task: str) -> None:
    """Fix the seed, so that the screenshots are reproducible."""
    browser.click(f"#{task}-settings button")
    browser.type(f"#{task}-seed input", "0" + Keys.TAB)
    browser.click(f"#{task}-settings button")


def draw(browser: Browser) -> None:
    browser.type("#draw-prompt textarea", "three orange triangles at the bottom")
    set_seed(browser, "draw")
    browser.run("draw", "draw-result")


def edit(browser: Browser) -> None:
    browser.click("#draw-to-edit")
    browser.until(lambda: browser.all("#edit-input img"))
    browser.type("#edit-prompt textarea", "turn the triangles into stars")
    set_seed(browser, "edit")
    browser.run("edit", "edit-result")


def ask(browser: Browser) -> None:
    browser.click("#edit-to-ask")
    browser.until(lambda: browser.all("#ask-input img"))
    browser.type("#ask-prompt textarea", "what shape are the orange things")
    browser.run("ask", "ask-answer")


def chat(browser: Browser) -> None:
    browser.tab("Interleaved chat")
    browser.upload("chat-message", HERE.parent / "bagel_rt" / "assets" / "examples" / "triangles.png")
    browser.until(lambda: browser.all("#chat-message img"))
    browser.watch("chat-messages", "chat")
    browser.type("#chat-message textarea", "what is in the picture" + Keys.ENTER)


def photograph(browser: Browser) -> Image.Image:
    """A screenshot of the whole page, without focus or hover effects."""
    run = browser.driver.execute_script
    run("document.activeElement.blur(); window.scrollTo(0, 0); document.documentElement.style.overflow = 'hidden'")
    for height in (lambda: 400, lambda: run("return document.documentElement.scrollHeight")):  # a page fills its window
        size = {"width": WIDTH, "height": height(), "deviceScaleFactor": 1, "mobile": False}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        time.sleep(1)  # until images are loaded and transitions have ended
    return Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")


def main() -> None:
    (HERE / "ui").mkdir(exist_ok=True)
    driver = start_chromium()
    try:
        with Page(Bagel.from_pretrained(), DEFAULT_MODEL.name, small=True) as page:
            page.open("127.0.0.1", 0)
            driver.set_window_size(WIDTH, 1000)
            browser = Browser(driver, page.url)
            for act in (draw, edit, ask, chat):
                act(browser)
                print(act.__name__, browser.ended(), flush=True)
                photograph(browser).save(HERE / "ui" / f"{act.__name__}.webp", quality=85, method=6)
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
