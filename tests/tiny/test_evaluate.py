"""``bagel-rt eval``: which examples are chosen, how a model's answers to them are counted, and what is told of it."""

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
from bagel_rt.tiny.claims import Claims
from bagel_rt.tiny.contact_sheet import RIGHT, WIDTH, WRONG, Section, Tile, contact_sheet, wrapped
from bagel_rt.tiny.edits import EDITS
from bagel_rt.tiny.evaluate import CATEGORIES, SIDE, category_of, choose_problems, evaluate, scores, wilson
from bagel_rt.tiny.examples import Example
from bagel_rt.tiny.questions import QUESTIONS
from bagel_rt.tiny.render import render
from bagel_rt.tiny.scene import draw_scene, split_of


class Pupil:
    """Does what a model does, by a function from the example that is asked, which it knows by its seed.

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
        return [self._picture(one) for one in seed]

    def edit(self, shown, prompt, *, seed, progress, **settings):
        self.calls.append(("edit", 1, settings))
        assert prompt == self.examples[seed].text
        assert (np.asarray(shown) == np.asarray(render(self.examples[seed].before, SIDE))).all()
        return self._picture(seed)

    def chat(self, prompt, images, *, seed, progress, **settings):
        self.calls.append(("chat", 1, settings))
        assert prompt == self.examples[seed].text and len(images) == 1
        return self.solve(self.examples[seed])

    def _picture(self, seed):
        return ImageResult(self.solve(self.examples[seed]), seed, {}, torch.zeros(1))


def truth(example, side=SIDE):
    return example.answer if example.task == "ask" else render(example.after, side)


def nonsense(example):
    """A blank page to a text, the same picture to an edit, and silence to a question."""
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    return {"generate": blank, "edit": render(example.before) if example.before else None, "ask": ""}[example.task]


@pytest.fixture(scope="module")
def problems():
    return choose_problems(3, seed=0)


def shares(trials):
    return {score.share for score in scores(trials)}


# Examples


def test_there_are_as_many_of_each_category_in_turns(problems):
    expected = [(task, name) for task, names in CATEGORIES.items() for _ in range(3) for name in names]
    assert [(problem.example.task, problem.category) for problem in problems] == expected


def test_a_seed_names_the_examples_and_a_larger_number_adds_to_them(problems):
    first = choose_problems(1, seed=0)
    for task in CATEGORIES:
        want = [problem for problem in problems if problem.example.task == task][: len(CATEGORIES[task])]
        assert [problem for problem in first if problem.example.task == task] == want
        assert choose_problems(1, seed=0, tasks=[task]) == want
    assert not {problem.example for problem in choose_problems(1, seed=1)} & {problem.example for problem in problems}


def test_all_scenes_are_held_out(problems):
    scenes = [scene for p in problems for scene in (p.example.before, p.example.after) if scene is not None]
    assert {split_of(scene) for scene in scenes} == {"test"}


def test_every_kind_of_edit_and_question_is_a_category_of_its_own():
    rng = np.random.default_rng(0)
    for task, makers in (("edit", EDITS), ("ask", QUESTIONS)):
        found = []
        for make, groups in makers.items():
            scenes = [draw_scene(rng, groups[number % len(groups)]) for number in range(60)]
            made = [(scene, make(rng, scene)) for scene in scenes]
            if task == "edit":
                examples = [Example(task, e.text, scene, e.after, None, e.claims) for scene, e in made if e]
            else:
                examples = [Example(task, q[0], scene, None, q[1], Claims()) for scene, q in made if q]
            (kind,) = {category_of(example) for example in examples}
            found.append(kind)
        assert sorted(found) == sorted(CATEGORIES[task])


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param({"count": 0}, "count must be an integer >= 1, got 0", id="no examples"),
        pytest.param({"tasks": ["draw"]}, "task must be generate, edit or ask, got 'draw'", id="an unknown task"),
    ],
)
def test_refuses_to_choose(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_problems(**{"count": 1, "seed": 0} | arguments)


# Judging


def test_the_truth_is_right_and_texts_are_drawn_in_batches(problems):
    pupil = Pupil(problems, truth)
    trials = list(evaluate(pupil, problems, batch=5, num_timesteps=7))
    assert [trial.problem for trial in trials] == problems
    assert [(trial.problem.example.text, trial.failures) for trial in trials if trial.failures] == []
    assert shares(trials) == {1.0}
    assert [count for method, count, _ in pupil.calls if method == "generate"] == [5, 5, 2]
    for method, _, settings in pupil.calls:
        assert ("num_timesteps" in settings) == (method != "chat")


def test_nonsense_is_wrong_and_each_failure_has_a_reason(problems):
    trials = list(evaluate(Pupil(problems, nonsense), problems))
    assert [trial.problem.example.text for trial in trials if trial.correct] == []
    assert shares(trials) == {0.0}
    assert all(isinstance(reason, str) and reason for trial in trials for reason in trial.failures)


def test_the_right_picture_of_another_example_is_wrong(problems):
    of_one_task = [problem for problem in problems if problem.category == "two with a relation"]
    swapped = {one.example: other.example for one, other in zip(of_one_task, np.roll(of_one_task, 1), strict=True)}
    trials = evaluate(Pupil(of_one_task, lambda example: truth(swapped[example])), of_one_task)
    assert shares(list(trials)) == {0.0}


@pytest.mark.parametrize("side", [96, 512])
def test_pictures_of_another_size_are_judged_all_the_same(problems, side):
    drawn = [problem for problem in problems if problem.example.task != "ask"]
    trials = list(evaluate(Pupil(drawn, lambda example: truth(example, side)), drawn))
    assert [(trial.problem.example.text, trial.failures) for trial in trials if trial.failures] == []
    assert {trial.result.size for trial in trials} == {(SIDE, SIDE)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param({"batch": 65}, "batch must be an integer from 1 to 64, got 65", id="too large a batch"),
        pytest.param({"num_timesteps": 1}, "num_timesteps must be", id="no steps"),
    ],
)
def test_a_bad_setting_is_refused_before_any_work(problems, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(None, problems, **arguments)


# Counting


@pytest.mark.parametrize(
    "correct, total, interval",  # as R's prop.test(correct = FALSE) has them
    [(8, 10, (0.4902, 0.9433)), (95, 100, (0.8882, 0.9785)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0))],
)
def test_intervals_are_those_of_wilson(correct, total, interval):
    assert wilson(correct, total) == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize("correct, total", [(1, 0), (0, 0), (3, 2), (-1, 2)])
def test_an_impossible_share_has_no_interval(correct, total):
    with pytest.raises(ValueError, match=f"{correct} of {total}: allowed are"):
        wilson(correct, total)


def test_scores_count_each_category_and_the_whole_task(problems):
    trials = list(evaluate(Pupil(problems, truth), problems))
    trials = [replace(trial, failures=("wrong",)) if trial.problem.category == "recolor" else trial for trial in trials]
    found = {(score.task, score.category): score for score in scores(trials)}
    assert list(found) == [(task, name) for task, names in CATEGORIES.items() for name in (None, *names)]
    assert (found["edit", None].correct, found["edit", None].total) == (18, 21)
    assert (found["edit", "recolor"].correct, found["edit", "recolor"].total) == (0, 3)
    assert (found["edit", "recolor"].low, found["edit", "recolor"].high) == wilson(0, 3)
    assert found["edit", None].seconds == pytest.approx(
        sum(t.seconds for t in trials if t.problem.example.task == "edit")
    )
    assert scores([]) == []


# The contact sheet


def test_lines_of_a_text_are_as_long_as_fits():
    font = ImageFont.load_default(13)
    text = "two small red circles to the left of a " + "very" * 20 + " large star"
    lines = wrapped(text, font, 100)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert lines[0] == "two small red" and wrapped("", font, 100) == []


def colours(image):
    return {f"#{bytes(colour).hex()}" for _, colour in image.getcolors(1 << 24)}


def test_right_and_wrong_are_marked_on_the_sheet():
    picture = Image.new("RGB", (40, 30), "navy")

    def sheet(*tiles):
        return contact_sheet("a model", "how", [Section("all", "none of them", tiles, (0, 0, 0.2))])

    right, wrong = Tile((picture,), (), True), Tile((picture, picture), (), False)
    assert RIGHT in colours(sheet(right)) and WRONG not in colours(sheet(right))
    assert WRONG in colours(sheet(wrong)) and RIGHT not in colours(sheet(wrong))
    unmarked = contact_sheet("a model", "how", [Section("all", "", [Tile((picture,), ())])])
    assert not {RIGHT, WRONG} & colours(unmarked)
    one_row, two_rows = sheet(*[right] * 6, wrong), sheet(*[right] * 7, wrong)
    assert one_row.width == two_rows.width == WIDTH and one_row.height < two_rows.height
    assert sheet(right).tobytes() == sheet(right).tobytes()


# The command

QUICK = ("--prompts", 1, "--num-timesteps", 3, "--device", "cpu")


def test_eval_tells_scores_in_a_table_a_sheet_and_json(tmp_path):
    sheet, report = tmp_path / "sheet.png", tmp_path / "report.json"
    said = good("eval", *QUICK, "--seed", 3, "--cfg-text-scale", 2, "--sheet", sheet, "--report", report)
    told = json.loads(report.read_text())
    assert (told["task"], told["seed"], told["prompts"], told["complete"]) == ("eval", 3, 1, True)
    assert (told["model"], told["device"], told["dtype"]) == ("tiny", "cpu", "float32") and told["backend"]
    assert told["settings"]["generate"]["cfg_img_scale"] == TASKS["generate"].image.cfg_img_scale
    assert told["settings"]["edit"]["cfg_renorm_type"] == TASKS["edit"].image.cfg_renorm_type
    assert {settings["cfg_text_scale"] for settings in told["settings"].values()} == {2.0}
    assert [trial["text"] for trial in told["trials"]] == [p.example.text for p in choose_problems(1, 3)]
    assert all(trial["correct"] == (not trial["failures"]) for trial in told["trials"])
    lines = said.splitlines()
    assert re.fullmatch(r"tiny: float32 on cpu \(\w+\), seed 3, 2 steps, \d+ s", lines[0])
    rows = [(score["task"], score["category"] or "all") for score in told["scores"]]
    assert [tuple(re.split(r" {2,}", line)[:2]) for line in lines[2:]] == rows
    image = Image.open(sheet)
    assert image.width == WIDTH and json.loads(image.text["parameters"])["scores"] == told["scores"]


def test_eval_repeats_itself_and_can_be_had_of_one_task():
    def trials():
        told = json.loads(good("eval", *QUICK, "--task", "ask", "--json"))
        return [trial | {"seconds": 0} for trial in told["trials"]]

    first = trials()
    assert first == trials() and {trial["task"] for trial in first} == {"ask"}
    assert all("answer" in trial and "expected" in trial for trial in first)


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (RuntimeError, 1)])
def test_what_was_measured_before_an_end_is_reported(error, code, monkeypatch, tmp_path):
    def end(*_, **__):
        raise error

    monkeypatch.setattr(Bagel, "chat", end)
    sheet, report = tmp_path / "sheet.png", tmp_path / "report.json"
    result = run("eval", *QUICK, "--task", "generate", "--task", "ask", "--json", "--sheet", sheet, "--report", report)
    assert result.exit_code == code and result.stderr.startswith("bagel-rt: error: " if code == 1 else "")
    told = json.loads(result.stdout)
    assert told | {"seconds": 0} == json.loads(report.read_text()) | {"seconds": 0} and not told["complete"]
    assert [trial["task"] for trial in told["trials"]] == ["generate"] * 4
    assert Image.open(sheet).width == WIDTH


def test_what_ends_before_the_first_result_leaves_nothing(monkeypatch, tmp_path):
    def end(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bagel, "chat", end)
    result = run("eval", *QUICK, "--task", "ask", "--report", tmp_path / "report.json")
    assert (result.exit_code, result.output, list(tmp_path.iterdir())) == (130, "", [])


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param(("--prompts", 0), "--prompts", id="no examples"),
        pytest.param(("--seed", -1), "seed must be an integer from 0", id="a seed below zero"),
        pytest.param(
            ("--task", "draw"), "task must be generate, edit or ask, got 'draw'", id="a task that does not exist"
        ),
        pytest.param(("--batch", 65), "--batch", id="too large a batch"),
        pytest.param(("--num-timesteps", 1), "num_timesteps must be an integer from 2", id="no steps"),
        pytest.param(
            ("--cfg-img-scale", "nan"),
            "from 0 to 100, got nan",
            id="a scale that is not finite",
        ),
        pytest.param(("--sheet", "sheet.jpg"), "a name that ends in .png", id="a sheet that is no PNG"),
        pytest.param(("--report", "/no/report.json"), "cannot write a file there", id="a report in no folder"),
        pytest.param(("--model", "/no"), "no such folder", id="no model"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    result = run("eval", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"bagel-rt: error: .*\n", result.stderr) and message in result.stderr


def test_help_tells_that_tasks_have_their_own_defaults():
    page = good("eval", "--help", env=WIDE)
    assert page.count("[default: (the task's)]") == 4
