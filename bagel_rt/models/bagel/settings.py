"""The table of hyper-parameters: official names, types, ranges, defaults for each task, and help texts.

The table consists of the fields of :class:`ImageSettings` and :class:`TextSettings`. Request checks, command line,
server, web page and documentation are generated from it. The defaults are those of the official app. There,
text-to-image does not pass ``cfg_img_scale``, so the inferencer's 1.5 applies although the context has no image; the
effective text scale is then 1 + 1.5 * (4 - 1) = 5.5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar, get_args, overload

from bagel_rt.validation import BOOLEAN, Spec, check, check_fields, checked, integer, number, one_of, per_prompt

MAX_BATCH = 64  # prompts of one call
MAX_INPUTS = 64  # texts and images of one request
MAX_ROUNDS = 16  # images of one interleaved answer
MAX_CHARACTERS = 1 << 20  # of one text

RenormType = Literal["global", "channel", "text_channel"]
_SEED = integer(0, 2**63 - 1, "Leave it out for a random one")


def check_seed(seed: object) -> int | None:
    """The seed as an int, or None; ValueError unless it is None or an integer in [0, 2**63)."""
    value: int | None = seed if seed is None else check("seed", seed, _SEED)
    return value


def _hyperparameter(
    default: object, spec: Spec, title: str, slider: tuple[float, float, float] | None, help: str
) -> Any:
    """A row of the table; ``slider`` is the recommended range (low, high, step), a part of the allowed range."""
    return checked(spec, default, title=title, slider=slider, help=help)


def _is_interval(value: object) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(number(0, 1).accepts, value)):
        return False
    return bool(value[0] <= value[1])


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
        0.0, number(0, 1, "1 turns renormalization off"), "Minimum renormalization factor", (0, 1, 0.05),
        "Guided steps are scaled back by a factor of at least this. 0 scales as far as needed, 1 turns it off.")
    cfg_renorm_type: RenormType = _hyperparameter(
        "global", _RENORM_TYPE, "Renormalization", None,
        "What is scaled back: the whole image (global), each token (channel), or each token before image guidance "
        "(text_channel).")
    timestep_shift: float = _hyperparameter(
        3.0, number(1e-3, 100, "1 leaves the schedule linear"), "Timestep shift", (0.1, 10, 0.1),
        "1 spaces the steps evenly. Above 1 more of them are near the noise, where the layout is decided; below 1 near "
        "the image.")
    num_timesteps: int = _hyperparameter(
        50, integer(2, 1000, "N points make N - 1 evaluations of the model"), "Timesteps", (2, 200, 1),
        "Points of the schedule. N points make N - 1 steps, and time grows with them.")

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "cfg_interval", tuple(float(end) for end in self.cfg_interval))


@dataclass(frozen=True)
class TextSettings:
    """Hyper-parameters of text decoding; top_k and top_p are additions. ValueError if a value is out of range."""

    max_think_token_n: int = _hyperparameter(
        1024, integer(1, 32768, "A longer text exceeds the model"), "Maximum text length", (1, 4096, 1),
        "Maximum forward passes per text. A text has at most one token less (the official count).")
    do_sample: bool = _hyperparameter(
        False, BOOLEAN, "Sample", None,
        "Draw each token by its probability. Otherwise select the most likely one.")
    text_temperature: float = _hyperparameter(
        0.3, number(1e-3, 100, "Turn do_sample off to select the most likely token"), "Temperature", (0.05, 2, 0.05),
        "With do_sample: below 1 likely tokens become likelier, above 1 unlikely ones do.")
    top_k: int = _hyperparameter(
        0, integer(0, 2**24, "0 samples among all tokens"), "Top k", (0, 1000, 1),
        "With do_sample: draw among the k most likely tokens. 0 means all.")
    top_p: float = _hyperparameter(
        1.0, number(1e-6, 1, "1 samples among all tokens"), "Top p", (0.01, 1, 0.01),
        "With do_sample: draw among the most likely tokens whose probabilities add up to this. 1 means all.")

    def __post_init__(self) -> None:
        check_fields(self)
# fmt: on


P = TypeVar("P", ImageSettings, TextSettings)
HYPERPARAMETERS = {field.name: field for part in (ImageSettings, TextSettings) for field in fields(part)}


class ImageTask(NamedTuple):
    """The hyper-parameters of a task that generates images."""

    image: ImageSettings
    text: TextSettings


class TextTask(NamedTuple):
    """The hyper-parameters of a task that generates text only."""

    image: None
    text: TextSettings


Task = ImageTask | TextTask
ImageTaskName = Literal["generate", "edit", "interleave"]
GENERATE = ImageTask(ImageSettings(), TextSettings())
EDIT = ImageTask(
    ImageSettings(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel"), TextSettings()
)
CHAT = TextTask(None, TextSettings(max_think_token_n=512))
INTERLEAVE = ImageTask(ImageSettings(cfg_text_scale=3.0), TextSettings())
TASKS: dict[str, Task] = {"generate": GENERATE, "edit": EDIT, "chat": CHAT, "interleave": INTERLEAVE}  # the defaults


@overload
def resolve_settings(task: ImageTaskName, overrides: Mapping[str, Any]) -> ImageTask: ...
@overload
def resolve_settings(task: str, overrides: Mapping[str, Any]) -> Task: ...
def resolve_settings(task: str, overrides: Mapping[str, Any]) -> Task:
    """The hyper-parameters of a task: its defaults, with ``overrides``.

    Raises:
        TypeError: a name is not a hyper-parameter of this task.
        ValueError: a value is out of range.
    """
    defaults = TASKS[task]
    names = {field.name for part in defaults if part is not None for field in fields(part)}
    unknown = sorted(set(overrides) - names)
    if unknown:
        raise TypeError(f"unknown hyper-parameter {', '.join(unknown)}. This task has {', '.join(sorted(names))}.")
    text = _override(defaults.text, overrides)
    return TextTask(None, text) if defaults.image is None else ImageTask(_override(defaults.image, overrides), text)


def _override(part: P, overrides: Mapping[str, Any]) -> P:
    own = {field.name for field in fields(part)}
    return replace(part, **{name: value for name, value in overrides.items() if name in own})


def settings_per_prompt(task: ImageTaskName, overrides: Mapping[str, Any], count: int) -> list[ImageTask]:
    """:func:`resolve_settings` for each of ``count`` prompts; a list holds one value per prompt.

    A list of two numbers for ``cfg_interval`` is one interval, not two per-prompt values.

    Raises:
        TypeError, ValueError: as :func:`resolve_settings`; or a list has another length.
    """
    lists = {name: values for name, values in overrides.items() if isinstance(values, list)}
    if all(isinstance(value, (int, float)) for value in lists.get("cfg_interval", ())):
        lists.pop("cfg_interval", None)
    for name, values in lists.items():
        per_prompt(name, values, count)
    return [
        resolve_settings(task, {**overrides, **{name: values[i] for name, values in lists.items()}})
        for i in range(count)
    ]
