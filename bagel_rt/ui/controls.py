"""Gradio controls for the hyper-parameters, with official names, defaults of the task and help texts."""

import secrets
from dataclasses import Field, fields
from typing import Literal, get_args, get_origin

import gradio as gr

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.settings import HYPERPARAMETERS, ImageSettings, TextSettings

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
    "max_rounds": ("Images", "Maximum number of images in one answer. The model decides how many it generates."),
    "previews": (
        "Show unfinished images",
        "Decodes previews while the image is generated. This takes at most a fifth of the time.",
    ),
}
# Heading above the control of this name.
_HEADINGS = {"cfg_text_scale": "Guidance", "timestep_shift": "Steps", "max_think_token_n": "Text"}
_SHAPES = {"1:1": (1, 1), "4:3": (3, 4), "3:4": (4, 3), "16:9": (9, 16), "9:16": (16, 9)}  # (height, width)


def labeled(name: str, kind: type[gr.components.Component], **options) -> gr.components.Component:
    """Create a control labeled with its title and official name, with its help text."""
    title, info = CONTROL_TEXTS[name]
    return kind(label=f"{title} ({name})" if name != title.lower() else title, info=info, **options)


class Controls:
    """Controls for the hyper-parameters of a task, added to the current Gradio layout.

    Attributes:
        components: name -> control. ``cfg_interval`` has two controls, "from" and "to".
    """

    def __init__(self, *settings: ImageSettings | TextSettings, prefix: str):
        """``prefix`` is the prefix of the controls' element ids: "edit" gives ``edit-cfg_text_scale``."""
        self._prefix = prefix
        self.components: dict[str, gr.components.Component] = {}
        for part in settings:
            for field in fields(part):
                self._add(field, getattr(part, field.name))

    def _add(self, field: Field, default) -> None:
        name = field.name
        if name in _HEADINGS:
            gr.HTML(f"<h3>{_HEADINGS[name]}</h3>", elem_classes=["bare", "heading"])
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

    def read(self, values: dict) -> dict:
        """Return the hyper-parameters from the values of the components."""
        parameters = {name: values[component] for name, component in self.components.items()}
        if "from" in parameters:
            parameters["cfg_interval"] = (parameters.pop("from"), parameters.pop("to"))
        return parameters


def preset_sizes(config: BagelConfig) -> dict[str, tuple[int, int]]:
    """Aspect ratio of the official app ("4:3") -> (height, width); the longer side is the default resolution."""
    longer, stride = config.default_resolution, config.latent_stride
    return {
        name: tuple(max(stride, round(longer * part / max(shape) / stride) * stride) for part in shape)
        for name, shape in _SHAPES.items()
    }


def resolve_seed(value: float | None) -> int:
    """Return the seed of an input field; a random one for an empty or negative value."""
    return secrets.randbelow(2**32) if value is None or value < 0 else int(value)
