"""``bagel-rt check``, ``conformance`` and ``info``: test and describe this installation."""

import fnmatch
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bagel_rt.cli import options as cli_options
from bagel_rt.cli.parsing import with_options
from bagel_rt.cli.report import CASE_LINE, CHECK_LINE, case_lines, case_result, check_line, finite, info_text


@with_options()
def info(model: cli_options.Model = None, as_json: cli_options.Json = False) -> None:
    """Show versions, devices, the compiled extension and the ops' backends; with --model also a checkpoint's sizes."""
    from bagel_rt.check.info import collect

    report = collect(model)
    typer.echo(json.dumps(report) if as_json else info_text(report))


@with_options()
def check(
    op: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Check only this op. Repeatable.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", show_default="cuda if there is one", help="cpu, cuda or cuda:N.")
    ] = None,
    as_json: cli_options.Json = False,
) -> None:
    """Compare every kernel with its reference on this machine's GPU; exit code 1 if one fails or differs.

    Run this first on a new GPU model. With TRITON_INTERPRET=1 in the environment, a CPU runs the kernels in Triton's
    interpreter, at small sizes.
    """
    from bagel_rt.check import run as checks
    from bagel_rt.pipeline import resolve_device

    cases = checks.choose_cases(op)
    chosen = resolve_device(device)
    results = checks.run(chosen, cases)
    report = checks.describe_machine(chosen)
    if not as_json:
        typer.echo(CHECK_LINE.format("result", "op", "dtype", "error", "allowed", "case"))
    done = []
    for result in results:
        done.append(result)
        if not as_json:
            typer.echo(check_line(result))
    failed = sum(result.result == "FAIL" for result in done)
    skipped = len(cases) - len({(result.op, result.case) for result in done})
    if as_json:
        entries = [finite(asdict(result)) | {"result": result.result.lower()} for result in done]
        typer.echo(json.dumps(report | {"failed": failed, "for_gpus_only": skipped, "cases": entries}))
    else:
        counts = {name: sum(result.result == name for result in done) for name in ("pass", "FAIL", "not run")}
        typer.echo(", ".join(f"{count} {name}" for name, count in counts.items()))
        if skipped:
            typer.echo(f"{skipped} cases skipped: the model's own sizes need a GPU, CUDA kernels need the extension")
        typer.echo(f"{report['device']}, tile sizes of {report['table']}")
        typer.echo(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    if failed:
        raise typer.Exit(1)


@with_options()
def conformance(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="Folder with checkpoint, images and cases.")],
    case: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Run only this case; * matches anything. Repeatable.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every comparison.")] = False,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[cli_options.DTypeName, typer.Option(help="Data type of the weights.")] = "float32",
    as_json: cli_options.Json = False,
) -> None:
    """Compare with recorded outputs of the official code; exit code 1 if anything differs."""
    from bagel_rt.conformance import find_cases, run_case
    from bagel_rt.pipeline import Bagel

    folders = {folder.name: folder for folder in find_cases(pack)}
    chosen = {name: fnmatch.filter(folders, name) for name in case or ["*"]}
    for name, matches in chosen.items():
        if not matches:
            raise ValueError(f"--case must match one of {', '.join(folders)}, got {name}.")
    bagel = Bagel.from_pretrained(pack / "checkpoint", device, dtype)
    if not as_json:
        typer.echo(CASE_LINE.format("result", "case", "compared", "worst", "allowed", "of"))
    reports = []
    for name in sorted(set().union(*chosen.values())):
        reports.append(run_case(bagel, pack, folders[name]))
        if not as_json:
            typer.echo(case_lines(reports[-1], verbose))
    results = [case_result(report) for report in reports]
    if as_json:
        cases = [asdict(report) | {"result": result.lower()} for report, result in zip(reports, results, strict=True)]
        report = {"pack": pack.resolve().name, "failed": results.count("FAIL"), "cases": finite(cases)}
        typer.echo(json.dumps(report))
    else:
        typer.echo(", ".join(f"{results.count(result)} {result}" for result in ("pass", "FAIL", "skipped")))
    if "FAIL" in results:
        raise typer.Exit(1)
