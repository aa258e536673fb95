"""``bagel-rt info`` and ``bagel-rt conformance``: text, JSON and exit codes; and tables as text."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import good, run
from conftest import CHECKPOINT, PACK
from rich.table import Table
from safetensors import safe_open

from bagel_rt import __version__
from bagel_rt.cli.report import plain_text

# info


def test_info_reports_versions_devices_ops_and_environment():
    report = json.loads(good("info", "--json", env={"BAGEL_RT_BACKEND": "reference"}))
    assert report["versions"]["bagel_rt"] == __version__ and report["versions"]["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu" and report["devices"][0]["threads"] >= 1
    assert len(report["devices"]) == 1 + torch.cuda.device_count()
    assert report["ops"]["rms_norm"] == report["ops"]["sample"] == "reference"
    assert report["environment"]["BAGEL_RT_BACKEND"] == "reference"
    printed = good("info")
    assert f"torch        {torch.__version__}" in printed and "  rms_norm " in printed


def test_info_explains_why_the_extension_is_absent(monkeypatch):
    monkeypatch.setattr("bagel_rt.check.info.EXTENSION", None)
    monkeypatch.setattr("bagel_rt.check.info.EXTENSION_ERROR", "no compiler\n")
    assert "\nextension: absent: no compiler\n" in good("info")
    monkeypatch.setattr("bagel_rt.check.info.EXTENSION", object())
    assert "\nextension: compiled\n" in good("info")
    monkeypatch.setattr("bagel_rt.kernels.extension.EXTENSION", object())
    monkeypatch.setattr("bagel_rt.kernels.extension._build_log", lambda: "nvcc is broken\n")
    assert "\ncuda_kernels: absent: nvcc is broken\n" in good("info")


def test_info_reports_a_wrong_backend_instead_of_failing():
    assert "BAGEL_RT_BACKEND must be 'auto', 'reference' or 'triton', got 'fast'." in good(
        "info", env={"BAGEL_RT_BACKEND": "fast"}
    )


def test_info_works_without_triton():
    script = "import sys\nsys.modules['triton'] = None\nfrom bagel_rt.cli import app\napp(['info', '--json'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["versions"]["python"]


def test_info_counts_the_parameters_of_a_model(tmp_path):
    report = json.loads(good("info", "--json", "--model", CHECKPOINT))["model"]
    total = 0
    for file in ("ema.safetensors", "ae.safetensors"):
        with safe_open(CHECKPOINT / file, "pt") as tensors:
            total += sum(np.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    assert report["parameters"]["total"] == total == sum(report["parameters"].values()) - total
    assert (report["name"], report["layers"], report["weights"]) == ("checkpoint", 3, "complete")

    shutil.copytree(CHECKPOINT, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "ema.safetensors", 5000)
    assert "ema.safetensors" in json.loads(good("info", "--json", "--model", tmp_path / "cut"))["model"]["weights"]


# conformance


@pytest.fixture
def mixed_pack(tmp_path):
    """A pack of one good case, one whose recording is wrong, and one that is not supported."""
    pack = tmp_path / "pack"
    for case in ("00_tokenizer", "01_wrong", "02_unsupported"):
        (pack / "cases" / case).mkdir(parents=True)
    (pack / "checkpoint").symlink_to(CHECKPOINT)
    meta = json.loads((PACK / "cases" / "00_tokenizer" / "meta.json").read_text("utf-8"))
    (pack / "cases" / "00_tokenizer" / "meta.json").write_text(json.dumps(meta))
    meta["encode"][3]["ids"] = [0]
    (pack / "cases" / "01_wrong" / "meta.json").write_text(json.dumps(meta))
    unsupported = {"inputs": {"hyper": {"enable_taylorseer": True}}}
    (pack / "cases" / "02_unsupported" / "meta.json").write_text(json.dumps(unsupported))
    return pack


def test_conformance_passes_on_recorded_cases():
    printed = good("conformance", PACK, "--case", "11_t2i_cfg_global", "--case", "0[0-2]_*", "--case", "11*")
    rows = [line.split() for line in printed.splitlines()]
    assert [row[:2] for row in rows[1:-1]] == [
        ["pass", name] for name in ("00_tokenizer", "01_image_transforms", "02_positions_time", "11_t2i_cfg_global")
    ]
    assert rows[-1] == ["4", "pass,", "0", "FAIL,", "0", "skipped"]


def test_conformance_verbose_lists_every_comparison():
    printed = good("conformance", PACK, "--case", "11*", "--verbose")
    report = json.loads(good("conformance", PACK, "--case", "11*", "--json"))
    (case,) = report["cases"]
    assert (report["pack"], report["failed"], case["case"], case["result"]) == ("bagel", 0, "11_t2i_cfg_global", "pass")
    for comparison in case["comparisons"]:
        assert comparison["passed"] and comparison["error"] <= comparison["tolerance"]
        assert f" {comparison['name']}\n" in printed


def test_conformance_fails_if_one_case_fails(mixed_pack):
    result = run("conformance", mixed_pack)
    assert (result.exit_code, result.stderr) == (1, "")
    rows = result.stdout.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["pass", "FAIL", "skipped", "1"]
    assert rows[1].endswith("encode 3")
    result = run("conformance", mixed_pack, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["failed"] == 1
    assert [case["result"] for case in report["cases"]] == ["pass", "fail", "skipped"]
    good("conformance", mixed_pack, "--case", "00*", "--case", "02*")


def test_conformance_json_has_null_for_nan(monkeypatch):
    monkeypatch.setattr(
        "bagel_rt.conformance.bagel.components.time_embedding", lambda _, t: torch.full((len(t), 64), torch.nan)
    )
    result = run("conformance", PACK, "--case", "02*", "--json")
    assert result.exit_code == 1

    def fail(word):
        raise AssertionError(word)

    (case,) = json.loads(result.stdout, parse_constant=fail)["cases"]
    assert [item["error"] for item in case["comparisons"] if item["name"] == "t_embed"] == [None]


# tables


def test_tables_have_no_color_and_full_width(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    table = Table("op", "note", box=None, pad_edge=False)
    table.add_row("[bold]", "x" * 200)
    table.add_row("a", "")
    assert plain_text(table).splitlines() == ["op      note", "[bold]  " + "x" * 200, "a"]
