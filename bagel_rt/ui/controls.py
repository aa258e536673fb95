"""The hyper-parameters as controls: official names, the task's defaults, and what each of them does."""

import secrets
from dataclasses import fields

import gradio as gr

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.settings import RENORM_TYPES, ImageSettings, TextSettings

SEED_LIMIT = 2**53 - 1  # the largest that a browser's numbers hold

EXPLAINED = {  # name -> (title, what it does)
    "cfg_text_scale": (
        "Text guidance",
        "How far the picture is pushed towards the last text. At 1 or less there is no guidance at all, not by "
        "pictures either, and steps are quicker.",
    ),
    "cfg_img_scale": (
        "Picture guidance",
        "How far it is pushed towards the input pictures; at 1 or less, not at all. Where there are none it multiplies "
        "text guidance: 4 with 1.5 pushes like 5.5.",
    ),
    "cfg_interval": (
        "Guided interval",
        "A step is guided where its t is above the lower end, up to the upper one. t runs from 1, noise, to 0, the "
        "picture; the other steps are quicker.",
    ),
    "cfg_renorm_type": (
        "Renormalisation",
        "Guidance makes each step too large. It is scaled back for the whole picture (global), for each token "
        "(channel), or for each token before picture guidance (text_channel).",
    ),
    "cfg_renorm_min": (
        "Least renormalisation factor",
        "The smallest factor that steps are scaled back by. 0 scales as far as needed, 1 not at all.",
    ),
    "num_timesteps": (
        "Timesteps",
        "Points of the way from noise to picture: N points make N − 1 steps, and time grows with them.",
    ),
    "timestep_shift": (
        "Timestep shift",
        "1 spaces the steps evenly. Above it more of them are near the noise, where the layout is decided; below it "
        "more are near the end, where details are.",
    ),
    "max_think_token_n": (
        "Longest text",
        "The longest a text may get, in tokens (plus one). The model may stop earlier.",
    ),
    "do_sample": ("Sample", "Draw each token by its probability. Otherwise it is always the most likely one."),
    "text_temperature": (
        "Temperature",
        "When sampling: below 1 likely tokens become likelier, above 1 unlikely ones do.",
    ),
    "top_k": ("Top k", "When sampling, choose only among the k most likely tokens. 0 means no limit."),
    "top_p": (
        "Top p",
        "When sampling, choose only among the most likely tokens that have this probability together. 1 means no "
        "limit.",
    ),
    "think": ("Think first", "The model writes down its thoughts, then goes on from them. Guidance never sees them."),
    "seed": ("Seed", "−1 takes a new one each time. The same seed and settings give the same result."),
    "negative_prompt": (
        "Negative prompt",
        "Guidance pushes the picture away from what the model draws without a text. This is a text to push away from "
        "instead.",
    ),
    "max_rounds": ("Pictures", "The most that one answer may draw. The model itself decides whether it draws."),
    "previews": ("Show unfinished pictures", "Decodes them now and then, for up to a fifth of the time."),
}
_RANGES = {  # name -> (minimum, maximum, step)
    "cfg_text_scale": (0, 20, 0.1),
    "cfg_img_scale": (0, 10, 0.1),
    "cfg_renorm_min": (0, 1, 0.05),
    "num_timesteps": (2, 200, 1),
    "timestep_shift": (0.1, 10, 0.1),
    "max_think_token_n": (1, 4096, 1),
    "text_temperature": (0.05, 2, 0.05),
    "top_k": (0, 1000, 1),
    "top_p": (0.01, 1, 0.01),
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
                self._add(field.name, getattr(part, field.name))

    def _add(self, name: str, default) -> None:
        if name in _HEADINGS:
            gr.HTML(f"<h3>{_HEADINGS[name]}</h3>", elem_classes=["bare", "heading"])
        place = {"elem_id": f"{self._prefix}-{name}", "value": default}
        if name == "cfg_interval":
            title, info = EXPLAINED[name]
            for end, value, said in zip(("from", "to"), default, (info, None), strict=True):
                label = f"{title}, {end} ({name})"
                self.components[end] = gr.Slider(0, 1, value, step=0.05, label=label, info=said)
        elif name == "cfg_renorm_type":
            self.components[name] = explained(name, gr.Radio, choices=list(RENORM_TYPES), **place)
        elif isinstance(default, bool):
            self.components[name] = explained(name, gr.Checkbox, **place)
        else:
            low, high, step = _RANGES[name]
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
