"""What ``benchmarks.gpu_check`` found, as text and as Markdown tables."""

from benchmarks import end_to_end, forward, kernels
from benchmarks.measure import LATENCY, MAX_SETS, markdown
from benchmarks.workloads import WORKLOADS

_HOW_TIMED = f"""\
Times are medians. Calls run back to back, each on its own copy of the inputs and into its own outputs, all together
twice as large as L2 (at most {MAX_SETS} copies), and share the time: inputs come from memory, and what is written
reaches it. Where the roofline allows less than {LATENCY:.0f} us, latency is the limit and no share is given. The error
is ||got - want|| / ||want|| of the worst row, against the formula in float64."""


def problems(stage) -> list[str]:
    """What is wrong in a stage: the reasons why the whole run is not a success.

    A peer's failure is none, nor is a lack of time, nor what befalls ``tune``, which says itself what it keeps.
    """
    found = list(stage.notes) if stage.name != "tune" else []
    for row in stage.rows:
        if stage.name == "check" and row["result"] != "pass":
            found.append(f"{row['op']}, {row['case']}, {row['dtype']}: {row['result']}")
        elif stage.name == "tests" and row["status"] not in (0, None):
            found.append(f"{row['file']}: status {row['status']}")
        elif stage.name == "kernels" and row.get("who") == kernels.OURS and row["note"]:
            found.append(f"{row['workload']}: {row['note']}")
        elif stage.name == "forward" and row["note"]:
            found.append(f"{row['forward']}: {row['note']}")
        elif stage.name == "end_to_end" and row["note"].startswith("WRONG"):
            found.append(f"{row['case']}, batch {row['batch']}, {row['who']}: {row['note']}")
        elif stage.name == "sanitize" and row["status"] not in (0, None):
            found.append(f"{row['file']}: {row['result']}")
    return found


def summary(stage) -> str:
    """One line."""
    wrong = problems(stage)
    state = "complete" if stage.complete else "cut or incomplete"
    return f"{stage.name}: {state}, {len(stage.rows)} rows, {len(wrong)} problems, {stage.seconds:.0f} s"


def verdict(stages) -> str:
    """One line about all: what is wrong, and what was not finished."""
    wrong = [stage.name for stage in stages if problems(stage)]
    open_ones = [stage.name for stage in stages if not stage.complete]
    said = f"wrong in {', '.join(wrong)}" if wrong else "nothing that was reached is wrong"
    return f"{said}; not finished: {', '.join(open_ones)}" if open_ones else f"{said}; every stage is complete"


def markdown_report(about: dict, stages) -> str:
    """Everything, the machine first."""
    parts = ["# GPU check", markdown(["", ""], [[name, str(value)] for name, value in about.items()])]
    for stage in stages:
        parts.append(f"## {summary(stage)}")
        wrong = problems(stage)
        if wrong:
            parts.append("\n".join(f"- {line}" for line in wrong))
        if stage.remarks:
            parts.append("No fault of the kernels:\n\n" + "\n".join(f"- {line}" for line in stage.remarks))
        if stage.rows:
            parts += _TABLES.get(stage.name, _plain)(stage.rows)
    return "\n\n".join(parts)


def _plain(rows) -> list[str]:
    header = list(rows[0])
    return [markdown(header, [[_cell(row.get(name, "")) for name in header] for row in rows])]


def _cell(value) -> str:
    return f"{value:.1e}" if isinstance(value, float) else "" if value is None or value == [] else str(value)


def _kernels(rows) -> list[str]:
    """A table per workload, in the order they were measured; every contender once."""
    figures = next((row for row in rows if "limits" in row), None)
    limits, parts = None, [_HOW_TIMED]
    if figures:
        limits, (flops, traffic) = figures["limits"], figures["measured"]
        parts.append(
            f"Roofline: {limits[0] / 1e12:.0f} TFLOP/s and {limits[1] / 1e12:.2f} TB/s; measured in this run: "
            f"{flops / 1e12:.0f} TFLOP/s, {traffic / 1e12:.2f} TB/s."
        )
    known, by_workload = {workload.name: workload for workload in WORKLOADS}, {}
    for row in rows:
        if "who" in row:
            by_workload.setdefault(row["workload"], []).append(kernels.Row(**row))
    measured = [(known[name], made) for name, made in by_workload.items() if name in known]
    parts.append(kernels.overview(measured, limits))
    return parts + [kernels.table(workload, made, limits) for workload, made in measured]


def _forward(rows) -> list[str]:
    return [forward.table([forward.ForwardRow(**row) for row in rows])]


def _end_to_end(rows) -> list[str]:
    found = [end_to_end.EndToEndRow(**row) for row in rows]
    return [end_to_end.EXPLANATION, end_to_end.table(found)]


_TABLES = {"kernels": _kernels, "forward": _forward, "end_to_end": _end_to_end}
