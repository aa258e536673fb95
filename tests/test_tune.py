"""The tuner without its GPU: what it would try, how it judges, what it writes."""

import json
import math
import multiprocessing
import os
from copy import deepcopy

import pytest
import torch

from bagel_rt.kernels import backend, configs
from benchmarks import tune
from benchmarks.compiling import LIMITS
from benchmarks.search_space import candidates
from benchmarks.tune import TORCH, choose, describe, measurements, relative_error, updated, write_table
from benchmarks.workloads import ALL_WORKLOADS, WORKLOADS, Tensors, Workload

ENTRIES = [
    pytest.param(op, architecture, shape_class, id=f"{op} {shape_class} on {architecture}")
    for op, architectures in configs.TABLE.items()
    for architecture, classes in architectures.items()
    for shape_class in classes
]


@pytest.mark.parametrize("op, architecture, shape_class", ENTRIES)
def test_candidates_are_other_values_of_the_tables_own_arguments(op, architecture, shape_class):
    found = candidates(op, shape_class, architecture)
    shipped = configs.TABLE[op][architecture][shape_class]["tiles"] or found[0]
    assert found[0] == shipped and len(found) > 1
    assert len({json.dumps(tiles, sort_keys=True) for tiles in found}) == len(found)
    for tiles in found:
        assert tiles.keys() == shipped.keys()
        assert [type(tiles[name]) for name in tiles] == [type(shipped[name]) for name in tiles]


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_warp_specialisation_is_tried_only_where_it_can_work(architecture):
    found = [
        tiles for shape_class in configs.TABLE["linear"][architecture] for tiles in linear(shape_class, architecture)
    ]
    bold = [tiles for tiles in found if tiles["WARP_SPECIALIZE"]]
    assert bool(bold) == (architecture in ("sm_90", "sm_100"))
    assert all(tiles["DESCRIPTORS"] == "device" and tiles["num_warps"] == 4 and not tiles["FLATTEN"] for tiles in bold)


def linear(shape_class, architecture):
    return candidates("linear", shape_class, architecture)


def test_candidates_that_cannot_fit_shared_memory_are_left_out():
    assert len(linear("many bias", "sm_80")) > len(linear("many bias", "sm_89"))
    largest = [t for t in linear("many bias", "sm_90") if t["BLOCK_M"] * t["BLOCK_N"] == 128 * 256]
    # 4 stages of 48 KiB leave 32 KiB for the stored tile: half of it fits, the whole of 64 KiB does not.
    assert {t["HALVES"] for t in largest if t["num_stages"] == 4 and t["TMA_STORE"]} == {True}


def test_where_torch_was_faster_the_kernel_gets_another_chance(monkeypatch):
    table = updated(configs.TABLE, "sm_90", ("linear", "many bias"), None, "torch was faster")
    monkeypatch.setattr(configs, "TABLE", table)
    assert len(linear("many bias", "sm_90")) > 1 and None not in linear("many bias", "sm_90")


def test_every_architecture_has_limits():
    assert LIMITS.keys() == set(configs.ARCHITECTURES)


def test_rewriting_an_entry_leaves_the_others_and_the_given_table_alone():
    before = deepcopy(configs.TABLE)
    table = updated(configs.TABLE, "sm_90", ("rms_norm", "wide"), {"ROWS": 2, "num_warps": 8}, "measured")
    assert configs.TABLE == before
    assert table["rms_norm"]["sm_90"].pop("wide") == {"tiles": {"ROWS": 2, "num_warps": 8}, "source": "measured"}
    before["rms_norm"]["sm_90"].pop("wide")
    assert table == before


def test_the_file_is_replaced_whole(tmp_path):
    path = tmp_path / "configs.json"
    write_table(path, {"old": 1})
    write_table(path, configs.TABLE)
    assert json.loads(path.read_text()) == configs.TABLE
    assert os.listdir(tmp_path) == ["configs.json"]


def test_a_failure_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "configs.json"
    write_table(path, {"old": 1})
    with pytest.raises(TypeError):
        write_table(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}


def test_the_shipped_file_is_written_as_the_tuner_writes_it(tmp_path):
    write_table(tmp_path / "configs.json", configs.TABLE)
    assert (tmp_path / "configs.json").read_text() == configs.PATH.read_text()


