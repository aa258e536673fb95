"""The table of hyper-parameters: official names, types, ranges, defaults for each task, and a line of help.

The table consists of the fields of :class:`ImageSettings` and :class:`TextSettings`. Request checks, command line,
server, web page and documentation are generated from it. The defaults are those of the official app. There,
text-to-image does not pass ``cfg_img_scale``, so the inferencer's 1.5 applies although the context has no image; the
effective text scale is then 1 + 1.5 * (4 - 1) = 5.5.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple, get_args

from bagel_rt.validation import BOOLEAN, Spec, check, check_fields, checked, integer, number, one_of, per_prompt

MAX_BATCH = 64  # prompts of one call
MAX_INPUTS = 64  # texts and images of one request
MAX_ROUNDS = 16  # images of one interleaved answer
MAX_CHARACTERS = 1 << 20  # of one text

RenormType = Literal["global", "channel", "text_channel"]


def check_seed(seed) -> None:
    """Raise ValueError unless it is None or an integer in [0, 2**63)."""
    if seed is not None:
        check("seed", seed, integer(0, 2**63 - 1, "Leave it out for a random one"))


def _hyperparameter(default, spec: Spec, title: str, slider: tuple | None, help: str):
    """A row of the table; ``slider`` is the recommended range as (low, high, step), within the allowed one."""
    return checked(spec, default, title=title, slider=slider, help=help)


def _is_interval(value) -> bool:
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(number(0, 1).accepts, value))
    return pair and value[0] <= value[1]


_INTERVAL = Spec(_is_interval, "(low, high) with 0 <= low <= high <= 1", "Timesteps run from 1, noise, to 0, the image")
_RENORM_TYPE = one_of(get_args(RenormType), "The official app lists 'local' too, but the official model rejects it")


# fmt: off
@dataclass(frozen=True)
class ImageSettings:
    """Hyper-parameters of denoising. ValueError if a value is out of range."""

    cfg_text_scale: float = _hyperparameter(
        4.0, number(0, 100, "1 or less turns all guidance off"), "Text guidance", (0, 20, 0.1),
        "How closely the image follows the last text. 1 or less turns all guidance off, image guidance too: faster.")
    cfg_img_scale: float = _hyperparameter(
        1.5, number(0, 100, "1 or less turns image guidance off"), "Image guidance", (0, 10, 0.1),
        "How closely the image follows the input images. 1 or less turns this off. Without input images it multiplies "
        "text guidance: 4 with 1.5 acts like 5.5.")
    cfg_interval: tuple[float, float] = _hyperparameter(
        (0.4, 1.0), _INTERVAL, "Guided interval", (0, 1, 0.05),
        "A step at time t is guided if low < t <= high; t runs from 1, noise, to 0, the image. Other steps are faster.")
    cfg_renorm_min: float = _hyperparameter(
        0.0, number(0, 1, "1 turns renormalisation off"), "Minimum renormalisation factor", (0, 1, 0.05),
        "Guided steps are scaled back by a factor of at least this. 0 scales as far as needed, 1 not at all.")
    cfg_renorm_type: RenormType = _hyperparameter(
        "global", _RENORM_TYPE, "Renormalisation", None,
        "What is scaled back: the whole image (global), each token (channel), or each token before image guidance "
        "(text_channel).")
    timestep_shift: float = _hyperparameter(
        3.0, number(1e-3, 100, "1 leaves the schedule linear"), "Timestep shift", (0.1, 10, 0.1),
        "1 spaces the steps evenly. Above 1 more of them are near the noise, where the layout is decided; below 1 near "
        "the image.")
    num_timesteps: int = _hyperparameter(
        50, integer(2, 1000, "N points make N - 1 evaluations of the model"), "Timesteps", (2, 200, 1),
        "Points of the schedule. N points make N - 1 steps, and time grows with them.")

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "cfg_interval", tuple(float(end) for end in self.cfg_interval))


@dataclass(frozen=True)
class TextSettings:
    """Hyper-parameters of text decoding; the official code has no top_k and top_p. ValueError if out of range."""

    max_think_token_n: int = _hyperparameter(
        1024, integer(1, 32768, "A longer text exceeds the model"), "Maximum text length", (1, 4096, 1),
        "Forward passes per text, which has at most one token less (the official count).")
    do_sample: bool = _hyperparameter(
        False, BOOLEAN, "Sample", None,
        "Draw each token by its probability. Otherwise it is always the most likely one.")
    text_temperature: float = _hyperparameter(
        0.3, number(1e-3, 100, "For the most likely token use do_sample=False"), "Temperature", (0.05, 2, 0.05),
        "With do_sample: below 1 likely tokens become likelier, above 1 unlikely ones do.")
    top_k: int = _hyperparameter(
        0, integer(0, 2**24, "0 samples among all tokens"), "Top k", (0, 1000, 1),
        "With do_sample: draw among the k most likely tokens. 0 means all.")
    top_p: float = _hyperparameter(
        1.0, number(1e-6, 1, "1 samples among all tokens"), "Top p", (0.01, 1, 0.01),
        "With do_sample: draw among the most likely tokens that have this probability together. 1 means all.")

    def __post_init__(self):
        check_fields(self)
# fmt: on


HYPERPARAMETERS = {field.name: field for part in (ImageSettings, TextSettings) for field in fields(part)}


class Task(NamedTuple):
    """The hyper-parameters of a task; ``image`` is None if the task generates no image."""

    image: ImageSettings | None
    text: TextSettings


TASKS = {  # default settings
    "generate": Task(ImageSettings(), TextSettings()),
    "edit": Task(
        ImageSettings(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel"), TextSettings()
    ),
    "chat": Task(None, TextSettings(max_think_token_n=512)),
    "interleave": Task(ImageSettings(cfg_text_scale=3.0), TextSettings()),
}


def resolve_settings(task: str, given: dict) -> Task:
    """The hyper-parameters of a task: its defaults, overridden by ``given``.

    Raises:
        TypeError: a name is not a hyper-parameter of this task.
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
        per_prompt(name, values, count)
    return [resolve_settings(task, given | {name: values[i] for name, values in lists.items()}) for i in range(count)]
