"""Text summaries and Markdown tables of the results of ``benchmarks.gpu_check``."""

from benchmarks import end_to_end, forward, kernels
from benchmarks.measure import LATENCY_US, MAX_COPIES, markdown
from benchmarks.workloads import WORKLOADS

_TIMING_METHOD = f"""\
Times are medians per call. Calls run back to back on separate copies of inputs and outputs that are together twice the
size of L2 (at most {MAX_COPIES} copies), so inputs are read from device memory and outputs are written back to it. No
share of the roofline is given below {LATENCY_US:.0f} us, where launch latency is the limit. The error is
||actual - expected|| / ||expected|| of the worst row, against a float64 reference."""


def problems(stage) -> list[str]:
    """Failures of a stage that make the whole run fail.

    Failures of peers, time limits and failures of ``tune`` (which reports its own results) do not count.
    """
    lines = list(stage.notes) if stage.name != "tune" else []
    for row in stage.rows:
        if stage.name == "check" and row["result"] != "pass":
            lines.append(f"{row['op']}, {row['case']}, {row['dtype']}: {row['result']}")
        elif stage.name == "tests" and row["status"] not in (0, None):
            lines.append(f"{row['file']}: status {row['status']}")
        elif stage.name == "kernels" and row.get("who") == kernels.OURS and row["note"]:
            lines.append(f"{row['workload']}: {row['note']}")
        elif stage.name == "forward" and row["note"]:
            lines.append(f"{row['forward']}: {row['note']}")
        elif stage.name == "end_to_end" and row["note"].startswith("WRONG"):
            lines.append(f"{row['case']}, batch {row['batch']}, {row['who']}: {row['note']}")
        elif stage.name == "sanitize" and row["status"] not in (0, None):
            lines.append(f"{row['file']}: {row['result']}")
    return lines


def summary(stage) -> str:
    """One line: whether the stage is complete, its number of rows and problems, and its duration."""
    state = "complete" if stage.complete else "incomplete"
    return f"{stage.name}: {state}, {len(stage.rows)} rows, {len(problems(stage))} problems, {stage.seconds:.0f} s"


def verdict(stages) -> str:
    """One line for the whole run: the stages with problems and the incomplete stages."""
    failed = [stage.name for stage in stages if problems(stage)]
    incomplete = [stage.name for stage in stages if not stage.complete]
    result = f"problems in {', '.join(failed)}" if failed else "no problems"
    return f"{result}; incomplete: {', '.join(incomplete)}" if incomplete else f"{result}; all stages complete"


def markdown_report(about: dict, stages) -> str:
    """The full report: the machine, then for each stage its problems, remarks and tables."""
    parts = ["# GPU check", markdown(["", ""], [[name, str(value)] for name, value in about.items()])]
    for stage in stages:
        parts.append(f"## {summary(stage)}")
        if lines := problems(stage):
            parts.append("\n".join(f"- {line}" for line in lines))
        if stage.remarks:
            parts.append("Not caused by the kernels:\n\n" + "\n".join(f"- {line}" for line in stage.remarks))
        if stage.rows:
            parts += _TABLES.get(stage.name, _plain)(stage.rows)
    return "\n\n".join(parts)


def _plain(rows) -> list[str]:
    header = list(rows[0])
    return [markdown(header, [[_cell(row.get(name, "")) for name in header] for row in rows])]


def _cell(value) -> str:
    return f"{value:.1e}" if isinstance(value, float) else "" if value is None or value == [] else str(value)


def _kernels(rows) -> list[str]:
    """An overview, then one table per workload in the order of measurement."""
    ceilings = next((row for row in rows if "limits" in row), None)
    limits, parts = None, [_TIMING_METHOD]
    if ceilings:
        limits, (flops, bandwidth) = ceilings["limits"], ceilings["measured"]
        parts.append(
            f"Roofline: {limits[0] / 1e12:.0f} TFLOP/s and {limits[1] / 1e12:.2f} TB/s; measured in this run: "
            f"{flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s."
        )
    workloads, by_workload = {workload.name: workload for workload in WORKLOADS}, {}
    for row in rows:
        if "who" in row:
            by_workload.setdefault(row["workload"], []).append(kernels.Row(**row))
    measured = [(workloads[name], group) for name, group in by_workload.items() if name in workloads]
    parts.append(kernels.overview(measured, limits))
    return parts + [kernels.table(workload, group, limits) for workload, group in measured]


def _forward(rows) -> list[str]:
    return [forward.table([forward.ForwardRow(**row) for row in rows])]


def _end_to_end(rows) -> list[str]:
    return [end_to_end.EXPLANATION, end_to_end.table([end_to_end.EndToEndRow(**row) for row in rows])]


_TABLES = {"kernels": _kernels, "forward": _forward, "end_to_end": _end_to_end}
