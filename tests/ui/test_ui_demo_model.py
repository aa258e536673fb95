"""The page of the embedded model in headless Chromium: its examples, inputs, settings, results and messages.

One process has one page at a time: Gradio's folder for uploads is an environment variable. Skipped as
``test_ui_browser`` is.
"""

import importlib
import os

import pytest
from PIL import Image

NEEDED = bool(os.environ.get("BAGEL_RT_NEEDS_BROWSER"))
for module in ("gradio", "selenium"):
    importlib.import_module(module) if NEEDED else pytest.importorskip(module, reason=f"{module} is not installed")

from browsing import CHROMIUM, DRIVER, PROMPTS, SHOWN, TABS, Browser, fetch, start_chromium  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from bagel_rt import Bagel  # noqa: E402
from bagel_rt.runtime.denoise import Denoiser  # noqa: E402
from bagel_rt.ui.app import Page  # noqa: E402
from bagel_rt.ui.examples import ASKED, CHATS, EDITED, FOLDER, GENERATED  # noqa: E402
from bagel_rt.ui.uploads import MAX_UPLOAD  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (NEEDED or (CHROMIUM and DRIVER)),
        reason="no Chromium with its driver here: apt-get install chromium chromium-driver",
    ),
]
ANSWERS = {
    "what is left of the triangle": "blue square",
    "how many triangles are there": "three",
    "what color is the star": "blue",
    "what is in the picture": "three",
    "is there a blue star": "yes",
}
ORIENTATION = 0x0112  # EXIF tag


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
    driver.get_log("browser")
    yield Browser(driver, driver.page_url)
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [error for error in errors if "AbortError" not in error]  # which tell that a page was left


def choose(browser, task, **numbers):
    """Open the settings of a task's tab, and enter numbers there."""
    if not [part for part in browser.all(f"#{task}-count") if part.is_displayed()]:
        browser.click(f"#{task}-settings button")
    for name, number in numbers.items():
        browser.type(f"#{task}-{name} input[type=number]", f"{number}{Keys.TAB}")


def run_fast(browser, task, **numbers):
    """Run a request of few steps to its end."""
    choose(browser, task, num_timesteps=4, **numbers)
    browser.run(task, SHOWN[task])
    assert browser.ended() == "done", browser.says(f"#{task}-status")


def result(browser, task):
    """The final image of a request."""
    source = browser.until(lambda: [s for s in [browser.source(f"#{task}-result")] if "bagel-seed" in s])[0]
    return fetch(source)


@pytest.mark.parametrize("name", GENERATED)
def test_example_of_text_to_image_runs(browser, name):
    prompt, seed = GENERATED[name]
    browser.pick_example("draw", prompt)
    assert f"/{name}.png" in browser.source("#draw-result")
    run_fast(browser, "draw")
    image = result(browser, "draw")
    assert image.size == (128, 128) and f"Seed {seed} " in browser.says("#draw-status")


@pytest.mark.parametrize("name", EDITED)
def test_example_of_editing_runs(browser, name):
    _, prompt, seed = EDITED[name]
    browser.pick_example("edit", prompt)
    assert f"/{name}.png" in browser.source("#edit-result")
    run_fast(browser, "edit")
    assert result(browser, "edit").size == (128, 128) and f"Seed {seed} " in browser.says("#edit-status")


@pytest.mark.parametrize("name, question", ASKED)
def test_example_of_understanding_runs(browser, name, question):
    browser.pick_example("ask", question)
    assert f"/{name}.png" in browser.source("#ask-input")
    browser.run("ask", "ask-answer")
    assert browser.ended() == "done" and ANSWERS[question] in browser.says("#ask-answer")


@pytest.mark.parametrize("name, message", CHATS)
def test_example_of_chat_runs(browser, name, message):
    browser.pick_example("chat", message)
    browser.run("chat")
    assert browser.ended() == "done"
    assert f"/{name}.png" in browser.source("#chat-messages")
    assert ANSWERS[message] in browser.says("#chat-messages .message.bot")


