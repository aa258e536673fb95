"""Reports as text and as JSON-safe values.

Cases of ``check`` and ``conformance`` are printed as they finish, so their columns have fixed widths.
"""

import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # imported inside the commands only, to keep ``bagel-rt --help`` fast
    from bagel_rt.check.run import Result
    from bagel_rt.conformance import CaseReport

CASE_LINE = "{:7}  {:28}  {:>8}  {:>7}  {:>7}  {}"
CHECK_LINE = "{:7}  {:18}  {:8}  {:>7}  {:>7}  {}"


def case_result(report: "CaseReport") -> str:
    """The result of a conformance case: skipped, pass or FAIL."""
    return "skipped" if report.skipped else "pass" if report.passed else "FAIL"


def case_lines(report: "CaseReport", verbose: bool) -> str:
    """A line for a conformance case; if ``verbose``, one more for each of its comparisons."""
    worst = report.worst
    columns = (f"{worst.error:.1e}", f"{worst.tolerance:.0e}", worst.name) if worst else ("", "", report.skipped)
    lines = [CASE_LINE.format(case_result(report), report.case, len(report.comparisons), *columns)]
    for item in report.comparisons if verbose else ():
        verdict = "skipped" if math.isnan(item.error) and item.passed else "pass" if item.passed else "FAIL"
        lines.append(f"{verdict:>11}{item.error:44.1e}  {item.tolerance:7.0e}  {item.name}")
        lines += [f"          {line}" for line in item.note.splitlines()]
    return "\n".join(lines)


def check_line(result: "Result") -> str:
    """A line for one kernel in one case, with the error message if nothing could be compared."""
    error = "" if result.error is None else f"{result.error:.1e}"
    case = f"{result.case}: {result.note}" if result.note else result.case
    return CHECK_LINE.format(result.result, result.op, result.dtype, error, f"{result.allowed:.1e}", case)


def info_text(report: dict[str, Any]) -> str:
    """Format the report of ``info``: a line per entry, entries of a section aligned."""
    lines = []
    for section, content in report.items():
        if isinstance(content, list):
            content = {entry["device"]: {name: entry[name] for name in entry if name != "device"} for entry in content}
        if isinstance(content, dict):
            lines.append(f"{section}:" if content else f"{section}: none")
            width = max(map(len, content), default=0)
            for name, value in content.items():
                lines.append(f"  {name:{width}}  {_format_entry(value) if isinstance(value, dict) else value}")
        else:
            lines.append(f"{section}: {content}")
    return "\n".join(lines)


def _format_entry(entry: dict[str, Any]) -> str:
    shown = {name: f"{value:,}" if isinstance(value, int) else value for name, value in entry.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def plain_text(table: Table) -> str:
    """Render a table without color and at its full width: a pipe or a narrow terminal gets whole rows."""
    console = Console(width=1000, color_system=None, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(map(str.rstrip, capture.get().splitlines()))


def finite(value: Any) -> Any:
    """Make a JSON value strict: None instead of NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
