"""The table of hyper-parameters and the interfaces generated from it."""

from dataclasses import asdict, fields

import pytest
import typer

from bagel_rt.cli import app
from bagel_rt.cli.parsing import name_options
from bagel_rt.models.bagel.settings import HYPERPARAMETERS, TASKS, resolve_settings, settings_per_prompt


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_hyperparameter_has_title_help_and_valid_slider(name):
    metadata = HYPERPARAMETERS[name].metadata
    assert metadata["title"] and metadata["help"].endswith(".") and "\n" not in metadata["help"]
    if metadata["slider"] and name != "cfg_interval":
        low, high, _ = metadata["slider"]
        assert metadata["spec"].accepts(low) and metadata["spec"].accepts(high)
        values = [getattr(part, name) for task in TASKS.values() for part in task if hasattr(part, name)]
        assert all(low <= value <= high for value in values)


@pytest.mark.parametrize("task", TASKS)
def test_command_line_shows_the_help_and_defaults_of_the_table(task):
    options = {option.name: option for option in typer.main.get_command(app).commands[task].params}
    defaults = {name: value for part in TASKS[task] if part for name, value in asdict(part).items()}
    shown = {name: options[name].default for name in HYPERPARAMETERS if name in options}
    texts = {
        name: tuple(map(str, value)) if isinstance(value, tuple) else str(value) for name, value in defaults.items()
    }
    assert {name: default if isinstance(default, tuple) else str(default) for name, default in shown.items()} == texts
    flags = {name: "--" + name.replace("_", "-") for name in HYPERPARAMETERS}
    for name in defaults:  # the command line names options where the table names fields
        assert options[name].help == name_options(HYPERPARAMETERS[name].metadata["help"], flags)


def test_server_accepts_every_image_hyperparameter():
    pytest.importorskip("pydantic", reason="the extra [serve] is not installed")
    from bagel_rt.serve.schema import Chat, Generation

    names = {field.name for field in fields(TASKS["generate"].image)}
    assert names <= Generation.model_fields.keys() and names <= Chat.model_fields.keys()


def test_values_override_the_defaults():
    image, text = resolve_settings("edit", {"num_timesteps": 7, "top_k": 3})
    assert image.num_timesteps == 7 and image.cfg_img_scale == 2.0 and text.top_k == 3


def test_rejects_hyperparameters_of_another_task():
    with pytest.raises(TypeError, match="unknown hyper-parameter cfg_text_scale. This task has do_sample"):
        resolve_settings("chat", {"cfg_text_scale": 3.0})


def test_list_gives_one_value_per_prompt():
    settings = settings_per_prompt("generate", {"cfg_text_scale": [1.0, 2.0], "cfg_interval": [0.1, 0.2]}, 2)
    assert [task.image.cfg_text_scale for task in settings] == [1.0, 2.0]
    assert [task.image.cfg_interval for task in settings] == [(0.1, 0.2)] * 2
