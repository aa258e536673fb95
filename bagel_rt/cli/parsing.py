"""Turn option groups into command-line options, and convert and check the values of options.

typer only splits the command line. Numbers, choices and ranges are checked here, so that every error has the project's
form and names the option.
"""

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import Field, dataclass, field, fields, make_dataclass
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.models import OptionInfo, ParameterInfo

from bagel_rt.models.bagel.settings import HYPERPARAMETERS, TASKS
from bagel_rt.validation import Spec, check, invalid, one_of

Command = Callable[..., None]

_METAVARS = {float: "X", int: "N", tuple[float, float]: "LOW HIGH"}
_INTEGER = re.compile("[+-]?[0-9]{1,40}")


class OptionGroup:
    """Base of dataclasses whose fields are options of a command."""

    def as_arguments(self) -> dict[str, Any]:
        """The options as keyword arguments, without those that are None."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a command.

    Attributes:
        flag: its name on the command line, as in error messages.
        kind: the type of its value, without None.
        spec: the allowed values, if they are restricted.
    """

    flag: str
    kind: Any
    spec: Spec | None

    @property
    def converted(self) -> bool:
        """Whether typer passes its value as text."""
        return self.kind in (*_METAVARS, Path, list[Path]) or get_origin(self.kind) is Literal

    def convert(self, text: str | tuple[str, ...] | list[str] | None) -> object:
        """Convert the text of a value and check it; ValueError if it is not allowed."""
        if text is None:
            return None
        value: object
        if isinstance(text, list):
            value = [_convert_path(self.flag, entry) for entry in text]
        elif self.kind is Path:
            value = _convert_path(self.flag, str(text))
        elif isinstance(text, tuple):
            value = tuple(_convert_number(self.flag, entry, float) for entry in text)
        elif get_origin(self.kind) is Literal:
            check(self.flag, text, one_of(get_args(self.kind)))
            value = text
        else:
            value = _convert_number(self.flag, str(text), self.kind)
        if self.spec is not None:
            check(self.flag, value, self.spec)
        return value


def _convert_path(flag: str, text: str) -> Path:
    if not text:  # Path("") is the current folder
        raise invalid(flag, text, "a path")
    return Path(text)


def _convert_number(flag: str, text: str, kind: type) -> int | float:
    if kind is int:
        if _INTEGER.fullmatch(text) is None:
            raise invalid(flag, text, "an integer")
        return int(text)
    try:
        return float(text.replace("_", "?"))  # Python's own syntax has 1_000
    except ValueError:
        raise invalid(flag, text, "a number") from None


class _Warnings(logging.Handler):
    """Prints warnings on stderr in the form of the error messages, unless a command configures logging."""

    def __init__(self, flags: Mapping[str, str]):
        super().__init__(logging.WARNING)
        self._flags = flags

    def emit(self, record: logging.LogRecord) -> None:
        text = name_options(self.format(record), self._flags)
        typer.echo(f"bagel-rt: {record.levelname.lower()}: {text}", err=True)


def with_options(**groups: type[OptionGroup]) -> Callable[[Command], Command]:
    """Make a command of a function: expand its parameters of these names into one option per field of their dataclass.

    The function gets converted and checked values. Errors that it raises name options instead of Python arguments.
    """

    def decorate(command: Command) -> Command:
        expanded: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            group = groups.get(parameter.name)
            expanded += inspect.signature(group).parameters.values() if group else [parameter]
        described = {parameter.name: _describe(parameter.name, parameter.annotation) for parameter in expanded}
        flags = {name: parameter.flag for name, parameter in described.items()}

        @wraps(command)
        def call(**values: Any) -> None:
            logging.lastResort = _Warnings(flags)
            try:
                for name, parameter in described.items():
                    if parameter.converted:
                        values[name] = parameter.convert(values[name])
                for name, group in groups.items():
                    values[name] = group(**{item.name: values.pop(item.name) for item in _fields(group)})
                command(**values)
            except Exception as error:
                if len(error.args) == 1 and isinstance(error.args[0], str):
                    error.args = (name_options(error.args[0], flags),)
                raise

        signature = inspect.Signature([_for_typer(parameter, described[parameter.name]) for parameter in expanded])
        call.__signature__ = signature  # type: ignore[attr-defined]  # read by typer; functions have no such attribute
        return call

    return decorate


def _fields(group: type[OptionGroup]) -> tuple[Field[Any], ...]:
    return fields(group)  # type: ignore[arg-type]  # the subclasses are dataclasses, their base is not


