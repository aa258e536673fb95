"""The tuner without a GPU: search space, selection and the table it writes."""

import json
import os
import time
from copy import deepcopy

import pytest
import torch

from bagel_rt.check.case import Values
from bagel_rt.kernels import configs
from benchmarks import compiling, tune
from benchmarks.compiling import DEVICE_LIMITS
from benchmarks.search_space import candidates
from benchmarks.tune import TORCH, choose, describe, updated, workloads_by_class, write_table
from benchmarks.workloads import ALL_WORKLOADS, WORKLOADS, OpWorkload

ENTRIES = [
    pytest.param(op, architecture, shape_class, id=f"{op} {shape_class} on {architecture}")
    for op, architectures in configs.TABLE.items()
    for architecture, classes in architectures.items()
    for shape_class in classes
]


@pytest.mark.parametrize("op, architecture, shape_class", ENTRIES)
def test_candidates_have_the_arguments_of_the_shipped_entry(op, architecture, shape_class):
    result = candidates(op, shape_class, architecture)
    shipped = configs.TABLE[op][architecture][shape_class]["tiles"] or result[0]
    assert result[0] == shipped and len(result) > 1
    assert len({json.dumps(tiles, sort_keys=True) for tiles in result}) == len(result)
    for tiles in result:
        assert tiles.keys() == shipped.keys()
        assert [type(tiles[name]) for name in tiles] == [type(shipped[name]) for name in tiles]


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_warp_specialization_is_limited_to_supported_architectures(architecture):
    result = [
        tiles for shape_class in configs.TABLE["linear"][architecture] for tiles in linear(shape_class, architecture)
    ]
    specialized = [tiles for tiles in result if tiles["WARP_SPECIALIZE"]]
    assert bool(specialized) == (architecture in ("sm_90", "sm_100"))
    assert all(
        tiles["DESCRIPTORS"] == "device" and tiles["num_warps"] == 4 and not tiles["FLATTEN"] for tiles in specialized
    )


def linear(shape_class, architecture):
    return candidates("linear", shape_class, architecture)


def test_candidates_fit_in_shared_memory():
    assert len(linear("many bias", "sm_80")) > len(linear("many bias", "sm_89"))
    largest = [t for t in linear("many bias", "sm_90") if t["BLOCK_M"] * t["BLOCK_N"] == 128 * 256]
    # 4 stages of 48 KiB leave 32 KiB for the stored tile: half of it fits, the whole of 64 KiB does not.
    assert {t["HALVES"] for t in largest if t["num_stages"] == 4 and t["TMA_STORE"]} == {True}


def test_class_that_uses_torch_has_candidates(monkeypatch):
    table = updated(configs.TABLE, "sm_90", ("linear", "many bias"), None, "torch was faster")
    monkeypatch.setattr(configs, "TABLE", table)
    assert len(linear("many bias", "sm_90")) > 1 and None not in linear("many bias", "sm_90")


def test_every_architecture_has_limits():
    assert DEVICE_LIMITS.keys() == set(configs.ARCHITECTURES)


def test_updated_replaces_one_entry_in_a_copy():
    before = deepcopy(configs.TABLE)
    table = updated(configs.TABLE, "sm_90", ("rms_norm", "wide"), {"ROWS": 2, "num_warps": 8}, "measured")
    assert configs.TABLE == before
    assert table["rms_norm"]["sm_90"].pop("wide") == {"tiles": {"ROWS": 2, "num_warps": 8}, "source": "measured"}
    before["rms_norm"]["sm_90"].pop("wide")
    assert table == before


def test_write_table_replaces_the_file(tmp_path):
    path = tmp_path / "configs.json"
    write_table(path, {"old": 1})
    write_table(path, configs.TABLE)
    assert json.loads(path.read_text()) == configs.TABLE
    assert os.listdir(tmp_path) == ["configs.json"]


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "configs.json"
    write_table(path, {"old": 1})
    with pytest.raises(TypeError):
        write_table(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}


def test_shipped_file_has_the_tuners_format(tmp_path):
    write_table(tmp_path / "configs.json", configs.TABLE)
    assert (tmp_path / "configs.json").read_text() == configs.PATH.read_text()