@pytest.mark.parametrize(
    "times, torch_may_win, winner",
    [
        pytest.param({TORCH: {"a": 9, "b": 9}, 0: {"a": 4, "b": 4}, 1: {"a": 3, "b": 4}}, True, 1, id="the fastest"),
        pytest.param({TORCH: {"a": 9, "b": 9}, 0: {"a": 1, "b": 8}, 1: {"a": 2, "b": 5}}, True, 0, id="by ratios"),
        pytest.param({TORCH: {"a": 2, "b": 2}, 0: {"a": 3, "b": 3}}, True, TORCH, id="torch where it may"),
        pytest.param({TORCH: {"a": 2, "b": 2}, 0: {"a": 3, "b": 3}}, False, 0, id="not torch where it may not"),
        pytest.param(
            {TORCH: {"a": 2, "b": 2}, 0: {"a": 1}, 1: {"a": 3, "b": 3}}, False, 1, id="only what ran everywhere"
        ),
    ],
)
def test_choice(times, torch_may_win, winner):
    assert choose(times, torch_may_win) == winner


def test_no_choice_without_a_candidate_that_works():
    with pytest.raises(ValueError, match="no candidate"):
        choose({TORCH: {"a": 1.0}}, torch_may_win=False)


def test_the_source_says_where_when_and_how_fast():
    product = Workload("gate_up", "linear", 10**12, 10**9, build=None)
    copy = Workload("norm", "rms_norm", 0, 4 * 10**9, build=None)
    times = {TORCH: {"gate_up": 3000.0, "norm": 2000.0}, 0: {"gate_up": 2000.0, "norm": 1000.0}}
    text = describe("NVIDIA H200", times, 0, [product, copy])
    assert "NVIDIA H200" in text and f"torch {torch.__version__}" in text
    assert "2000.0 us, 500 TFLOP/s on gate_up" in text and "1.73 x torch over 2 workloads" in text
    assert "torch is faster" in describe("NVIDIA H200", times, TORCH, [product, copy])
    only = {index: {"norm": by_workload["norm"]} for index, by_workload in times.items()}
    assert "4000 GB/s on norm" in describe("NVIDIA H200", only, 0, [copy])


def test_relative_error():
    one = torch.tensor([3.0, 4.0, -math.inf])
    assert relative_error(one, one) == 0
    assert relative_error(torch.tensor([3.0, 4.5, -math.inf]), one) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, math.nan, -math.inf]), one) == math.inf
    assert relative_error(torch.tensor([3.0, 4.0, 5.0]), one) == math.inf
    assert relative_error(torch.zeros(2), one) == math.inf


def by_rows(x):
    """An op whose kernel is right, wrong, unfinished or broken for its tiles."""
    if backend.backend() == "reference":
        return x + 1
    rows = configs.tiles("rms_norm", "wide", x.device)["ROWS"]
    if rows == 3:
        raise RuntimeError("out of resources")
    return x + 1 if rows == 1 else torch.full_like(x, math.nan) if rows == 4 else x + rows


def test_candidates_that_fail_or_are_wrong_get_a_reason_instead_of_a_time():
    workload = Workload("four sums", "rms_norm", 0, 8, lambda tensors: (by_rows, (tensors(64),), {}), torch.float32)
    device = torch.device("cpu")
    architecture, before = configs.architecture(device), deepcopy(configs.TABLE)
    tiles = {index: {"ROWS": rows, "num_warps": 4} for index, rows in enumerate((1, 2, 3, 4, 1))}
    results = list(measurements(("rms_norm", "wide"), workload, tiles, architecture, device))
    found = {index: result for index, result in results if result is not None}
    assert [index for index, result in results if result is None] == [TORCH, 0, 1, 2, 3, 4]
    assert found[TORCH] > 0 and found[0] > 0 and found[4] > 0
    assert found[1].startswith("ValueError: wrong by") and found[3].startswith("ValueError: wrong by inf")
    assert found[2] == "RuntimeError: out of resources"
    assert configs.TABLE == before and backend.backend() == "auto"


