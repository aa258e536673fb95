"""The hyper-parameters as controls: official names, the task's defaults, and what each of them does."""

import secrets
from dataclasses import Field, fields
from typing import Literal, get_args, get_origin

import gradio as gr

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.settings import HYPERPARAMETERS, ImageSettings, TextSettings

SEED_LIMIT = 2**53 - 1  # the largest that a browser's numbers hold

EXPLAINED = {  # name -> (title, what it does)
    **{name: (field.metadata["title"], field.metadata["help"]) for name, field in HYPERPARAMETERS.items()},
    "think": ("Think first", "The model writes down its thoughts before it answers or draws."),
    "seed": ("Seed", "−1 takes a new one each time. The same seed and settings give the same result."),
    "negative_prompt": (
        "Negative prompt",
        "Guidance pushes the image away from what the model draws without a text. This is a text to push away from "
        "instead.",
    ),
    "max_rounds": ("Images", "The maximum of one answer. The model itself decides whether it draws."),
    "previews": ("Show unfinished images", "Decodes them from time to time, for up to a fifth of the time."),
}
_HEADINGS = {"cfg_text_scale": "Guidance", "timestep_shift": "Steps", "max_think_token_n": "Text"}  # above these
_SHAPES = {"1:1": (1, 1), "4:3": (3, 4), "3:4": (4, 3), "16:9": (9, 16), "9:16": (16, 9)}  # (height, width)


def explained(name: str, kind: type[gr.components.Component], **options) -> gr.components.Component:
    """A control with its title, its official name and its explanation."""
    title, info = EXPLAINED[name]
    return kind(label=f"{title} ({name})" if name != title.lower() else title, info=info, **options)


class Controls:
    """The hyper-parameters of a task, as controls in the layout that is being built.

    Attributes:
        components: name -> control; ``cfg_interval`` is two, "from" and "to".
    """

    def __init__(self, *settings: ImageSettings | TextSettings, prefix: str):
        """``prefix`` begins the controls' names in the page: "edit" makes ``edit-cfg_text_scale``."""
        self._prefix = prefix
        self.components: dict[str, gr.components.Component] = {}
        for part in settings:
            for field in fields(part):
                self._add(field, getattr(part, field.name))

    def _add(self, field: Field, default) -> None:
        name = field.name
        if name in _HEADINGS:
            gr.HTML(f"<h3>{_HEADINGS[name]}</h3>", elem_classes=["bare", "heading"])
        place = {"elem_id": f"{self._prefix}-{name}", "value": default}
        if isinstance(default, bool):
            self.components[name] = explained(name, gr.Checkbox, **place)
            return
        if get_origin(field.type) is Literal:
            self.components[name] = explained(name, gr.Radio, choices=list(get_args(field.type)), **place)
            return
        low, high, step = field.metadata["slider"]
        if isinstance(default, tuple):
            title, info = EXPLAINED[name]
            for end, value, note in zip(("from", "to"), default, (info, None), strict=True):
                label = f"{title}, {end} ({name})"
                self.components[end] = gr.Slider(low, high, value, step=step, label=label, info=note)
            return
        precision = 0 if isinstance(default, int) else None
        options = {"minimum": low, "maximum": high, "step": step, "precision": precision}
        self.components[name] = explained(name, gr.Slider, **options, **place)

    def read(self, values: dict) -> dict:
        """The hyper-parameters, from the values of components."""
        given = {name: values[component] for name, component in self.components.items()}
        if "from" in given:
            given["cfg_interval"] = (given.pop("from"), given.pop("to"))
        return given


def sizes(config: BagelConfig) -> dict[str, tuple[int, int]]:
    """The official app's shapes, "4:3" and so on -> (height, width), the longer side the model's usual one."""
    usual, stride = config.default_resolution, config.latent_stride
    return {
        name: tuple(max(stride, round(usual * part / max(shape) / stride) * stride) for part in shape)
        for name, shape in _SHAPES.items()
    }


def chosen_seed(given: float | None) -> int:
    """The seed, drawn if none is given or a negative one."""
    return secrets.randbelow(2**32) if given is None or given < 0 else int(given)