@pytest.mark.parametrize(
    "times, torch_may_win, winner",
    [
        pytest.param({TORCH: {"a": 9, "b": 9}, 0: {"a": 4, "b": 4}, 1: {"a": 3, "b": 4}}, True, 1, id="the fastest"),
        pytest.param({TORCH: {"a": 9, "b": 9}, 0: {"a": 1, "b": 8}, 1: {"a": 2, "b": 5}}, True, 0, id="by ratios"),
        pytest.param({TORCH: {"a": 2, "b": 2}, 0: {"a": 3, "b": 3}}, True, TORCH, id="torch if allowed"),
        pytest.param({TORCH: {"a": 2, "b": 2}, 0: {"a": 3, "b": 3}}, False, 0, id="not torch if not allowed"),
        pytest.param(
            {TORCH: {"a": 2, "b": 2}, 0: {"a": 1}, 1: {"a": 3, "b": 3}},
            False,
            1,
            id="only candidates with all workloads",
        ),
    ],
)
def test_choose(times, torch_may_win, winner):
    assert choose(times, torch_may_win) == winner


def test_choose_requires_a_working_candidate():
    with pytest.raises(ValueError, match="no candidate"):
        choose({TORCH: {"a": 1.0}}, torch_may_win=False)


def test_source_has_machine_versions_and_speed():
    product = OpWorkload("gate_up", "linear", 10**12, 10**9, build=None)
    copy = OpWorkload("norm", "rms_norm", 0, 4 * 10**9, build=None)
    times = {TORCH: {"gate_up": 3000.0, "norm": 2000.0}, 0: {"gate_up": 2000.0, "norm": 1000.0}}
    text = describe("NVIDIA H200", times, 0, [product, copy])
    assert "NVIDIA H200" in text and f"torch {torch.__version__}" in text
    assert "2000.0 us, 500 TFLOP/s on gate_up" in text and "1.73 x torch over 2 workloads" in text
    assert "torch is faster" in describe("NVIDIA H200", times, TORCH, [product, copy])
    only = {index: {"norm": by_workload["norm"]} for index, by_workload in times.items()}
    assert "4000 GB/s on norm" in describe("NVIDIA H200", only, 0, [copy])


@pytest.fixture
def choices(monkeypatch):
    """Selects the workloads to tune; two classes of linear use torch."""
    pytest.importorskip("triton")
    table = updated(configs.TABLE, "sm_90", ("linear", "many bias"), None, "torch was faster")
    table = updated(table, "sm_90", ("linear", "many residual"), None, "torch was faster")
    monkeypatch.setattr(configs, "TABLE", table)

    def choose_workloads(*names):
        monkeypatch.setattr(tune, "ALL_WORKLOADS", [broken if n == "broken" else workload_named(n) for n in names])

    return choose_workloads


def workload_named(name):
    [workload] = [workload for workload in ALL_WORKLOADS if workload.name == name]
    return workload


def no_inputs(tensors):
    raise MemoryError("no room")


broken = OpWorkload("broken", "linear", 1, 1, no_inputs)


def test_workloads_by_class_is_sorted_by_priority_and_size(choices):
    choices("qkv, text-to-image 1024", "o, edit 1024", "o, text-to-image 1024")
    result = workloads_by_class("sm_90", ["linear"])
    assert [(name, [workload.name for workload in workloads]) for name, workloads in result.items()] == [
        (("linear", "many residual"), ["o, edit 1024", "o, text-to-image 1024"]),
        (("linear", "many bias"), ["qkv, text-to-image 1024"]),
    ]


def test_workload_that_fails_to_build_is_reported_and_skipped(choices, capfd):
    choices("broken", "qkv, text-to-image 1024")
    assert list(workloads_by_class("sm_90", ["linear"])) == [("linear", "many bias")]
    assert "broken: cannot determine its shape classes: MemoryError: no room" in capfd.readouterr().err


def test_priority_classes_are_in_the_table():
    assert all(shape_class in configs.TABLE[op]["sm_90"] for op, shape_class in tune.PRIORITY)


def test_class_fails_if_no_candidate_compiles_in_time(monkeypatch):
    monkeypatch.setattr(compiling, "compile_workload", None)
    workloads = [workload_named("qkv, text-to-image 1024")]
    with pytest.raises(ValueError, match="no candidate compiled\n.* more: time limit reached"):
        tune.tune_class(("linear", "many bias"), workloads, "sm_90", "NVIDIA H200", time.monotonic())


def test_requires_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune"])
    assert tune.main() == 2
    assert "found no CUDA device" in capsys.readouterr().err


def test_dry_run_lists_every_candidate(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "--dry-run", "--op", "rms_norm", "--arch", "sm_80"])
    assert tune.main() == 0
    lines = capsys.readouterr().out.splitlines()
    listed = sum(len(candidates("rms_norm", name, "sm_80")) for name in configs.TABLE["rms_norm"]["sm_80"])
    assert len([line for line in lines if line.startswith("    {'ROWS'")]) == listed


