"""Tests of every op: registration, fake implementation, torch.compile, and the number of operator calls."""

import pytest
import torch
from recording import dispatch_ops
from torch.utils._python_dispatch import TorchDispatchMode

from bagel_rt.check.cases import CASES, Values
from bagel_rt.kernels import (
    attention,
    attention_backward,
    cfg_euler_step,
    decode_attention,
    decode_linear,
    decode_qkv,
    group_norm,
    group_norm_moments,
    linear,
    qk_norm_rope,
    rms_norm,
    sample,
)
from bagel_rt.kernels.registry import OPS

H, HQ, HKV, D, N, S = 64, 4, 2, 16, 96, 32


def calls(T, G, dtype=torch.float32):
    """Name -> (public function, args, kwargs): every form of an op in a forward of T rows, G of them gen."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    def int32(rows, *shape):
        return torch.tensor(rows, dtype=torch.int32).view(*shape)

    wide = torch.promote_types(dtype, torch.float32)
    x, weight, w, bias = values(T, H), values(2, H), values(2, N, H), values(2, N)
    qkv, norm, tables = values(T, (HQ + 2 * HKV) * D), values(2, HQ + HKV, D), values(2, T, D // 2, dtype=torch.float32)
    q, caches, number = values(T, HQ, D), values(2, S, HKV, D).unbind(0), torch.arange(T)
    qkv_layer = values((HQ + 2 * HKV) * D, H), values((HQ + 2 * HKV) * D)
    full = int32([S] * T, T), int32([[i, i + 1, 0, S, S, 0, 0] for i in range(T)], T, 7)
    causal = int32(range(1, T + 1), T), int32([[0, T, 0, 1, T, 0, 0]] * bool(T), -1, 7)
    velocities = values(3 * T, H)
    images = int32([[0, G, 0, T, 2 * T], [G, T - G, G, T + G, 2 * T + G]], 2, 5)
    parameters = torch.tensor([[0.1, 4.0, 2.0, 0.0, 2.0], [0.2, 3.0, 1.0, 0.1, 0.0]])
    maps, affine = values(T, H, 7, 6), (*values(2, H), 32, 1e-6, True)
    strip = maps.contiguous(memory_format=torch.channels_last)[:, :, 2 * bool(T) :]
    routed = {"G": G}
    return {
        "rms_norm": (rms_norm, (x, None, *weight, G, 1e-6), {}),
        "add_rms_norm": (rms_norm, (x, values(T, H), *weight, G, 1e-6), {}),
        "linear": (linear, (x, *w), routed),
        "linear-bias": (linear, (x, *w, *bias), routed),
        "linear-residual": (linear, (x, *w), routed | {"residual": values(T, N)}),
        "linear-swiglu": (linear, (x, *w), routed | {"swiglu": True}),
        "qk_norm_rope": (qk_norm_rope, (qkv, *norm, *tables, number, *caches, G, 1e-6), {}),
        "attention-full": (attention, (q, *caches, *full), {}),
        "attention-causal": (attention, (q, *caches, *causal), {}),
        "attention_lse": (attention, (q, *caches, *causal), {"return_lse": True}),
        "attention_backward": (
            attention_backward,
            (values(T, HQ, D), values(HQ, T, dtype=wide), q, *caches, q, values(HQ, T, dtype=wide) + 9, *causal, 0.25),
            {},
        ),
        "decode_attention": (decode_attention, (q, *caches, number, S - number), {}),
        "decode_linear": (decode_linear, (x, w[0]), {"norm": weight[0], "residual": values(T, N)}),
        "decode_linear-swiglu": (decode_linear, (x, w[0]), {"swiglu": True}),
        "decode_qkv": (decode_qkv, (x, weight[0], *qkv_layer, norm[0], *tables, number, *caches, 1e-6), {}),
        "cfg_euler_step": (cfg_euler_step, (x.to(wide, copy=True), velocities, images, parameters, T), {}),
        "cfg_euler_step-off": (cfg_euler_step, (x.to(wide, copy=True), velocities, images, parameters, T, False), {}),
        "group_norm": (group_norm, (maps, *affine), {}),
        "group_norm-strip": (group_norm, (strip, *affine, values(T, 32, 2, dtype=wide)), {}),
        "group_norm_moments": (group_norm_moments, (maps, 32, 1e-6), {}),
        "sample": (sample, (x, torch.tensor([[0.7, 9, 0.9]]).repeat(T, 1), number, number), {}),
        "sample-greedy": (sample, (x,), {}),
    }


CALLS = list(calls(1, 0))
SMALL_CASES = [case for case in CASES if case.interpreted]


class Record(TorchDispatchMode):
    """Record calls of registered ops with their arguments, and the aten ops inside them that create or write tensors.

    Of ops that are composed of others of ours, the outermost.
    """

    def __init__(self):
        super().__init__()
        self.ours, self.inner, self._inside = [], [], False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.namespace == "bagel_rt":
            if not self._inside:
                with torch.inference_mode(False):  # the op writes to some: keep their values
                    kept = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
                self.ours.append((op, kept, kwargs))
            outer, self._inside = self._inside, True
            with self:
                result = op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            self._inside = outer
            return result
        result = op(*args, **kwargs)
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        fresh = isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in inputs
        if fresh or op._schema.is_mutable:
            self.inner.append(op)
        return result


def run(name, T, G, dtype=torch.float32):
    """Call the registered op, as a compiled caller does."""
    function, args, kwargs = calls(T, G, dtype)[name]
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(), Record() as record:
        dispatch_ops(patch)
        function(*args, **kwargs)
    return record


def test_every_op_is_listed_and_every_listed_op_is_registered():
    names = torch._C._dispatch_get_all_op_names()
    assert sorted(OPS) == sorted(name.removeprefix("bagel_rt::") for name in names if name.startswith("bagel_rt::"))


@pytest.mark.parametrize("name", CALLS)
def test_eager_call_skips_the_dispatcher(name):
    function, args, kwargs = calls(5, 2)[name]
    _, same_args, same_kwargs = calls(5, 2)[name]
    with torch.inference_mode(), Record() as record:
        eager = function(*args, **kwargs)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        dispatch_ops(patch)
        torch.testing.assert_close(eager, function(*same_args, **same_kwargs), rtol=0, atol=0)
    written, same = ([a for a in sequence if isinstance(a, torch.Tensor)] for sequence in (args, same_args))
    torch.testing.assert_close(written, same, rtol=0, atol=0)
    assert not record.ours


def test_every_op_has_a_check_case_that_runs_here():
    assert {case.op for case in SMALL_CASES} == set(OPS)


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: f"{case.op}, {case.name}")
def test_opcheck_accepts_the_case(case):
    call, _ = case.build(Values("cpu", case.dtypes[0]))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), Record() as record:
        dispatch_ops(patch)
        call()
    assert case.op in {op._opname for op, _, _ in record.ours}
    for op, args, kwargs in record.ours:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "Autograd"):
            args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(op, args, kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "T, G, dtype",
    [
        pytest.param(0, 0, torch.float32, id="no-rows"),
        pytest.param(1, 0, torch.float32, id="one-row"),
        pytest.param(5, 2, torch.float32, id="both-experts"),
        pytest.param(5, 5, torch.float64, id="float64"),
        pytest.param(5, 2, torch.bfloat16, id="bfloat16"),
    ],
)
@pytest.mark.parametrize("name", CALLS)
def test_opcheck_accepts(name, T, G, dtype):
    ((op, args, kwargs),) = run(name, T, G, dtype).ours
    torch.library.opcheck(op, args, kwargs)


@pytest.mark.parametrize("name", CALLS)
def test_fake_strides_match_real_ones_for_column_major_inputs(name):
    ((op, args, kwargs),) = run(name, 5, 2).ours
    args = tuple(a.mT.contiguous().mT if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in args)
    torch.library.opcheck(op, args, kwargs, test_utils="test_faketensor")


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_compiles_to_one_graph_for_any_number_of_rows(name):
    function, graphs = calls(1, 0)[name][0], []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    for compiler in (keep, "aot_eager"):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
        for T, G in ((11, 3), (9, 5)):  # unlike any other size, or the compiler takes them for the same
            (_, args, kwargs), (_, same_args, same_kwargs) = (calls(T, G)[name] for _ in range(2))
            with torch.inference_mode():
                torch.testing.assert_close(compiled(*args, **kwargs), function(*same_args, **same_kwargs))
            written, same = ([a for a in sequence if isinstance(a, torch.Tensor)] for sequence in (args, same_args))
            torch.testing.assert_close(written, same)
    (graph,) = graphs
    assert [node.target.namespace for node in graph.graph.nodes if hasattr(node.target, "namespace")] == ["bagel_rt"]


# Operator calls that make or write a tensor: one row; rows of both experts; rows of one expert in bfloat16.
BUDGET = {
    "rms_norm": (2, 3, 2),
    "add_rms_norm": (3, 4, 3),
    "linear": (1, 3, 1),
    "linear-bias": (1, 3, 1),
    "linear-residual": (1, 3, 1),
    "linear-swiglu": (4, 6, 4),
    "qk_norm_rope": (7, 9, 10),
    "attention-full": (1, 1, 1),
    "attention-causal": (1, 3, 3),
    "attention_lse": (20, 20, 25),
    "attention_backward": (37, 37, 48),
    "decode_attention": (1, 6, 6),  # one for each of five sequences, and one to join them
    "decode_linear": (3, 3, 3),
    "decode_linear-swiglu": (4, 4, 4),
    "decode_qkv": (10, 11, 13),
    "cfg_euler_step": (12, 20, 15),  # of two images, the first without rows where no row is generation's
    "cfg_euler_step-off": (2, 2, 4),
    "group_norm": (2, 2, 2),
    "group_norm-strip": (9, 9, 10),
    "group_norm_moments": (13, 13, 13),
    "sample": (157, 157, 158),
    "sample-greedy": (2, 2, 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_stays_within_its_operator_call_budget(name):
    records = run(name, 1, 0), run(name, 5, 2), run(name, 5, 0, torch.bfloat16)
    for record, budget in zip(records, BUDGET[name], strict=True):
        assert len(record.inner) <= budget, [str(op) for op in record.inner]
