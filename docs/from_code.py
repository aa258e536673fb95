"""What pages take from the code when the documentation is built: a hook of MkDocs, and an extension of mkdocstrings.

A line ``{{ name arguments }}`` of a page becomes what the function of that name in ``PARTS`` returns for them.
"""

import pydoc
import re
from dataclasses import MISSING

import griffe
import torch
from typer.testing import CliRunner

from bagel_rt import kernels
from bagel_rt.cli import app
from bagel_rt.kernels.registry import OPS
from bagel_rt.models.bagel.config import BAGEL_7B_MOT
from bagel_rt.models.bagel.memory import expected_memory
from bagel_rt.models.bagel.settings import HYPERPARAMETERS, TASKS, Task

CARDS = (24, 32, 40, 48, 80, 141)  # GB
REQUESTS = {
    "an answer about a 980x980 image": {"task": "chat", "images": [(980, 980)]},
    "a 512x512 image": {"size": (512, 512)},
    "a 1024x1024 image": {"size": (1024, 1024)},
    "a 1024x1024 image after a thought of 1000 tokens": {"size": (1024, 1024), "max_think_token_n": 1000},
    "four 1024x1024 images at once": {"size": (1024, 1024), "batch": 4},
    "an edit of a 1024x1024 image": {"task": "edit", "size": (1024, 1024)},
    "an edit with two input images": {"task": "edit", "size": (1024, 1024), "images": [(1024, 1024)] * 2},
    "sixteen 1024x1024 images at once": {"size": (1024, 1024), "batch": 16},
    "a 1024x1024 image in float32": {"size": (1024, 1024), "dtype": torch.float32},
}
PART = re.compile(r"^\{\{ (\w+)((?: [\w-]+)*) \}\}$", re.MULTILINE)
ROLE = re.compile(r":\w+:`(~?)([^`]+)`")
NAMES = re.compile(r"^( +)(\w+(?:, \w+)+): ", re.MULTILINE)


def command_help(*command: str) -> str:
    """What ``bagel-rt COMMAND --help`` prints, as a block."""
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "100", "TERM": "dumb"}).output
    return "\n".join(["```text", *(line.rstrip() for line in shown.strip("\n").splitlines()), "```"])


def hyperparameter_table() -> str:
    """Every hyper-parameter with its default in each task and what is allowed."""
    rows = []
    for name, field in HYPERPARAMETERS.items():
        defaults = (_default(settings, name) for settings in TASKS.values())
        rows.append((f"[`{name}`](#{name})", *defaults, field.metadata["spec"].allowed))
    return table(("", *TASKS, "allowed"), rows)


def _default(task: Task, name: str) -> str:
    return next((f"`{getattr(part, name)}`" for part in task if hasattr(part, name)), "")


def hyperparameter_help(name: str) -> str:
    """What a hyper-parameter does."""
    return HYPERPARAMETERS[name].metadata["help"]


def memory_table() -> str:
    """What requests of BAGEL-7B-MoT in bfloat16 take in all, and the cards on which that fits."""
    rows = []
    for said, workload in REQUESTS.items():
        estimate = expected_memory(BAGEL_7B_MOT, **workload)
        fits = ("fits" if estimate.fits(card * 10**9) else "no" for card in CARDS)
        rows.append((said, f"{estimate.total / 1e9:.1f} GB", *fits))
    return table(("request", "total", *(f"{card} GB" for card in CARDS)), rows)


def op_table() -> str:
    """Every registered op, and what its kernel is written in."""
    return table(("op", "kernel"), [(f"`bagel_rt::{op}`", kernel) for op, kernel in sorted(OPS.items())])


def table(heads, rows) -> str:
    """A table in Markdown; all but the first column to the right."""
    marks = ("---", *("---:" for _ in heads[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, marks, *rows))


def op_pages() -> str:
    """The public functions of every file of ``kernels/``, for mkdocstrings."""
    functions: dict[str, list[str]] = {}
    for name in kernels.__all__:
        functions.setdefault(getattr(kernels, name).__module__.removeprefix("bagel_rt."), []).append(name)
    return "\n\n".join(f"::: {file}\n    options:\n      members: {names}" for file, names in functions.items())


PARTS = {
    "help": command_help,
    "hyperparameters": hyperparameter_table,
    "about": hyperparameter_help,
    "memory": memory_table,
    "ops": op_table,
    "op_pages": op_pages,
}


def on_page_markdown(markdown: str, **_) -> str:
    """Called by MkDocs for every page."""
    return PART.sub(lambda part: PARTS[part[1]](*part[2].split()), markdown)


class Docstrings(griffe.Extension):
    """Adapts docstrings to griffe: Sphinx roles, several names on one line, and the fields of checked dataclasses."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Called by griffe for every object that it has found."""
        if obj.docstring:
            obj.docstring.value = NAMES.sub(_joined, ROLE.sub(_plain, obj.docstring.value))

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_) -> None:
        """Show a checked field with its default and help instead of the call that makes it."""
        if str(attr.value).startswith(("checked(", "_hyperparameter(")):
            field = pydoc.locate(attr.parent.path).__dataclass_fields__[attr.name]
            attr.value = None if field.default is MISSING else repr(field.default)
            if "help" in field.metadata:
                text = f"{field.metadata['help']} Must be {field.metadata['spec'].allowed}."
                attr.docstring = griffe.Docstring(text, parent=attr)


def _plain(role: re.Match) -> str:
    """``:class:`~a.b.C``` as the code ``C``."""
    shortened, target = role.groups()
    return f"`{target.rpartition('.')[2] if shortened else target.lstrip('.')}`"


def _joined(line: re.Match) -> str:
    """The names of a line, without a space at which one would be taken for a type."""
    return f"{line[1]}{line[2].replace(', ', ',' + chr(0xA0))}: "