@pytest.fixture
def on_h200(monkeypatch):
    """:func:`tune.main` on a fake H200, where tuning succeeds for all classes except "many bias"."""
    monkeypatch.setattr(configs, "TABLE", deepcopy(configs.TABLE))
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    classes = {("rms_norm", "wide"): [], ("linear", "many bias"): [], ("linear", "few bias"): []}
    monkeypatch.setattr(tune, "workloads_by_class", lambda architecture, ops, deadline: classes)

    def tune_class(name, workloads, architecture, machine, deadline):
        if name[1] == "many bias":
            raise ValueError("no candidate was both correct and measured on every workload")
        return None if name[0] == "linear" else {"ROWS": 2, "num_warps": 8}, f"measured on {machine}"

    monkeypatch.setattr(tune, "tune_class", tune_class)

    def main(*arguments):
        monkeypatch.setattr("sys.argv", ["tune", *map(str, arguments)])
        return tune.main()

    return main


TUNED = {
    ("rms_norm", "wide"): {"tiles": {"ROWS": 2, "num_warps": 8}, "source": "measured on NVIDIA H200"},
    ("linear", "few bias"): {"tiles": None, "source": "measured on NVIDIA H200"},
}


def table_with(*names):
    table = deepcopy(configs.TABLE)
    for op, shape_class in names:
        table[op]["sm_90"][shape_class] = TUNED[op, shape_class]
    return table


def test_each_class_is_saved_and_failed_ones_are_unchanged(on_h200, tmp_path, capsys):
    path, expected = tmp_path / "configs.json", table_with(*TUNED)
    assert on_h200("--output", path) == 1
    assert json.loads(path.read_text()) == expected
    assert "linear many bias: entry unchanged: no candidate" in capsys.readouterr().err


def test_results_of_several_runs_accumulate(on_h200, tmp_path, monkeypatch):
    path, shipped, expected = tmp_path / "configs.json", deepcopy(configs.TABLE), table_with(*TUNED)
    assert on_h200("--output", path, "--op", "rms_norm", "linear", "--class", "wide") == 0
    assert json.loads(path.read_text()) == table_with(("rms_norm", "wide")) != expected
    monkeypatch.setattr(configs, "TABLE", shipped)
    assert on_h200("--output", path, "--class", "few bias") == 0
    assert json.loads(path.read_text()) == expected


def test_time_limit_is_reported_per_class(on_h200, tmp_path, capsys):
    path = tmp_path / "configs.json"
    assert on_h200("--output", path, "--minutes", 0) == 1
    assert not path.exists()
    assert "linear few bias: entry unchanged: time limit reached before it was started" in capsys.readouterr().err


def test_class_without_workload_is_reported(on_h200, tmp_path, capsys):
    assert on_h200("--output", tmp_path / "configs.json", "--class", "widest") == 1
    assert capsys.readouterr().err == "rms_norm widest: entry unchanged: no workload uses it\n"


def test_rejects_unwritable_output_before_measuring(on_h200, tmp_path, capsys):
    for path in (tmp_path / "missing" / "configs.json", tmp_path):
        assert on_h200("--output", path) == 2
        error = capsys.readouterr().err
        assert "cannot use --output: " in error and str(path.parent) in error


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"linear": {"sm_90": {}}}', '{"linear": {"sm_90": {"few bias": 1}}}']
)
def test_rejects_output_that_is_not_a_table(on_h200, tmp_path, capsys, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    assert on_h200("--output", path) == 2
    assert "must be a table with the entries of" in capsys.readouterr().err and path.read_text() == text


def test_rejects_unknown_class(on_h200, capsys):
    with pytest.raises(SystemExit):
        on_h200("--op", "rms_norm", "--class", "many bias")
    assert "--class must be one of 'narrow', 'wide', 'widest', got 'many bias'" in capsys.readouterr().err


def test_workloads_have_unique_names_and_valid_inputs():
    assert len({workload.name for workload in ALL_WORKLOADS}) == len(ALL_WORKLOADS)
    assert all((workload.flops > 0 or workload.op not in ("linear", "attention")) for workload in ALL_WORKLOADS)
    smallest = {}
    for workload in WORKLOADS:
        previous = smallest.setdefault(workload.op, workload)
        smallest[workload.op] = min(previous, workload, key=lambda w: (w.flops, w.bytes))
    decode_ops = ("decode_attention", "decode_qkv", "decode_linear", "sample")
    for op in ("rms_norm", "qk_norm_rope", "attention", *decode_ops, "group_norm", "cfg_euler_step"):
        function, arguments, options = smallest[op].build(Values("cpu", torch.bfloat16))
        outputs = function(*arguments, **options)
        outputs = arguments[:1] if outputs is None else outputs  # cfg_euler_step works in place
        assert all(output.isfinite().all() for output in (outputs if isinstance(outputs, tuple) else [outputs]))