def test_what_a_call_leaves_unwritten_is_not_taken_from_the_call_before():
    buffer = torch.empty(8)

    def writes(x):
        if backend.backend() == "reference":
            return buffer.copy_(x)
        return buffer if configs.tiles("rms_norm", "wide", x.device)["ROWS"] == 2 else buffer.copy_(x)

    workload = Workload("lazy", "rms_norm", 0, 8, lambda tensors: (writes, (tensors(8),), {}), torch.float32)
    device = torch.device("cpu")
    tiles = {0: {"ROWS": 1, "num_warps": 4}, 1: {"ROWS": 2, "num_warps": 4}}
    results = dict(measurements(("rms_norm", "wide"), workload, tiles, configs.architecture(device), device))
    assert results[0] > 0 and results[1].startswith("ValueError: wrong by")


def test_a_process_that_hangs_or_ends_is_told_from_one_that_is_done(monkeypatch):
    monkeypatch.setattr(tune, "PATIENCE", 0.01)

    def collect(*messages, closes):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        times, failures = {TORCH: {}}, {}
        for message in messages:
            sender.send(message)
        if closes:
            sender.close()
        return *tune._collect(receiver, "a", times, failures), times, failures

    assert collect((TORCH, 2.0), (0, None), closes=False)[:2] == (0, "hangs for 0 s")
    assert collect((TORCH, 2.0), (0, None), closes=True)[:2] == (0, "ends the process")
    done = collect((TORCH, 2.0), (0, None), (0, 1.5), (1, None), (1, "wrong"), None, closes=True)
    assert done == (1, "", {TORCH: {"a": 2.0}, 0: {"a": 1.5}}, {1: "wrong"})


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune"])
    assert tune.main() == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_dry_run_lists_every_candidate(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "--dry-run", "--op", "rms_norm", "--arch", "sm_80"])
    assert tune.main() == 0
    lines = capsys.readouterr().out.splitlines()
    listed = sum(len(candidates("rms_norm", name, "sm_80")) for name in configs.TABLE["rms_norm"]["sm_80"])
    assert len([line for line in lines if line.startswith("    {'ROWS'")]) == listed


def test_each_class_is_written_when_it_is_done_and_a_failed_one_stays(monkeypatch, tmp_path, capsys):
    path = tmp_path / "configs.json"
    monkeypatch.setattr(configs, "TABLE", deepcopy(configs.TABLE))
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    classes = {("rms_norm", "wide"): [], ("linear", "many bias"): [], ("linear", "few bias"): []}
    monkeypatch.setattr(tune, "workloads_of_classes", lambda architecture, ops: classes)

    def tune_class(name, workloads, architecture, machine):
        if name[1] == "many bias":
            raise ValueError("no candidate both gave the right result and could be timed")
        return None if name[0] == "linear" else {"ROWS": 2, "num_warps": 8}, f"measured on {machine}"

    monkeypatch.setattr(tune, "tune_class", tune_class)
    monkeypatch.setattr("sys.argv", ["tune", "--output", str(path)])
    expected = deepcopy(configs.TABLE)
    expected["rms_norm"]["sm_90"]["wide"] = {"tiles": {"ROWS": 2, "num_warps": 8}, "source": "measured on NVIDIA H200"}
    expected["linear"]["sm_90"]["few bias"] = {"tiles": None, "source": "measured on NVIDIA H200"}
    assert tune.main() == 1
    assert json.loads(path.read_text()) == expected
    assert "kept as it is: no candidate" in capsys.readouterr().err


def test_workloads_have_names_of_their_own_and_inputs_that_their_ops_accept():
    assert len({workload.name for workload in ALL_WORKLOADS}) == len(ALL_WORKLOADS)
    assert all((workload.flops > 0 or workload.op not in ("linear", "attention")) for workload in ALL_WORKLOADS)
    smallest = {}
    for workload in WORKLOADS:
        known = smallest.setdefault(workload.op, workload)
        smallest[workload.op] = min(known, workload, key=lambda w: (w.flops, w.bytes))
    for op in ("rms_norm", "qk_norm_rope", "attention", "decode_attention", "guided_step"):
        function, arguments, options = smallest[op].build(Tensors("cpu", torch.bfloat16))
        outputs = function(*arguments, **options)
        assert all(output.isfinite().all() for output in (outputs if isinstance(outputs, tuple) else [outputs]))
