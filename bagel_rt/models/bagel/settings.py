"""The official hyper-parameters, their defaults for each task, and their bounds.

Defaults are those of the official app: text-to-image does not pass ``cfg_img_scale`` there, so the inferencer's 1.5
applies although no image is in the context (the effective text scale is then 1 + 1.5 * (4 - 1) = 5.5).
"""

import math
import reprlib
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

RENORM_TYPES = ("global", "channel", "text_channel")
MAX_TEXT_LENGTH = 32768  # tokens a single answer or thought may take
MAX_BATCH = 64  # prompts of one call
MAX_INPUTS = 64  # texts and images of one request
MAX_ROUNDS = 16  # images of one interleaved answer
MAX_CHARACTERS = 1 << 20  # of one text


def check_seed(seed) -> None:
    """Refuse what is neither None nor an integer in [0, 2**63)."""
    if seed is not None:
        _check_integer("seed", seed, 0, 2**63 - 1, "leave it out for a random one")


def _check_number(name, value, low, high, reason):
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise ValueError(f"{name} is {value!r}: allowed are numbers from {low:g} to {high:g} ({reason})")


def _check_integer(name, value, low, high, reason):
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}: allowed are integers from {low} to {high} ({reason})")


@dataclass(frozen=True)
class ImageSettings:
    """How an image is denoised.

    Attributes:
        cfg_text_scale: guidance away from the context without the last text; 1 or less switches all guidance off
            (image guidance too, as in the official code). [0, 100]
        cfg_img_scale: guidance away from the context without images; 1 or less switches it off. [0, 100]
        cfg_interval: (low, high) within [0, 1]; a step at time t is guided if low < t <= high. t runs from 1 to 0.
        cfg_renorm_min: lower bound of the factor that shrinks the guided velocity back to the conditional one's norm;
            1 switches renormalisation off. [0, 1]
        cfg_renorm_type: "global" (one norm per image), "channel" (per token) or "text_channel" (per token, after text
            guidance and before image guidance).
        timestep_shift: s in t = s u / (1 + (s - 1) u); above 1 spends more steps near the noise. (0, 100]
        num_timesteps: points of the schedule; the model is evaluated num_timesteps - 1 times. [2, 1000]
    """

    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.5
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_min: float = 0.0
    cfg_renorm_type: str = "global"
    timestep_shift: float = 3.0
    num_timesteps: int = 50

    def __post_init__(self):
        for name in ("cfg_text_scale", "cfg_img_scale"):
            _check_number(name, getattr(self, name), 0, 100, "1 or less switches this guidance off")
        _check_number("cfg_renorm_min", self.cfg_renorm_min, 0, 1, "it bounds a factor that never exceeds 1")
        _check_number("timestep_shift", self.timestep_shift, 1e-3, 100, "1 leaves the schedule linear")
        _check_integer("num_timesteps", self.num_timesteps, 2, 1000, "N points make N - 1 evaluations of the model")
        interval = self.cfg_interval
        if not isinstance(interval, (tuple, list)) or len(interval) != 2:
            raise ValueError(f"cfg_interval is {interval!r}: give two numbers, for example (0.4, 1.0)")
        for value in interval:
            _check_number("cfg_interval", value, 0, 1, "timesteps run from 1 (noise) to 0 (image)")
        if interval[0] > interval[1]:
            raise ValueError(
                f"cfg_interval is {interval!r}: its low end lies above its high end, no step would be guided"
            )
        object.__setattr__(self, "cfg_interval", tuple(float(value) for value in interval))
        if self.cfg_renorm_type not in RENORM_TYPES:
            raise ValueError(
                f"cfg_renorm_type is {self.cfg_renorm_type!r}: allowed are {', '.join(RENORM_TYPES)} "
                "(the official app also lists 'local', which the official model rejects)"
            )


@dataclass(frozen=True)
class TextSettings:
    """How text is decoded.

    Attributes:
        max_think_token_n: forward passes at most; the text has one token less (the official count). [1, 32768]
        do_sample: sample from the softmax; False takes the most likely token.
        text_temperature: divides the logits when sampling. (0, 100]
        top_k: sample among the k most likely tokens; 0 for all (the official code has neither this nor the next).
            [0, 2**24]
        top_p: sample among the most likely tokens that have this probability together; 1 for all. (0, 1]
    """

    max_think_token_n: int = 1024
    do_sample: bool = False
    text_temperature: float = 0.3
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        _check_integer(
            "max_think_token_n", self.max_think_token_n, 1, MAX_TEXT_LENGTH, "a longer text would exceed the model"
        )
        if not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample is {self.do_sample!r}: give True or False")
        _check_number(
            "text_temperature", self.text_temperature, 1e-3, 100, "for the most likely token use do_sample=False"
        )
        _check_integer("top_k", self.top_k, 0, 2**24, "0 samples among all tokens")
        _check_number("top_p", self.top_p, 1e-6, 1, "1 samples among all tokens")


class Task(NamedTuple):
    """The hyper-parameters of a task; ``image`` is None where no image is drawn."""

    image: ImageSettings | None
    text: TextSettings


TASKS = {  # the defaults
    "generate": Task(ImageSettings(), TextSettings()),
    "edit": Task(
        ImageSettings(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel"), TextSettings()
    ),
    "chat": Task(None, TextSettings(max_think_token_n=512)),
    "interleave": Task(ImageSettings(cfg_text_scale=3.0), TextSettings()),
}


def resolve_settings(task: str, given: dict) -> Task:
    """The hyper-parameters of a task: the given ones, else its defaults.

    Raises:
        TypeError: a name is no hyper-parameter of this task.
        ValueError: a value is out of range.
    """
    defaults = TASKS[task]
    names = [[field.name for field in fields(part)] if part else [] for part in defaults]
    unknown = sorted(set(given) - {*names[0], *names[1]})
    if unknown:
        raise TypeError(
            f"unknown hyper-parameter {', '.join(unknown)}; this task has {', '.join(sorted(names[0] + names[1]))}"
        )
    return Task(
        *(
            replace(part, **{name: given[name] for name in own if name in given}) if part else None
            for part, own in zip(defaults, names, strict=True)
        )
    )


def settings_per_prompt(task: str, given: dict, count: int) -> list[Task]:
    """:func:`resolve_settings` for each of ``count`` prompts; a list holds one value per prompt.

    A list of two numbers for ``cfg_interval`` is one interval, not two per-prompt values.

    Raises:
        TypeError, ValueError: as :func:`resolve_settings`; or a list has another length.
    """
    lists = {name: values for name, values in given.items() if isinstance(values, list)}
    if all(isinstance(value, (int, float)) for value in lists.get("cfg_interval", ())):
        lists.pop("cfg_interval", None)
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(
                f"{name} is {reprlib.repr(values)}: give one for all, or a list of {count}, one per prompt"
            )
    return [resolve_settings(task, given | {name: values[i] for name, values in lists.items()}) for i in range(count)]
