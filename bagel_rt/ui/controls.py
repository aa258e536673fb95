"""Gradio controls for the hyper-parameters, with official names, defaults of the task and help texts."""

import secrets
from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin

import gradio as gr

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.settings import HYPERPARAMETERS, ImageSettings, Task

Values = dict[gr.components.Component, Any]  # values of controls, as Gradio passes them to a handler
Updates = dict[gr.components.Component, Any]  # changes of controls, as a handler returns them
EVENT = {"show_progress": "hidden", "api_visibility": "private"}  # options of every event listener
SEED_LIMIT = 2**53 - 1  # largest integer that a JavaScript number represents exactly

CONTROL_TEXTS = {  # name -> (title, help text)
    **{name: (field.metadata["title"], field.metadata["help"]) for name, field in HYPERPARAMETERS.items()},
    "think": ("Think first", "The model writes a thought before it answers or generates an image."),
    "seed": ("Seed", "−1 selects a random seed each time. The same seed and settings give the same result."),
    "negative_prompt": (
        "Negative prompt",
        (
            "Guidance moves the image away from what the model generates without a prompt. A negative prompt replaces "
            "that empty prompt."
        ),
    ),
    "count": (
        "Number of images",
        "Each has its own seed: the next ones are the seed plus 1, plus 2, and so on.",
    ),
    "max_rounds": ("Images", "Maximum number of images in one answer. The model decides how many it generates."),
    "previews": (
        "Show unfinished images",
        "Decodes previews while the image is generated. This takes at most a fifth of the time.",
    ),
}
_PAGE_ONLY = ("count", "previews")  # not arguments of the library
_IMAGE_NAMES = frozenset(field.name for field in fields(ImageSettings))
_STEPS = ("timestep_shift", "num_timesteps")
_ASPECT_RATIOS = {"1:1": (1, 1), "4:3": (3, 4), "3:4": (4, 3), "16:9": (9, 16), "9:16": (16, 9)}  # (height, width)


def labeled(name: str, kind: type[gr.components.Component], **options: Any) -> gr.components.Component:
    """Create a control labeled with its title and official name, with its help text.

    Args:
        name: a key of ``CONTROL_TEXTS``.
        kind: class of the control.
        **options: arguments of the class; ``info`` replaces the help text.
    """
    title, info = CONTROL_TEXTS[name]
    label = title if name == title.lower() or name in _PAGE_ONLY else f"{title} ({name})"
    return kind(label=label, **{"info": info, **options})


class Controls:
    """Controls for the hyper-parameters of a task.

    Attributes:
        components: name -> control, of those that have been built. ``cfg_interval`` has two controls, "from" and "to".
    """

    def __init__(self, task: Task, prefix: str):
        """
        Args:
            task: the default values.
            prefix: of the controls' element ids: "edit" gives ``edit-cfg_text_scale``.
        """
        self._prefix = prefix
        self._defaults = {
            field.name: (field, getattr(part, field.name))
            for part in task
            if part is not None
            for field in fields(part)
        }
        self.components: dict[str, gr.components.Component] = {}

    def build(self, *names: str) -> None:
        """Add the controls of these hyper-parameters to the current Gradio layout."""
        for name in names:
            self._add(*self._defaults[name])

    def build_rest(self) -> None:
        """Add the controls that have not been built, under headings."""
        shown = ""
        for name, (field, default) in self._defaults.items():
            if name not in self.components:
                heading = "Steps" if name in _STEPS else "Guidance" if name in _IMAGE_NAMES else "Text"
                if heading != shown:
                    gr.HTML(f"<h3>{heading}</h3>", elem_classes=["bare", "heading"])
                    shown = heading
                self._add(field, default)

    def _add(self, field: Field[Any], default: Any) -> None:
        name = field.name
        common = {"elem_id": f"{self._prefix}-{name}", "value": default}
        if isinstance(default, bool):
            self.components[name] = labeled(name, gr.Checkbox, **common)
            return
        if get_origin(field.type) is Literal:
            self.components[name] = labeled(name, gr.Radio, choices=list(get_args(field.type)), **common)
            return
        low, high, step = field.metadata["slider"]
        if isinstance(default, tuple):
            title, info = CONTROL_TEXTS[name]
            for end, value, note in zip(("from", "to"), default, (info, None), strict=True):
                label = f"{title}, {end} ({name})"
                self.components[end] = gr.Slider(low, high, value, step=step, label=label, info=note)
            return
        precision = 0 if isinstance(default, int) else None
        options = {"minimum": low, "maximum": high, "step": step, "precision": precision}
        self.components[name] = labeled(name, gr.Slider, **options, **common)

    def read(self, values: Values) -> dict[str, Any]:
        """Return the hyper-parameters from the values of the components."""
        parameters = {name: values[component] for name, component in self.components.items()}
        if "from" in parameters:
            parameters["cfg_interval"] = (parameters.pop("from"), parameters.pop("to"))
        return parameters


def think_control(task: str, thinks: bool, value: bool = False) -> gr.components.Component:
    """A control for thinking first; disabled, with the reason, for a model that was not trained to."""
    options: dict[str, Any] = {"value": value}
    if not thinks:
        options = {"value": False, "interactive": False, "info": "This model was not trained to think first."}
    return labeled("think", gr.Checkbox, elem_id=f"{task}-think", **options)


def seed_control(task: str) -> gr.components.Component:
    """A control for the seed; -1 for a new one each time."""
    limits = {"precision": 0, "minimum": -1, "maximum": SEED_LIMIT}
    return labeled("seed", gr.Number, value=-1, elem_id=f"{task}-seed", **limits)


def preset_sizes(config: BagelConfig) -> dict[str, tuple[int, int]]:
    """Aspect ratio of the official app ("4:3") -> (height, width); the longer side is the default resolution."""
    longer, stride = config.default_resolution, config.latent_stride

    def side(part: int, longest: int) -> int:
        return max(stride, round(longer * part / longest / stride) * stride)

    return {name: (side(h, max(h, w)), side(w, max(h, w))) for name, (h, w) in _ASPECT_RATIOS.items()}


def resolve_seed(value: float | None) -> int:
    """Return the seed of an input field; a random one for an empty or negative value."""
    return secrets.randbelow(2**32) if value is None or value < 0 else int(value)
