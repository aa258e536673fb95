"""Kernel benchmarks on a CPU: peers compute the same results as the ops, and the tables show the measured values."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from test_gpu_check import broken, table_cells
from torch.utils._python_dispatch import TorchDispatchMode

from bagel_rt.kernels import (
    attention,
    decode_attention,
    decode_linear,
    decode_qkv,
    group_norm,
    linear,
    qk_norm_rope,
    rms_norm,
    sample,
)
from bagel_rt.kernels.backend import backend
from bagel_rt.models.bagel.config import TransformerConfig
from bagel_rt.runtime.plan import Segment, build_plan
from benchmarks import forward, kernels, measure, peers, peers_attention
from benchmarks.workloads import WORKLOADS, OpWorkload, _cfg_euler_step, attention_gradients

CPU = torch.device("cpu")
HAS_LIGER, HAS_VLLM_OMNI = (importlib.util.find_spec(name) is not None for name in ("liger_kernel", "vllm_omni"))


@pytest.fixture(autouse=True)
def default_backend(monkeypatch):
    monkeypatch.delenv("BAGEL_RT_BACKEND", raising=False)


def segment(mode, rows, start, visible, write=None):
    gen = np.full(rows, mode != "causal")
    gen[[0, -1]] = False
    return Segment(mode, gen, start, visible, start + visible if write is None else write)


PLANS = {
    "long text": [segment("causal", 300, 0, 4)],
    "two branches": [segment("full", 8, 0, 5), segment("full", 8, 0, 3, write=20)],
    "text after a context": [segment("causal", 9, 0, 4)],
    "training": [segment("full", 6, 0, 0), segment("causal", 4, 0, 6), segment("full", 7, 0, 10, write=12)],
}


def linears(tensors, G, epilogue, width=16):
    biases = (tensors(12), tensors(12)) if epilogue == "bias" else ()
    options = {"G": G, "residual": tensors(10, 12) if epilogue == "residual" else None, "swiglu": epilogue == "swiglu"}
    return linear, (tensors(10, width), tensors(12, width), tensors(12, width), *biases), options


def norms(tensors, adds):
    return rms_norm, (tensors(6, 24), tensors(6, 24) if adds else None, tensors(24), tensors(24), 4, 1e-6), {}


def ropes(tensors):
    tables = [tensors(6, 8, dtype=torch.float32) for _ in range(2)]
    slots, caches = tensors.of(np.array([5, 1, 0, 4, 3, 2])), (tensors(6, 2, 16), tensors(6, 2, 16))
    return qk_norm_rope, (tensors(6, 128), tensors(6, 16), tensors(6, 16), *tables, slots, *caches, 4, 1e-6), {}


def attentions(tensors, plan, function=attention, **options):
    plan = build_plan(PLANS[plan])
    T, slots = len(plan.limits), int(plan.slots.max()) + 1
    inputs = (tensors(T, 4, 16), tensors(slots, 2, 16), tensors(slots, 2, 16))
    inputs = (*inputs, tensors.of(plan.limits), tensors.of(plan.blocks))
    return function, (*inputs, tensors(T, 4, 16)) if function is attention_gradients else inputs, options


def decodes(tensors):
    spans = tensors.of(np.array([1, 3])), tensors.of(np.array([2, 6]))
    return decode_attention, (tensors(2, 4, 16), tensors(9, 2, 16), tensors(9, 2, 16), *spans), {}


def decoded_linears(tensors, norm, epilogue):
    options = {"norm": tensors(16) if norm else None, "eps": 1e-6, "swiglu": epilogue == "swiglu"}
    options["residual"] = tensors(2, 12) if epilogue == "residual" else None
    return decode_linear, (tensors(2, 16), tensors(12, 16)), options


def decoded_qkv(tensors):
    layer = tensors(24), tensors(128, 24), tensors(128), tensors(6, 16)
    tables = [tensors(2, 8, dtype=torch.float32) for _ in range(2)]
    caches = tensors(5, 2, 16), tensors(5, 2, 16)
    return decode_qkv, (tensors(2, 24), *layer, *tables, tensors.of(np.array([4, 1])), *caches, 1e-6), {}


def samples(tensors, settings):
    if settings is None:
        return sample, (tensors(3, 40),), {}
    number = tensors.of(np.arange(3))
    return sample, (tensors(3, 40), tensors.of(np.array([settings] * 3, np.float32)), number, number), {}


def steps(tensors):
    return _cfg_euler_step(tensors, latents=6, renorm="global", branches=3)


def group_norms(tensors):
    x = tensors(2, 3, 5, 8).permute(0, 3, 1, 2)
    return group_norm, (x, tensors(8), tensors(8), 4, 1e-6, True), {}


SDPA = {"torch, gathered K and V", "official, SDPA", "SDPA FLASH", "SDPA MATH", "FlexAttention"}
LINEAR = {"torch on row ranges", "official", "official, torch.compile"}
DECODED = {"torch", "torch.compile"}
TINY = {  # name -> (builder of the workload, peers that run on a CPU)
    "linear": (lambda t: linears(t, 7, "none"), LINEAR),
    "linear with a bias": (lambda t: linears(t, 7, "bias"), LINEAR),
    "linear with a residual": (lambda t: linears(t, 9, "residual", 12), LINEAR),
    "down projection": (lambda t: linears(t, 9, "residual"), LINEAR),
    "down projection of understanding rows": (lambda t: linears(t, 0, "residual"), LINEAR),
    "linear with SwiGLU": (lambda t: linears(t, 7, "swiglu"), LINEAR),
    "linear of understanding rows": (lambda t: linears(t, 0, "none"), LINEAR),
    "linear of generation rows": (lambda t: linears(t, 10, "none"), LINEAR),
    "rms_norm": (lambda t: norms(t, False), LINEAR),
    "rms_norm with a residual": (lambda t: norms(t, True), LINEAR),
    "qk_norm_rope": (ropes, LINEAR),
    "attention, two branches": (lambda t: attentions(t, "two branches"), SDPA),
    "attention, text": (lambda t: attentions(t, "text after a context"), SDPA),
    "attention, training": (lambda t: attentions(t, "training"), SDPA),
    "attention with lse": (
        lambda t: attentions(t, "training", return_lse=True),
        {"torch, gathered K and V", "FlexAttention"},
    ),
    "gradients": (lambda t: attentions(t, "training", attention_gradients), {"SDPA FLASH"}),
    "decode_attention": (decodes, {"torch, lengths on host", "SDPA FLASH", "SDPA MATH"}),
    "decode_linear": (lambda t: decoded_linears(t, False, "none"), DECODED),
    "decode_linear with a norm and SwiGLU": (lambda t: decoded_linears(t, True, "swiglu"), DECODED),
    "decode_linear with a residual": (lambda t: decoded_linears(t, False, "residual"), DECODED),
    "decode_qkv": (decoded_qkv, DECODED),
    "greedy sample": (lambda t: samples(t, None), DECODED),
    "sample": (lambda t: samples(t, (0.7, 9, 0.9)), DECODED),
    "cfg_euler_step": (steps, {"official", "official, torch.compile"}),
    "group_norm": (group_norms, {"official", "official, channels first", "official, torch.compile"}),
}
WORKLOAD = {name: OpWorkload(name, "", 2000, 3000, build, torch.float32) for name, (build, _) in TINY.items()}


def rows_of(workload):
    timer = measure.Timer(CPU, 0, 1)
    rows = list(kernels.measure(workload, timer))
    return rows + list(kernels.measure(workload, timer, compiled=True, wrap=lambda function: function))


@pytest.mark.parametrize("name", TINY)
def test_peers_match_the_op(name):
    rows = {row.who: row for row in rows_of(WORKLOAD[name])}
    function = WORKLOAD[name].build(kernels.Values(CPU, torch.float32))[0].__name__
    assert set(rows) == {kernels.OURS, *kernels.PEERS[function], *kernels.COMPILED_PEERS.get(function, {})}
    for who in {kernels.OURS} | TINY[name][1]:
        assert rows[who].note == "" and rows[who].error < 1e-6 and rows[who].microseconds > 0, rows[who]
    for row in rows.values():  # unsupported peers have a note
        assert row.note or row.error < 1e-6, row


@pytest.mark.parametrize(
    "name", ["linear with SwiGLU", "rms_norm with a residual", "qk_norm_rope", "attention, training"]
)
def test_kernels_match_the_expected_outputs(name, kernels_run):
    (ours, *_) = kernels.measure(WORKLOAD[name], measure.Timer(kernels_run, 0, 1))
    assert (ours.who, ours.note) == (kernels.OURS, "") and ours.error < 1e-6


@pytest.mark.parametrize("name", ["decode_linear with a norm and SwiGLU", "decode_qkv"])
def test_fallback_without_extension_is_a_peer(name, emulated_extension):
    rows = {row.who: row for row in kernels.measure(WORKLOAD[name], measure.Timer(CPU, 0, 1))}
    for who in (kernels.OURS, kernels.WITHOUT_EXTENSION):
        assert rows[who].note == "" and rows[who].error < 1e-6, rows[who]


def test_wrong_token_is_detected(monkeypatch):
    def second(logits, *_):
        return peers.PreparedCall(lambda: logits.topk(2).indices[:, 1], peers.as_tuple)

    monkeypatch.setitem(kernels.PEERS, "sample", {"second": second})
    ours, other = kernels.measure(WORKLOAD["greedy sample"], measure.Timer(CPU, 0, 1))
    assert (ours.note, other.note) == ("", "WRONG")


@pytest.fixture
def kernels_run(request):
    return request.getfixturevalue("kernels")


@pytest.mark.skipif(not HAS_VLLM_OMNI, reason="vllm-omni is not installed")
@pytest.mark.parametrize("name", ["linear", "linear with a bias", "linear with a residual", "rms_norm"])
def test_vllm_omni_matches_the_op(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "NVIDIA H200")
    (row,) = [row for row in rows_of(WORKLOAD[name]) if row.who == "vLLM-Omni"]
    assert row.note == "" and row.error < 1e-6


@pytest.mark.skipif(HAS_VLLM_OMNI and HAS_LIGER, reason="both are installed")
def test_missing_peer_has_a_note():
    notes = {row.who: row.note for row in rows_of(WORKLOAD["linear with SwiGLU"]) + rows_of(WORKLOAD["rms_norm"])}
    assert HAS_LIGER or "No module named 'liger_kernel'" in notes["Liger"]
    assert HAS_VLLM_OMNI or "vllm-omni is not installed" in notes["vLLM-Omni"]
    assert not any(name == "vllm" or name.startswith("vllm.") for name in sys.modules)


class Routing(TorchDispatchMode):
    """Counts gathers and scatters by index."""

    def __init__(self):
        super().__init__()
        self.gathers = self.scatters = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.gathers += func is torch.ops.aten.index.Tensor
        self.scatters += func is torch.ops.aten.index_put_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, gathers, scatters",
    [("linear", 2, 2), ("linear with a residual", 2, 2), ("linear with SwiGLU", 2, 0), ("down projection", 0, 2)],
)
def test_official_layers_route_once_around_the_mlp(name, gathers, scatters):
    _, arguments, options = WORKLOAD[name].build(kernels.Values(CPU, torch.float32))
    call = peers.official_linear(*arguments, **options)
    with Routing() as counted:
        call.run()
    assert (counted.gathers, counted.scatters) == (gathers, scatters)


@pytest.mark.parametrize("name", ["linear with SwiGLU", "down projection"])
def test_vllm_omni_gemm_does_not_support_the_mlp(name):
    (row,) = [row for row in rows_of(WORKLOAD[name]) if row.who == "vLLM-Omni"]
    assert row.note == "the mixture GEMM supports only the attention projections"


def test_sequence_starts_with_an_understanding_row():
    assert peers.sequence_positions(6, 4, CPU).tolist() == [1, 2, 3, 4, 0, 5]
    assert peers.sequence_positions(3, 0, CPU).tolist() == [0, 1, 2]
    assert peers.sequence_positions(2, 2, CPU).tolist() == [0, 1]


def wrong(x, w_first, w_rest, *biases, G, **_):
    return peers.PreparedCall(lambda: x @ w_rest.t(), peers.as_tuple)


def all_nan(x, w_first, w_rest, *biases, G, **_):
    return peers.PreparedCall(lambda: x @ w_rest.t() * torch.nan, peers.as_tuple)


def test_failing_or_wrong_peer_is_listed_but_never_the_best(monkeypatch):
    monkeypatch.setitem(kernels.PEERS, "linear", {"broken": broken, "wrong": wrong, "nan": all_nan,
                                                  "right": peers.reference_linear})  # fmt: skip
    rows = list(kernels.measure(WORKLOAD["linear"], measure.Timer(CPU, 0, 1)))
    assert [(row.who, row.note) for row in rows] == [
        ("bagel_rt", ""), ("broken", "RuntimeError: no kernel image | is available"), ("wrong", "WRONG"),
        ("nan", "WRONG"), ("right", ""),
    ]  # fmt: skip
    times = {"bagel_rt": 20.0, "wrong": 1.0, "nan": 2.0, "right": 50.0}
    rows = [kernels.Row("linear", row.who, times.get(row.who), row.error, row.note) for row in rows]
    heading, _, *lines = kernels.table(WORKLOAD["linear"], rows, (1e9, 1e9)).split("\n")
    assert heading == "**linear**, roofline 3.0 us"
    assert kernels.table(WORKLOAD["linear"], rows, None).startswith("**linear**\n\n|")
    cells = {row[0]: row[1:] for row in table_cells("\n".join(lines))}
    assert cells["bagel_rt"][:5] == ["20.0", "0", "0", "15%", "2.50"]
    assert kernels.best_peer(rows).who == "right"
    overview = table_cells(kernels.overview([(WORKLOAD["linear"], rows), (WORKLOAD["rms_norm"], [])], (1e9, 1e9)))
    assert overview[1:] == [["linear", "20.0", "15%", "right", "50.0", "2.50"], ["rms_norm", "", "", "", "", ""]]
    assert cells["right"][4] == "1.00" and cells["broken"][-1] == "RuntimeError: no kernel image \\| is available"


def test_latency_bound_call_has_no_roofline_share():
    rows = [kernels.Row("linear", kernels.OURS, 20.0, 0.0)]
    heading, _, *lines = kernels.table(WORKLOAD["linear"], rows, (1e10, 1e10)).split("\n")
    assert heading == "**linear**, roofline 0.3 us, latency-bound"
    assert table_cells("\n".join(lines))[1][1:5] == ["20.0", "0", "0", ""]
    assert table_cells(kernels.overview([(WORKLOAD["linear"], rows)], (1e10, 1e10)))[1][1:3] == ["20.0", ""]


def test_error_is_relative_to_each_row():
    expected = torch.ones(3, 4, dtype=torch.float64)
    expected[0] *= 100
    actual = expected.clone()
    actual[2] *= 1.5
    assert kernels.worst_row_error((actual,), (expected,)) == pytest.approx(0.5)
    lse = torch.tensor([[1.0], [-torch.inf]])
    assert kernels.worst_row_error((lse,), (lse.double(),)) == 0
    assert not kernels.worst_row_error((lse.nan_to_num(neginf=0),), (lse.double(),)) <= 1
    assert not kernels.worst_row_error((lse * torch.nan,), (lse.double(),)) <= 1


def test_wrong_log_sum_exp_is_detected(monkeypatch):
    def off(*arguments, return_lse):
        out, lse = attention(*arguments, return_lse=return_lse)
        return peers.PreparedCall(lambda: (out, lse * 1.01), tuple)

    monkeypatch.setitem(kernels.PEERS, "attention", {"off": off})
    ours, other = kernels.measure(WORKLOAD["attention with lse"], measure.Timer(CPU, 0, 1))
    assert (ours.note, other.note) == ("", "WRONG")


def groups_of(plan):
    plan = build_plan(PLANS[plan])
    groups = peers_attention.visible_groups(torch.from_numpy(plan.limits), torch.from_numpy(plan.blocks))
    return [(seen, len(rows)) for seen, rows in groups]


def test_rows_with_the_same_keys_share_one_sdpa_call():
    assert groups_of("two branches") == [((0, 13, 0, 0), 8), ((0, 3, 20, 28), 8)]
    assert groups_of("text after a context") == [((0, 13, 0, 0), 9)]
    assert groups_of("training") == [((0, 6, 0, 0), 6), ((0, 10, 0, 0), 4), ((0, 10, 12, 19), 7)]
    assert groups_of("long text") == [((0, 304, 0, 0), 300)]


def test_tasks_cover_all_workloads_in_priority_order():
    tasks = kernels.tasks()
    assert sorted(workload.name for workload, compiled in tasks if not compiled) == sorted(w.name for w in WORKLOADS)
    assert all("text-to-image 1024" in workload.name and not compiled for workload, compiled in tasks[:8])
    assert len(set(map(str, tasks))) == len(tasks) == 2 * len(WORKLOADS)


SMALL = TransformerConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=48,
                          vocab_size=8, rope_theta=1e4, rms_norm_eps=1e-6, max_position_embeddings=64)  # fmt: skip


def test_forward_compares_kernels_with_references(kernels_run, monkeypatch):
    monkeypatch.setitem(forward.BACKENDS, "kernels", "triton")
    timer = measure.Timer(kernels_run, 0, 1)
    rows = list(forward.measure("tiny", build_plan(PLANS["two branches"]), timer, torch.float32, (1e9, 1e9), SMALL, 1))
    assert [(row.who, row.layers, row.note) for row in rows] == [("kernels", 1, ""), ("references", 1, "")]
    assert 0 < rows[0].error < 1e-4 and rows[1].error is None
    lines = table_cells(forward.table(rows))
    assert [line[1] for line in lines[1:]] == ["kernels", "references"] and float(lines[1][2]) > 0


def test_wrong_forward_is_detected(monkeypatch):
    def output(*_):
        return torch.ones(16, 32) if backend() == "auto" else torch.zeros(16, 32)

    monkeypatch.setattr(forward.Transformer, "forward", output)
    rows = list(forward.measure("tiny", build_plan(PLANS["two branches"]), measure.Timer(CPU, 0, 1), torch.float32,
                                (1e9, 1e9), SMALL, 2))  # fmt: skip
    assert rows[0].note == "WRONG"


def test_run_prints_a_table_per_workload(capsys):
    workloads = [WORKLOAD["cfg_euler_step"]]
    rows = kernels.run(workloads, measure.Timer(CPU, 0, 1), (1e9, 1e9), compiled=False)
    assert [row.who for row in rows] == ["bagel_rt", "official"]
    assert capsys.readouterr().out.startswith("**cfg_euler_step**, roofline 3.0 us\n\n|  | us |")


def test_rotating_calls_have_separate_inputs(monkeypatch):
    seen, timer = [], measure.Timer(CPU, 0, 1)
    timer.l2_bytes = 4500

    def spy(x, w_first, w_rest, *biases, residual, **options):
        seen.append((x.data_ptr(), w_rest.data_ptr(), residual.data_ptr()))
        return peers.reference_linear(x, w_first, w_rest, *biases, residual=residual, **options)

    monkeypatch.setitem(kernels.PEERS, "linear", {"spy": spy})
    rows = list(kernels.measure(WORKLOAD["linear with a residual"], timer))
    assert [(row.who, row.note) for row in rows] == [(kernels.OURS, ""), ("spy", "")]
    assert len(seen) == 3 and all(len(set(addresses)) == 3 for addresses in zip(*seen, strict=True))