def _describe(name: str, annotation: Any) -> _Parameter:
    """Describe a parameter of a command by its ``Annotated`` type."""
    kind, *metadata = get_args(annotation)
    (info,) = (item for item in metadata if isinstance(item, ParameterInfo))
    spec = next((item for item in metadata if isinstance(item, Spec)), None)
    kinds = [member for member in get_args(kind) if member is not NoneType]
    if NoneType in get_args(kind):
        (kind,) = kinds
    if isinstance(info, OptionInfo):
        declared = [info.default, *(info.param_decls or ())]  # within Annotated, the first name is in "default"
        names = [flag.partition("/")[0] for flag in declared if isinstance(flag, str) and flag.startswith("--")]
        flag = names[0] if names else "--" + name.replace("_", "-")
    else:
        flag = (info.metavar or name).removesuffix("...")
    return _Parameter(flag, kind, spec)


def _for_typer(parameter: inspect.Parameter, described: _Parameter) -> inspect.Parameter:
    """The parameter as typer sees it: a keyword, with text as the value if it is converted here."""
    if not described.converted:
        return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    annotation = parameter.annotation
    (info,) = (copy(item) for item in annotation.__metadata__ if isinstance(item, ParameterInfo))
    kind: Any = {tuple: tuple[str, str], list: list[str]}.get(get_origin(described.kind), str)
    if get_origin(described.kind) is Literal:
        info.metavar = "|".join(get_args(described.kind))
    elif described.kind in _METAVARS and info.metavar is None:
        info.metavar = _METAVARS[described.kind]
    default = parameter.default
    if default is None:
        kind = kind | None
    elif default is not inspect.Parameter.empty:
        default = tuple(map(str, default)) if isinstance(default, tuple) else str(default)
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=default)


def option_flags(command: Command) -> dict[str, str]:
    """The parameters of a command -> their names on the command line."""
    parameters = inspect.signature(command).parameters.values()
    return {parameter.name: _describe(parameter.name, parameter.annotation).flag for parameter in parameters}


def name_options(message: str, flags: Mapping[str, str]) -> str:
    """Replace Python arguments in a message by options: ``top_k=0`` by ``--top-k 0``, ``seed must`` by ``--seed must``.

    A name without an underscore can be an ordinary word. It counts as an argument before "=", in backticks, and at the
    beginning before "must".
    """

    def replaced(match: re.Match[str]) -> str:
        quote, name, value = match.groups()
        is_subject = match.start() == 0 and message[match.end() :].startswith(" must")
        if not (quote or "_" in name or value is not None or is_subject):
            return match[0]
        if value is None:
            return flags[name]
        switch = {"True": flags[name], "False": flags[name].replace("--", "--no-", 1)}
        return switch.get(value, f"{flags[name]} {value.strip(chr(39))}")

    names = "|".join(sorted(flags, key=len, reverse=True))
    # Not within a path or another name; a value ends before punctuation.
    pattern = rf"(?<![\w/.-])(`?)({names})(?:=('[^']*'|[\w.]*\w))?(?![\w/=-]|\.\w)\1"
    return re.sub(pattern, replaced, message)


def checked_option(
    item: "Field[Any]", panel: str, default: object = None, show_default: bool | str = True
) -> tuple[str, Any, Any]:
    """Return (name, type, field) of an option for ``make_dataclass``, made from a field with a check and a help text.

    Without a default, an omitted option is None.
    """
    flags = {name: "--" + name.replace("_", "-") for name in HYPERPARAMETERS}
    option = typer.Option(
        help=name_options(item.metadata["help"], flags), show_default=show_default, rich_help_panel=panel
    )
    kind = item.type if default is not None else item.type | None  # type: ignore[operator]  # not a string here
    return item.name, Annotated[kind, option, item.metadata["spec"]], field(default=default)


def _group(name: str, options: list[tuple[str, Any, Any]]) -> type[OptionGroup]:
    return make_dataclass(name, options, bases=(OptionGroup,), frozen=True)


def hyperparameters(task: str) -> type[OptionGroup]:
    """One option for each hyper-parameter of a task. Defaults are the task's."""
    return _group(
        "Hyperparameters",
        [
            checked_option(item, panel, getattr(part, item.name))
            for part, panel in zip(TASKS[task], ("Denoising", "Text"), strict=True)
            for item in (fields(part) if part else ())
        ],
    )


def image_settings(*names: str) -> type[OptionGroup]:
    """One option for each named hyper-parameter, for a command that runs several tasks.

    An omitted option is None, so that each task uses its own default.
    """
    return _group(
        "ImageSettings",
        [checked_option(HYPERPARAMETERS[name], "Denoising", show_default="the task's") for name in names],
    )


def option_group(name: str, items: list["Field[Any]"], panel: str) -> type[OptionGroup]:
    """One option for each checked field. An omitted option is None; the help shows the field's default."""
    return _group(name, [checked_option(item, panel, show_default=str(item.default)) for item in items])
