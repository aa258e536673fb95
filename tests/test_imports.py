"""Imports inside the package only go down, from the command line to the kernels, and never in a circle.

Read from the sources, so imports inside functions count as well. Imports for type checkers may not go up either, but
they may close a circle, as they never run.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "bagel_rt"

# From the top. A line imports from the lines below it; the names of one line do not import each other.
LAYERS = (
    ("cli",),
    ("serve", "ui", "compat", "conformance"),
    ("model_thread",),
    ("pipeline",),
    ("engine",),
    ("request", "tiny", "check"),
    ("train",),
    ("models",),
    ("checkpoint", "runtime"),
    ("kernels",),
    ("errors", "files", "validation"),
    ("", "_C"),  # "": the root, which holds the version and imports the rest on demand
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FOLDERS = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.kernels": ROOT / "kernels"}
MAX_ROOT_MODULES = 9


def read_package() -> dict[str, str]:
    """The sources of the package by the names of the modules."""
    sources = {}
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            sources[".".join((name, *parts)).removesuffix(".__init__")] = path.read_text()
    return sources


def imports_of(name: str, sources: dict[str, str], runs: bool = False) -> list[tuple[str, bool]]:
    """The modules of the package that a module imports, each with whether the import is relative.

    ``from package import name`` imports the module of that name if there is one, else the package. With ``runs`` those
    for type checkers are left out.
    """
    is_package = any(other.startswith(f"{name}.") for other in sources)
    found, tree = [], ast.parse(sources[name])
    checking = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    skipped = {child for node in checking if runs for child in ast.walk(node)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module
            if node.level:
                parents = name.split(".")
                base = parents[: len(parents) + is_package - node.level]
                origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                member = f"{origin}.{alias.name}"
                is_module = member in sources or member == f"{PACKAGE}._C"
                found.append((member if is_module or origin == PACKAGE else origin, node.level > 0))
    ours = (PACKAGE, "benchmarks", "tests")
    return [(target, relative) for target, relative in found if target.split(".")[0] in ours]


def unit_of(module: str) -> str:
    """The package or module in the root that a module belongs to; "" for the root itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__version__" else ""


def violations(sources: dict[str, str]) -> dict[tuple[str, str], str]:
    """Every import that breaks a rule: (importing module, imported module or rule) -> a sentence."""
    graph = {name: {target for target, _ in imports_of(name, sources, runs=True)} - {name} for name in sources}
    found = {}
    for name in sources:
        for target, relative in imports_of(name, sources, runs=name == PACKAGE):
            if unit_of(name) == unit_of(target) == "kernels" and not relative:
                found[name, "absolute"] = f"{name} imports {target}, but imports inside kernels/ must be relative"
            elif problem := problem_of_import(name, target, graph):
                found[name, target] = f"{name} imports {target}, {problem}"
    return found


def problem_of_import(name: str, target: str, graph: dict[str, set[str]]) -> str:
    """The rule that an import breaks; "" for none."""
    unit, other = unit_of(name), unit_of(target)
    if not target.startswith(PACKAGE):
        return "which is not part of the package"
    if name == PACKAGE and target != name:
        return "but the root imports on demand only"
    if other not in RANKS:
        return "which has no place in LAYERS"
    if other != unit and RANKS[other] <= RANKS[unit]:
        return f"but {other} is not below {unit}"
    if unit == "kernels" and other not in ("kernels", "_C"):
        return "but kernels/ leaves its package only for _C"
    if target in graph[name] and reaches(target, name, graph):
        return "which imports it back"
    return ""


def reaches(start: str, end: str, graph: dict[str, set[str]]) -> bool:
    """Whether a module imports another, directly or through others."""
    seen, ahead = set(), [start]
    while ahead:
        if (here := ahead.pop()) == end:
            return True
        if here not in seen:
            seen.add(here)
            ahead += graph.get(here, ())
    return False


def test_imports_only_go_down():
    found = violations(read_package())
    assert not found, "\n".join(text for _, text in sorted(found.items()))


def test_every_unit_has_a_place():
    units = {unit_of(name) for name in read_package()}
    assert units <= set(RANKS), f"add to LAYERS: {units - set(RANKS)}"


def test_the_root_holds_few_modules():
    modules = sorted(path.name for path in (ROOT / PACKAGE).glob("*.py"))
    assert len(modules) <= MAX_ROOT_MODULES, modules


def problem_of(module: str, source: str) -> str:
    """The only violation of a module with this source in a small package; "" for none."""
    sources = {
        "bagel_rt": "",
        "bagel_rt.errors": "",
        "bagel_rt.engine": "",
        "bagel_rt.models.bagel.model": "from bagel_rt.runtime.plan import Plan",
        "bagel_rt.runtime": "",
        "bagel_rt.runtime.plan": "from bagel_rt.runtime import context",
        "bagel_rt.runtime.context": "",
        "bagel_rt.kernels": "from .norm import rms_norm",
        "bagel_rt.kernels.norm": "",
        "bagel_rt.kernels.linear": "",
    }
    before = violations(sources)
    assert before == {}
    found = {(name, target): text for (name, target), text in violations(sources | {module: source}).items()}
    return next((text for (name, _), text in found.items() if name == module), "")


def test_accepts_imports_that_go_down():
    assert problem_of("bagel_rt.engine", "from bagel_rt.models.bagel.model import BagelModel\nimport torch") == ""
    assert problem_of("bagel_rt.errors", "from bagel_rt import __version__") == ""
    assert (
        problem_of("bagel_rt.kernels.linear", "from . import norm\nfrom .norm import rms_norm\nfrom .. import _C") == ""
    )


def test_names_an_import_that_goes_up():
    inside = "def run():\n    from bagel_rt.models.bagel.model import BagelModel"
    message = "bagel_rt.runtime.context imports bagel_rt.models.bagel.model, but models is not below runtime"
    assert problem_of("bagel_rt.runtime.context", inside) == message
    checked = "if TYPE_CHECKING:\n    from ..models.bagel import model"
    assert problem_of("bagel_rt.runtime.context", checked) == message
    assert "engine is not below errors" in problem_of("bagel_rt.errors", "from bagel_rt import engine")
    assert "checkpoint is not below runtime" in problem_of("bagel_rt.runtime.plan", "import bagel_rt.checkpoint")


def test_lets_type_checkers_go_in_a_circle():
    checked = "if TYPE_CHECKING:\n    from .plan import Plan"
    assert problem_of("bagel_rt.runtime.context", checked) == ""


def test_names_a_circle():
    message = "bagel_rt.runtime.context imports bagel_rt.runtime.plan, which imports it back"
    assert problem_of("bagel_rt.runtime.context", "from .plan import Plan") == message


def test_names_an_absolute_import_inside_kernels():
    assert "must be relative" in problem_of("bagel_rt.kernels.linear", "from bagel_rt.kernels.norm import rms_norm")


def test_names_an_import_out_of_kernels():
    assert "leaves its package only for _C" in problem_of("bagel_rt.kernels.linear", "from ..errors import Cancelled")


def test_names_an_import_of_what_is_not_installed():
    assert "not part of the package" in problem_of("bagel_rt.engine", "from benchmarks.measure import median")


def test_names_a_public_name_imported_from_the_root():
    assert "has no place" in problem_of("bagel_rt.engine", "from bagel_rt import Bagel")