def test_example_fills_in_the_request_and_its_result(browser):
    name, (_, text, seed) = next(iter(EDITED.items()))
    browser.pick_example("edit", text)
    browser.until(lambda: browser.all("#edit-input img"))
    assert fetch(browser.source("#edit-result")).text.keys() == {"Software", "parameters"}
    assert f"/{name}.png" in browser.source("#edit-result")
    browser.click("#edit-settings button")
    assert browser.value("#edit-seed input") == str(seed)
    browser.click("#edit-to-ask")
    assert f"/{name}.png" in browser.source("#ask-input")


def test_edit_takes_several_images_and_turns_photos_upright(browser, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # stored a quarter turn to the left
    Image.new("RGB", (128, 128), "red").save(tmp_path / "first.png")
    Image.new("RGB", (128, 64), "blue").save(tmp_path / "last.jpg", exif=exif)
    browser.tab(TABS["edit"])
    for count, name in enumerate(("first.png", "last.jpg"), start=1):
        browser.upload("edit-input", tmp_path / name)
        browser.until(lambda count=count: len(browser.all("#edit-input .grid-container img")) == count)
    browser.type("#edit-prompt textarea", "make it green")
    run_fast(browser, "edit")
    assert result(browser, "edit").size == (64, 128)


@pytest.mark.parametrize("keys", [Keys.CONTROL, Keys.META])
def test_ctrl_enter_in_any_field_runs_the_request(browser, keys):
    browser.type("#draw-prompt textarea", "a red star")
    choose(browser, "draw", num_timesteps=4)
    for selector in ("#draw-prompt textarea", "#draw-seed input"):
        browser.watch("draw-result", "draw")
        browser.shown(selector).send_keys(keys, Keys.ENTER)
        assert browser.ended() == "done"
    assert browser.value("#draw-prompt textarea") == "a red star"


@pytest.mark.parametrize("task, text", [("edit", "make the star red"), ("ask", ASKED[0][1]), ("chat", CHATS[0][1])])
def test_ctrl_enter_runs_the_request_of_every_tab(browser, task, text):
    browser.pick_example(task, text)
    if task == "edit":
        choose(browser, task, num_timesteps=4)
    browser.watch(SHOWN[task], task)
    browser.shown(f"#{task}-{PROMPTS[task]} textarea").send_keys(Keys.CONTROL, Keys.ENTER)
    assert browser.ended() == "done"


@pytest.mark.parametrize("task", ["draw", "edit"])
def test_batch_has_consecutive_seeds_and_one_image_is_selected(browser, task):
    prompt = {"draw": GENERATED["star"][0], "edit": EDITED["red-star"][1]}[task]
    browser.pick_example(task, prompt)
    run_fast(browser, task, seed=7, count=3)
    assert "3 images, seeds 7 to 9" in browser.says(f"#{task}-status")
    images = browser.until(lambda: [i for i in [browser.all(f"#{task}-batch img")] if len(i) == 3])[0]
    assert ["bagel-seed-7", "bagel-seed-8", "bagel-seed-9"] == [
        image.get_attribute("src").rpartition("/")[2].removesuffix(".png") for image in images
    ]
    images[1].click()
    browser.until(lambda: "bagel-seed-8" in browser.source(f"#{task}-result"))
    browser.click(f"#{task}-again")
    browser.until(lambda: browser.value(f"#{task}-seed input") == "8")
    browser.click(f"#{task}-to-ask")
    browser.until(lambda: "bagel-seed-8" in browser.source("#ask-input"))


def test_aspect_ratio_determines_the_size(browser):
    assert "Aspect ratio" in browser.says("#draw-aspect-ratio") and "Shape" not in browser.says("#draw-tab")
    browser.type("#draw-prompt textarea", "a red star")
    browser.until(lambda: [o for o in browser.all("#draw-aspect-ratio label") if o.text == "16:9"])[0].click()
    browser.click("#draw-advanced button")
    browser.until(lambda: browser.value("#draw-height input[type=number]") == "64")
    run_fast(browser, "draw")
    assert result(browser, "draw").size == (128, 64)


def test_small_result_is_shown_at_an_integer_scale(browser):
    browser.pick_example("draw", GENERATED["star"][0])
    image = browser.shown("#draw-result img")
    browser.until(lambda: image.value_of_css_property("image-rendering") == "pixelated")
    width, height = browser.driver.execute_script(
        "const i = arguments[0], s = getComputedStyle(i), p = parseFloat, r = devicePixelRatio;"
        "return [(i.clientWidth - p(s.paddingLeft) - p(s.paddingRight)) * r,"
        "(i.clientHeight - p(s.paddingTop) - p(s.paddingBottom)) * r]",
        image,
    )
    assert width == height and width % 128 == 0 and width >= 256


@pytest.mark.parametrize("task", ["draw", "edit", "ask"])
def test_result_precedes_settings_on_a_phone(browser, driver, task):
    browser.pick_example(task, {"draw": "a large blue star", "edit": "make the star red", "ask": ASKED[0][1]}[task])
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        parts = [f"#{task}-run", f"#{SHOWN[task]}", f"#{task}-examples", f"#{task}-settings", f"#{task}-advanced"]
        tops = [browser.shown(part).rect["y"] for part in parts]
        assert tops == sorted(tops)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        words = browser.shown(f"#{task}-status .faint").rect
        assert words["x"] + words["width"] <= 390
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_page_says_what_the_model_can_do(browser):
    assert "draws, edits and describes colored shapes" in browser.says(".masthead")
    for task, title in TABS.items():
        browser.tab(title)
        field = browser.shown(f"#{task}-{PROMPTS[task]} textarea")
        assert len(field.get_attribute("placeholder")) > 10


def test_prompt_outside_the_models_world_gets_a_hint(browser):
    choose(browser, "draw", num_timesteps=4)
    for prompt, expected in (("a castle by the sea", True), ("a red star", False)):
        browser.type("#draw-prompt textarea", prompt)
        browser.run("draw", "draw-result")
        assert browser.ended() == "done"
        hints = [part.text for part in browser.all("#draw-hint .hint") if part.is_displayed()]
        assert bool(hints) == expected
        assert not expected or ("only knows colored shapes" in hints[0] and '"castle"' in hints[0])
    browser.tab(TABS["ask"])
    browser.type("#ask-prompt textarea", "who painted it")
    browser.run("ask", "ask-answer")
    assert browser.ended() == "done" and "only knows colored shapes" in browser.says("#ask-hint")


@pytest.mark.parametrize("task", TABS)
def test_thinking_is_disabled_for_a_model_that_cannot(browser, task):
    browser.tab(TABS[task])
    browser.click(f"#{task}-settings button")
    box = browser.shown(f"#{task}-think input")
    assert not box.is_enabled() and not box.is_selected()
    assert "This model was not trained to think first." in browser.says(f"#{task}-settings")


@pytest.mark.parametrize("task", ["draw", "edit", "ask"])
@pytest.mark.parametrize("text", ["", " \n "])
def test_empty_prompt_is_refused(browser, task, text):
    browser.tab(TABS[task])
    if task == "edit":
        browser.upload("edit-input", FOLDER / "star.png")
        browser.until(lambda: browser.all("#edit-input img"))
    browser.type(f"#{task}-prompt textarea", text)
    browser.run(task, f"{task}-status")
    assert browser.ended() == "failed"
    expected = {"draw": "Describe what to draw", "edit": "Describe what to change", "ask": "Write a question"}
    assert expected[task] in browser.says(f"#{task}-status")


def test_unexpected_error_shows_an_id_instead_of_the_exception(browser, monkeypatch):
    def broken(self, index):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Denoiser, "step", broken)
    browser.type("#draw-prompt textarea", "a red star")
    browser.run("draw", "draw-status")
    assert browser.ended() == "failed"
    assert "internal error" in browser.says("#draw-status") and "mat1" not in browser.says("body")
    browser.until(lambda: browser.all("#draw-run")[0].is_enabled())


@pytest.mark.parametrize("task", ["edit", "ask", "chat"])
def test_large_file_is_refused_before_it_is_sent(browser, tmp_path, task):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_UPLOAD + 1)
    browser.tab(TABS[task])
    browser.upload("chat-message" if task == "chat" else f"{task}-input", tmp_path / "huge.png")
    browser.until(lambda: "huge.png must have at most 32 MB" in browser.says(f"#{task}-status"))
