"""Documentation generated from the code: a MkDocs hook and a griffe extension for mkdocstrings.

A line ``{{ name arguments }}`` of a page is replaced by the result of the function ``PARTS[name]``.
"""

import pydoc
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING
from typing import Any

import griffe
import torch
from typer.testing import CliRunner

from bagel_rt import kernels
from bagel_rt.cli import app
from bagel_rt.kernels.registry import OPS
from bagel_rt.models.bagel.config import BAGEL_7B_MOT
from bagel_rt.models.bagel.memory import expected_memory
from bagel_rt.models.bagel.settings import HYPERPARAMETERS, TASKS, Task

GPU_MEMORY = (24, 32, 40, 48, 80, 141)  # GB
REQUESTS: dict[str, dict[str, Any]] = {
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
    """Return the output of ``bagel-rt COMMAND --help`` as a code block."""
    output = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "100", "TERM": "dumb"}).output
    return "\n".join(["```text", *(line.rstrip() for line in output.strip("\n").splitlines()), "```"])


def hyperparameter_table() -> str:
    """List all hyper-parameters with their default in each task and their allowed values."""
    rows = []
    for name, field in HYPERPARAMETERS.items():
        defaults = (_default(settings, name) for settings in TASKS.values())
        rows.append((f"[`{name}`](#{name})", *defaults, field.metadata["spec"].allowed))
    return table(("", *TASKS, "allowed"), rows)


def _default(task: Task, name: str) -> str:
    return next((f"`{getattr(part, name)}`" for part in task if hasattr(part, name)), "")


def hyperparameter_help(name: str) -> str:
    """Return the help text of a hyper-parameter."""
    return HYPERPARAMETERS[name].metadata["help"]


def memory_table() -> str:
    """List the total memory of requests to BAGEL-7B-MoT in bfloat16, and the GPU sizes that are large enough."""
    rows = []
    for description, workload in REQUESTS.items():
        estimate = expected_memory(BAGEL_7B_MOT, **workload)
        fits = ("fits" if estimate.fits(size * 10**9) else "no" for size in GPU_MEMORY)
        rows.append((description, f"{estimate.total / 1e9:.1f} GB", *fits))
    return table(("request", "total", *(f"{size} GB" for size in GPU_MEMORY)), rows)


def op_table() -> str:
    """List all registered ops and the languages of their kernels."""
    return table(("op", "kernel"), [(f"`bagel_rt::{op}`", kernel) for op, kernel in sorted(OPS.items())])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with all but the first column right-aligned."""
    alignment = ("---", *("---:" for _ in header[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, alignment, *rows))


def op_pages() -> str:
    """Return mkdocstrings directives for the public functions of each file of ``kernels/``."""
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


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs hook: expand the ``{{ }}`` lines of a page."""
    return PART.sub(lambda part: PARTS[part[1]](*part[2].split()), markdown)


class Docstrings(griffe.Extension):
    """Adapts docstrings to griffe: Sphinx roles, several names on one line, and the fields of checked dataclasses."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """griffe hook: convert the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = NAMES.sub(_join_names, ROLE.sub(_role_to_code, obj.docstring.value))

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """griffe hook: show a checked field with its default and help instead of the call that creates it."""
        if str(attr.value).startswith(("checked(", "_hyperparameter(")):
            field = pydoc.locate(attr.parent.path).__dataclass_fields__[attr.name]
            attr.value = None if field.default is MISSING else repr(field.default)
            if "help" in field.metadata:
                text = f"{field.metadata['help']} Must be {field.metadata['spec'].allowed}."
                attr.docstring = griffe.Docstring(text, parent=attr)


def _role_to_code(role: re.Match[str]) -> str:
    """Convert a Sphinx role to inline code: ``:class:`~a.b.C``` to ``C``."""
    shortened, target = role.groups()
    return f"`{target.rpartition('.')[2] if shortened else target.lstrip('.')}`"


def _join_names(line: re.Match[str]) -> str:
    """Join several names with non-breaking spaces; griffe would parse the text after a plain space as a type."""
    return f"{line[1]}{line[2].replace(', ', ',' + chr(0xA0))}: "
