"""``bagel-rt eval``: choice of examples, judging, scores and output."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import WIDE, good, run
from PIL import Image, ImageFont

from bagel_rt import Bagel, ImageResult
from bagel_rt.models.bagel.settings import TASKS
from bagel_rt.tiny.contact_sheet import RIGHT, WIDTH, WRONG, Section, Tile, contact_sheet, wrap_lines
from bagel_rt.tiny.edits import EDITS
from bagel_rt.tiny.evaluate import CATEGORIES, SIDE, category_of, choose_problems, evaluate, scores, wilson_interval
from bagel_rt.tiny.examples import AskExample, EditExample
from bagel_rt.tiny.questions import QUESTIONS
from bagel_rt.tiny.render import render
from bagel_rt.tiny.scene import draw_scene, split_of


class FakeBagel:
    """A model that computes its results with a function of the example, which it identifies by the seed.

    Attributes:
        calls: (method, number of prompts, settings) in order.
    """

    def __init__(self, problems, solve):
        self.examples = {problem.seed: problem.example for problem in problems}
        assert len(self.examples) == len(problems)
        self.solve, self.calls = solve, []

    def generate(self, prompts, *, seed, progress, **settings):
        self.calls.append(("generate", len(prompts), settings))
        assert prompts == [self.examples[one].text for one in seed]
        return [self._image(one) for one in seed]

    def edit(self, image, prompt, *, seed, progress, **settings):
        self.calls.append(("edit", 1, settings))
        assert prompt == self.examples[seed].text
        assert (np.asarray(image) == np.asarray(render(self.examples[seed].before, SIDE))).all()
        return self._image(seed)

    def chat(self, prompt, images, *, seed, progress, **settings):
        self.calls.append(("chat", 1, settings))
        assert prompt == self.examples[seed].text and len(images) == 1
        return self.solve(self.examples[seed])

    def _image(self, seed):
        return ImageResult(self.solve(self.examples[seed]), seed, {}, torch.zeros(1))


def truth(example, side=SIDE):
    return example.answer if example.task == "ask" else render(example.after, side)


def nonsense(example):
    """A blank image for a caption, the unedited image for an edit, and no answer to a question."""
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    return {"generate": blank, "edit": render(example.before) if example.before else None, "ask": ""}[example.task]


@pytest.fixture(scope="module")
def problems():
    return choose_problems(3, seed=0)


def shares(trials):
    return {score.share for score in scores(trials)}


# Examples


def test_categories_are_balanced_and_interleaved(problems):
    expected = [(task, name) for task, names in CATEGORIES.items() for _ in range(3) for name in names]
    assert [(problem.example.task, problem.category) for problem in problems] == expected


def test_seed_determines_problems_and_larger_counts_extend_them(problems):
    first = choose_problems(1, seed=0)
    for task in CATEGORIES:
        expected = [problem for problem in problems if problem.example.task == task][: len(CATEGORIES[task])]
        assert [problem for problem in first if problem.example.task == task] == expected
        assert choose_problems(1, seed=0, tasks=[task]) == expected
    assert not {problem.example for problem in choose_problems(1, seed=1)} & {problem.example for problem in problems}


def test_all_scenes_are_in_the_test_split(problems):
    scenes = [scene for p in problems for scene in (p.example.before, p.example.after) if scene is not None]
    assert {split_of(scene) for scene in scenes} == {"test"}


def test_every_kind_of_edit_and_question_has_its_own_category():
    rng = np.random.default_rng(0)
    for task, makers in (("edit", EDITS), ("ask", QUESTIONS)):
        categories = []
        for make, groups in makers.items():
            scenes = [draw_scene(rng, groups[number % len(groups)]) for number in range(60)]
            pairs = [(scene, make(rng, scene)) for scene in scenes]
            if task == "edit":
                examples = [EditExample(e.text, scene, e.after, e.claims) for scene, e in pairs if e]
            else:
                examples = [AskExample(q[0], scene, q[1]) for scene, q in pairs if q]
            (category,) = {category_of(example) for example in examples}
            categories.append(category)
        assert sorted(categories) == sorted(CATEGORIES[task])


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param({"count": 0}, "count must be an integer >= 1, got 0", id="no examples"),
        pytest.param({"tasks": ["draw"]}, "task must be generate, edit or ask, got 'draw'", id="unknown task"),
    ],
)
def test_choose_problems_rejects_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_problems(**{"count": 1, "seed": 0} | arguments)


# Judging


def test_ground_truth_is_correct_and_prompts_are_batched(problems):
    bagel = FakeBagel(problems, truth)
    trials = list(evaluate(bagel, problems, batch=5, num_timesteps=7))
    assert [trial.problem for trial in trials] == problems
    assert [(trial.problem.example.text, trial.failures) for trial in trials if trial.failures] == []
    assert shares(trials) == {1.0}
    assert [count for method, count, _ in bagel.calls if method == "generate"] == [5, 5, 2]
    for method, _, settings in bagel.calls:
        assert ("num_timesteps" in settings) == (method != "chat")


def test_unrelated_results_are_wrong_and_failures_are_described(problems):
    trials = list(evaluate(FakeBagel(problems, nonsense), problems))
    assert [trial.problem.example.text for trial in trials if trial.correct] == []
    assert shares(trials) == {0.0}
    assert all(isinstance(reason, str) and reason for trial in trials for reason in trial.failures)


def test_image_of_another_example_is_wrong(problems):
    of_one_task = [problem for problem in problems if problem.category == "two with a relation"]
    swapped = {one.example: other.example for one, other in zip(of_one_task, np.roll(of_one_task, 1), strict=True)}
    trials = evaluate(FakeBagel(of_one_task, lambda example: truth(swapped[example])), of_one_task)
    assert shares(list(trials)) == {0.0}


@pytest.mark.parametrize("side", [96, 512])
def test_images_of_another_size_are_resized_and_judged(problems, side):
    image_problems = [problem for problem in problems if problem.example.task != "ask"]
    trials = list(evaluate(FakeBagel(image_problems, lambda example: truth(example, side)), image_problems))
    assert [(trial.problem.example.text, trial.failures) for trial in trials if trial.failures] == []
    assert {trial.result.size for trial in trials} == {(SIDE, SIDE)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param({"batch": 65}, "batch must be an integer from 1 to 64, got 65", id="batch too large"),
        pytest.param({"num_timesteps": 1}, "num_timesteps must be", id="no steps"),
    ],
)
def test_evaluate_rejects_invalid_settings_before_running(problems, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(None, problems, **arguments)


# Scores


@pytest.mark.parametrize(
    "correct, total, interval",  # from R's prop.test(correct = FALSE)
    [(8, 10, (0.4902, 0.9433)), (95, 100, (0.8882, 0.9785)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0))],
)
def test_wilson_interval_matches_r(correct, total, interval):
    assert wilson_interval(correct, total) == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize("correct, total", [(1, 0), (0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_rejects_invalid_counts(correct, total):
    with pytest.raises(ValueError, match="(total|correct) must be an integer"):
        wilson_interval(correct, total)


def test_scores_cover_each_category_and_the_whole_task(problems):
    trials = list(evaluate(FakeBagel(problems, truth), problems))
    trials = [replace(trial, failures=("wrong",)) if trial.problem.category == "recolor" else trial for trial in trials]
    table = {(score.task, score.category): score for score in scores(trials)}
    assert list(table) == [(task, name) for task, names in CATEGORIES.items() for name in (None, *names)]
    assert (table["edit", None].correct, table["edit", None].total) == (18, 21)
    assert (table["edit", "recolor"].correct, table["edit", "recolor"].total) == (0, 3)
    assert (table["edit", "recolor"].low, table["edit", "recolor"].high) == wilson_interval(0, 3)
    assert table["edit", None].seconds == pytest.approx(
        sum(t.seconds for t in trials if t.problem.example.task == "edit")
    )
    assert scores([]) == []


# The contact sheet


def test_wrap_lines_fits_the_width():
    font = ImageFont.load_default(13)
    text = "two small red circles to the left of a " + "very" * 20 + " large star"
    lines = wrap_lines(text, font, 100)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert lines[0] == "two small red" and wrap_lines("", font, 100) == []


def colors(image):
    return {f"#{bytes(color).hex()}" for _, color in image.getcolors(1 << 24)}


def test_sheet_marks_right_and_wrong():
    image = Image.new("RGB", (40, 30), "navy")

    def sheet(*tiles):
        return contact_sheet("a model", "how", [Section("all", "none of them", tiles, (0, 0, 0.2))])

    right, wrong = Tile((image,), (), True), Tile((image, image), (), False)
    assert RIGHT in colors(sheet(right)) and WRONG not in colors(sheet(right))
    assert WRONG in colors(sheet(wrong)) and RIGHT not in colors(sheet(wrong))
    unmarked = contact_sheet("a model", "how", [Section("all", "", [Tile((image,), ())])])
    assert not {RIGHT, WRONG} & colors(unmarked)
    one_row, two_rows = sheet(*[right] * 6, wrong), sheet(*[right] * 7, wrong)
    assert one_row.width == two_rows.width == WIDTH and one_row.height < two_rows.height
    assert sheet(right).tobytes() == sheet(right).tobytes()


# The command

QUICK = ("--prompts", 1, "--num-timesteps", 3, "--device", "cpu")


def test_eval_writes_table_sheet_and_json(tmp_path):
    sheet, report_file = tmp_path / "sheet.png", tmp_path / "report.json"
    output = good("eval", *QUICK, "--seed", 3, "--cfg-text-scale", 2, "--sheet", sheet, "--report", report_file)
    report = json.loads(report_file.read_text())
    assert (report["task"], report["seed"], report["prompts"], report["complete"]) == ("eval", 3, 1, True)
    assert (report["model"], report["device"], report["dtype"]) == ("tiny", "cpu", "float32") and report["backend"]
    assert report["settings"]["generate"]["cfg_img_scale"] == TASKS["generate"].image.cfg_img_scale
    assert report["settings"]["edit"]["cfg_renorm_type"] == TASKS["edit"].image.cfg_renorm_type
    assert {settings["cfg_text_scale"] for settings in report["settings"].values()} == {2.0}
    assert [trial["text"] for trial in report["trials"]] == [p.example.text for p in choose_problems(1, 3)]
    assert all(trial["correct"] == (not trial["failures"]) for trial in report["trials"])
    lines = output.splitlines()
    assert re.fullmatch(r"tiny: float32 on cpu \(\w+\), seed 3, 2 steps, \d+ s", lines[0])
    rows = [(score["task"], score["category"] or "all") for score in report["scores"]]
    assert [tuple(re.split(r" {2,}", line)[:2]) for line in lines[2:]] == rows
    image = Image.open(sheet)
    assert image.width == WIDTH and json.loads(image.text["parameters"])["scores"] == report["scores"]


def test_eval_is_deterministic_and_selects_tasks():
    def trials():
        report = json.loads(good("eval", *QUICK, "--task", "ask", "--json"))
        return [trial | {"seconds": 0} for trial in report["trials"]]

    first = trials()
    assert first == trials() and {trial["task"] for trial in first} == {"ask"}
    assert all("answer" in trial and "expected" in trial for trial in first)


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (RuntimeError, 1)])
def test_eval_reports_results_before_an_interruption(error, code, monkeypatch, tmp_path):
    def end(*_, **__):
        raise error

    monkeypatch.setattr(Bagel, "chat", end)
    sheet, report_file = tmp_path / "sheet.png", tmp_path / "report.json"
    result = run(
        "eval", *QUICK, "--task", "generate", "--task", "ask", "--json", "--sheet", sheet, "--report", report_file
    )
    assert result.exit_code == code and result.stderr.startswith("bagel-rt: error: " if code == 1 else "")
    report = json.loads(result.stdout)
    assert report | {"seconds": 0} == json.loads(report_file.read_text()) | {"seconds": 0} and not report["complete"]
    assert [trial["task"] for trial in report["trials"]] == ["generate"] * 4
    assert Image.open(sheet).width == WIDTH


def test_eval_writes_nothing_without_results(monkeypatch, tmp_path):
    def end(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bagel, "chat", end)
    result = run("eval", *QUICK, "--task", "ask", "--report", tmp_path / "report.json")
    assert (result.exit_code, result.output, list(tmp_path.iterdir())) == (130, "", [])


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param(("--prompts", 0), "--prompts", id="no examples"),
        pytest.param(("--seed", -1), "seed must be an integer from 0", id="negative seed"),
        pytest.param(("--task", "draw"), "task must be generate, edit or ask, got 'draw'", id="unknown task"),
        pytest.param(("--batch", 65), "--batch", id="batch too large"),
        pytest.param(("--num-timesteps", 1), "--num-timesteps must be an integer from 2", id="no steps"),
        pytest.param(
            ("--cfg-img-scale", "nan"),
            "from 0 to 100, got nan",
            id="NaN scale",
        ),
        pytest.param(("--sheet", "sheet.tif"), "a file name that ends in .png", id="sheet of an unknown format"),
        pytest.param(("--report", "/no/report.json"), "Create /no first.", id="report in a missing folder"),
        pytest.param(("--model", "/no"), "no such folder", id="missing model"),
    ],
)
def test_eval_reports_usage_errors_in_one_line(arguments, message):
    result = run("eval", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"bagel-rt: error: .*\n", result.stderr) and message in result.stderr


def test_help_shows_defaults_per_task():
    page = good("eval", "--help", env=WIDE)
    assert page.count("[default: (the task's)]") == 4
