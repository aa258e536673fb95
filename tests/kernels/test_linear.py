import pytest
import torch

from bagel_rt.kernels import configs, linear
from bagel_rt.kernels.linear import _launch_kernel, group_of_tile, linear_reference, shape_class
from bagel_rt.kernels.triton_language import jit, tl

SHAPES = [
    pytest.param(T, G, K, N, id=f"{T}rows-{G}gen-k{K}-n{N}")
    for T, G, K, N in [
        (0, 0, 64, 96), (1, 0, 64, 96), (1, 1, 64, 96), (5, 5, 3, 2), (6, 1, 1, 2), (7, 3, 100, 66), (40, 9, 72, 80),
        (130, 128, 129, 258), (70, 2, 72, 144),
    ]
]  # fmt: skip
EPILOGUES = ["none", "bias", "residual", "swiglu", "bias-swiglu"]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def values(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(T, K, N, epilogue, dtype, device):
    """x, w_first, w_rest for outputs of order 1, and the keyword arguments of an epilogue."""
    x, w_first, w_rest = values(1, T, K), values(2, N, K) / K**0.5, values(3, N, K) / K**0.5
    extra = {"swiglu": "swiglu" in epilogue}
    if "bias" in epilogue:
        extra |= {"bias_first": values(4, N).to(device, dtype), "bias_rest": values(5, N).to(device, dtype)}
    if epilogue == "residual":
        extra |= {"residual": values(6, T, N).to(device, dtype)}
    return tuple(t.to(device, dtype) for t in (x, w_first, w_rest)), extra


def by_the_book(x, w_first, w_rest, G, bias_first=None, bias_rest=None, residual=None, swiglu=False):
    rows = []
    for r in range(len(x)):
        w, bias = (w_first, bias_first) if r < G else (w_rest, bias_rest)
        row = (w.double() * x[r].double()).sum(1)
        if bias is not None:
            row = row + bias.double()
        if residual is not None:
            row = row + residual[r].double()
        if swiglu:
            gate, up = row[0::2], row[1::2]
            row = gate / (1 + torch.exp(-gate)) * up
        rows.append(row)
    return torch.stack(rows) if rows else x.new_zeros(0, len(w_first) // (2 if swiglu else 1), dtype=torch.float64)


def assert_matches(y, expected):
    tolerance = TOLERANCE[y.dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("T, G, K, N", SHAPES)
def test_matches_the_formula_in_float64(T, G, K, N, epilogue, dtype, device):
    args, extra = arguments(T, K, N, epilogue, dtype, device)
    y = linear(*args, G=G, **extra)
    assert y.dtype == dtype and y.is_contiguous()
    assert_matches(y, by_the_book(*args, G, **extra))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_one_weight_serves_all_rows(epilogue, device):
    (x, w, _), extra = arguments(7, 16, 8, epilogue, torch.float32, device)
    extra.pop("bias_rest", None)
    assert_matches(linear(x, w, **extra), by_the_book(x, w, None, len(x), **extra))


def test_rejects_two_weights_without_g():
    with pytest.raises(ValueError, match="G must be from 0 to 3, the rows of x, got None"):
        linear(torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(4, 8))


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("G", [0, 2, 6], ids=lambda G: f"{G}gen")
def test_accepts_strided_inputs_and_does_not_modify_them(G, epilogue, device):
    args, extra = arguments(6, 16, 8, epilogue, torch.float32, device)
    spread = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in extra.items() if isinstance(t, torch.Tensor)}
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in args]
    before = [t.clone() for t in (*strided, *spread.values())]
    torch.testing.assert_close(linear(*strided, G=G, **(extra | spread)), linear(*args, G=G, **extra))
    assert all(map(torch.equal, (*strided, *spread.values()), before))


@pytest.mark.parametrize("dtype, step", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
@pytest.mark.parametrize("G", [0, 2, 5], ids=lambda G: f"{G}gen")
def test_sum_with_the_residual_is_rounded_once(G, dtype, step, device):
    x = torch.tensor([1, step], dtype=dtype, device=device).expand(5, 2)  # 1 + step rounds to 1; less 1 it is exact
    w, residual = torch.ones(3, 2, dtype=dtype, device=device), -torch.ones(5, 3, dtype=dtype, device=device)
    assert (linear(x, w, w, G=G, residual=residual) == step).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_gates_do_not_overflow(device):
    x = torch.tensor([[-200.0], [200.0]], device=device)
    w = torch.ones(2, 1, device=device)
    assert linear(x, w, w, G=1, swiglu=True).tolist() == [[0.0], [40000.0]]


def test_rejects_residual_with_bias_or_swiglu():
    x, w, b = torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(4)
    with pytest.raises(ValueError, match="residual must be None with a bias"):
        linear(x, w, w, b, b, G=1, residual=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="residual must be None with swiglu"):
        linear(x, w, w, G=1, residual=torch.zeros(3, 4), swiglu=True)


def test_rejects_mismatched_argument():
    x, w, b = torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(4)
    with pytest.raises(ValueError, match="G must be from 0 to 3, the rows of x, got 4"):
        linear(x, w, w, G=4)
    with pytest.raises(ValueError, match=r"w_first must be \(4, 8\).*got \(4, 7\) torch.float32"):
        linear(x, w[:, :7], w, G=1)
    with pytest.raises(ValueError, match=r"w_rest must be \(4, 8\).*got \(5, 8\) torch.float32"):
        linear(x, w, torch.zeros(5, 8), G=1)
    with pytest.raises(ValueError, match="w_first must be .* torch.float32.*got .* torch.bfloat16"):
        linear(x, w.bfloat16(), w.bfloat16(), G=1)
    with pytest.raises(ValueError, match="bias_rest must be given together with the other bias, got None"):
        linear(x, w, w, b, G=1)
    with pytest.raises(ValueError, match=r"bias_first must be \(4,\).*got \(3,\) torch.float32"):
        linear(x, w, w, b[:3], b, G=1)
    with pytest.raises(ValueError, match=r"residual must be \(3, 4\).*got \(3, 5\) torch.float32"):
        linear(x, w, w, G=1, residual=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="w_first must have an even number of rows with swiglu, got 3"):
        linear(x, w[:3], w[:3], G=1, swiglu=True)


# The kernel alone. Tiles of 16 x 32 x 16: a call has several in every dimension, and a program several of them.
SMALL = {
    "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "HALVES": False, "FLATTEN": False, "DESCRIPTORS": "none",
    "TMA_STORE": False, "WARP_SPECIALIZE": False, "PROGRAMS": 1, "num_warps": 4, "num_stages": 3,
}  # fmt: skip
PATHS = {
    "pointers": {},
    "pointers-halves-groups-of-3": {"HALVES": True, "GROUP_M": 3},
    "descriptors": {"DESCRIPTORS": "host", "TMA_STORE": True, "FLATTEN": True},
    "descriptors-halves": {"DESCRIPTORS": "host", "TMA_STORE": True, "FLATTEN": True, "HALVES": True},
    "descriptors-pointer-stores": {"DESCRIPTORS": "host", "GROUP_M": 1},
    "device-descriptors": {"DESCRIPTORS": "device", "TMA_STORE": True, "HALVES": True},
    "device-descriptors-pointer-stores": {"DESCRIPTORS": "device"},
}


def launch(x, w_first, w_rest, G, bias_first=None, bias_rest=None, residual=None, swiglu=False, **tiles):
    """Run the kernel on an output framed by NaN; return the output and the two rows above and below it."""
    columns = len(w_first) // (2 if swiglu else 1)
    frame = x.new_full((len(x) + 4, columns), float("nan"))
    _launch_kernel(x, w_first, w_rest, bias_first, bias_rest, residual, frame[2:-2], G, swiglu, **(SMALL | tiles))
    return frame[2:-2], torch.cat([frame[:2], frame[-2:]])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("path", PATHS)
def test_tiles_cover_the_output_and_write_nothing_else(path, epilogue, dtype, kernels):
    args, extra = arguments(85, 40, 80, epilogue, dtype, kernels)
    y, frame = launch(*args, 53, **extra, **PATHS[path])
    assert frame.isnan().all()
    assert_matches(y, by_the_book(*args, 53, **extra))


@pytest.mark.slow
@pytest.mark.parametrize("G", [0, 1, 16, 17, 84, 85], ids=lambda G: f"{G}gen-of-85")
@pytest.mark.parametrize("path", ["pointers", "descriptors-halves"])
def test_any_split_of_the_rows(path, G, kernels):
    args, extra = arguments(85, 40, 80, "bias", torch.float16, kernels)
    y, frame = launch(*args, G, **extra, **PATHS[path])
    assert frame.isnan().all()
    assert_matches(y, by_the_book(*args, G, **extra))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_tile_writes_only_rows_of_its_group(path, kernels):
    (x, w, _), _ = arguments(70, 40, 80, "none", torch.float16, kernels)
    nothing = torch.full_like(w, float("nan"))
    y, _ = launch(x, nothing, w, 61, **(PATHS[path] | {"GROUP_M": 1}))  # tiles of gen rows 48..63 end after und's
    assert y[:61].isnan().all() and not y[61:].isnan().any()
    y, _ = launch(x, w, nothing, 61, **(PATHS[path] | {"GROUP_M": 1}))
    assert y[61:].isnan().all() and not y[:61].isnan().any()


def test_output_is_independent_of_the_grid_size(kernels, monkeypatch):
    args, extra = arguments(85, 40, 80, "swiglu", torch.float16, kernels)
    outputs = []
    for programs in (1, 2, 1000):
        monkeypatch.setattr(configs, "multiprocessors", lambda device, programs=programs: programs)
        outputs.append(launch(*args, 53, **extra, **PATHS["descriptors"])[0])
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.fixture
def looked_up(kernels, monkeypatch):
    """Record the shape classes that :func:`linear` looks up."""
    classes, look_up = [], configs.tiles
    monkeypatch.setattr(configs, "tiles", lambda *key: classes.append(key[1]) or look_up(*key))
    return classes


def odd_base(t):
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


LAYOUTS = {
    "rows-apart": ("few bias", lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]),
    "rows-an-odd-number-of-elements-apart": ("unaligned", lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1]),
    "base-off-by-one": ("unaligned", odd_base),
    "transposed": ("few bias", lambda x: x.t().contiguous().t()),
    "one-row-repeated": ("unaligned", lambda x: x[:1].expand_as(x)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accepts_any_layout_of_x(layout, looked_up, kernels):
    (x, w_first, w_rest), _ = arguments(6, 40, 48, "none", torch.float16, kernels)
    shape_class, lay_out = LAYOUTS[layout]
    x = lay_out(x)
    assert_matches(linear(x, w_first, w_rest, G=4), by_the_book(x, w_first, w_rest, 4))
    assert looked_up == [shape_class]


@pytest.mark.parametrize("odd", ["w_first", "w_rest", "residual"])
def test_accepts_misaligned_weights_and_residual(odd, looked_up, kernels):
    (x, w_first, w_rest), extra = arguments(6, 40, 48, "residual", torch.float16, kernels)
    tensors = {"w_first": w_first, "w_rest": w_rest, "residual": extra["residual"]}
    tensors[odd] = odd_base(tensors[odd])
    assert_matches(linear(x, **tensors, G=4), by_the_book(x, **tensors, G=4))
    assert looked_up == ["unaligned"]


@pytest.mark.parametrize("K, N", [(40, 47), (41, 48), (40, 1), (1, 8)])
def test_widths_that_tma_cannot_address_use_pointers(K, N, looked_up, kernels):
    args, extra = arguments(6, K, N, "bias", torch.bfloat16, kernels)
    assert_matches(linear(*args, G=4, **extra), by_the_book(*args, 4, **extra))
    assert looked_up == ["unaligned"]


@pytest.mark.slow
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("T", [9, 50, 200], ids=lambda T: f"{T}rows")
def test_matches_the_formula_without_tma(T, epilogue, looked_up, kernels, monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_89")
    args, extra = arguments(T, 72, 80, epilogue, torch.float16, kernels)
    assert_matches(linear(*args, G=T - 2, **extra), by_the_book(*args, T - 2, **extra))
    assert looked_up[0].split()[0] == {9: "few", 50: "some", 200: "hundreds"}[T]


def test_shape_class_follows_the_larger_group_and_the_epilogue():
    x, residual = torch.zeros(600, 8, dtype=torch.float16), torch.zeros(600, 8)
    assert shape_class(x[:20], 4, None, False, True) == "few bias"
    assert shape_class(x[:20], 20, None, True, True) == "some swiglu"
    assert shape_class(x, 88, residual, False, True) == "hundreds residual"
    assert shape_class(x, 87, residual, False, True) == "many residual"
    assert shape_class(x.float(), 87, residual, False, True) == "float32"
    assert shape_class(x.float(), 87, residual, False, False) == "unaligned"


@pytest.mark.parametrize(
    "architecture, shared_memory", [("sm_80", 163), ("sm_89", 99), ("sm_90", 227), ("sm_100", 227)]
)
def test_table_has_every_class_and_its_stages_fit_shared_memory(architecture, shared_memory):
    sizes, epilogues = ("few", "some", "hundreds", "many"), ("bias", "residual", "swiglu")
    table = configs.TABLE["linear"][architecture]
    assert set(table) == {f"{size} {epilogue}" for size in sizes for epilogue in epilogues} | {"float32", "unaligned"}
    for name, entry in table.items():
        tiles = entry["tiles"]
        if tiles is None:
            continue
        assert tiles.keys() == SMALL.keys()
        pointers = architecture in ("sm_80", "sm_89") or name in ("float32", "unaligned")
        assert (tiles["DESCRIPTORS"] == "none") == pointers
        width = 4 if name in ("float32", "unaligned") else 2
        stage = (tiles["BLOCK_M"] + tiles["BLOCK_N"]) * tiles["BLOCK_K"] * width
        buffers = tiles["num_stages"] - 1  # at least
        assert tiles["PROGRAMS"] * buffers * stage <= shared_memory * 1024


def test_null_tiles_run_the_reference(kernels, monkeypatch):
    (x, w_first, w_rest), _ = arguments(6, 40, 48, "none", torch.float16, kernels)
    entry = {"few bias": {"tiles": None, "source": ""}}
    monkeypatch.setitem(configs.TABLE, "linear", dict.fromkeys(configs.ARCHITECTURES, entry))
    y = linear(x, w_first, w_rest, G=4)
    assert torch.equal(y, linear_reference(x, w_first, w_rest, None, None, None, 4, False))


@jit(do_not_specialize=["rest_tiles", "tiles"])
def _order_kernel(order_ptr, rest_tiles, tiles):
    for t in range(tiles):
        is_first, rest_before = group_of_tile(t, rest_tiles, tiles)
        tl.store(order_ptr + t, tl.where(is_first, -1, rest_before))


@pytest.mark.parametrize("gen, und", [(4736, 148), (7, 3), (3, 7), (5, 0), (0, 5), (1, 1), (100, 99)], ids=str)
def test_tiles_of_the_smaller_group_are_interleaved_evenly(kernels, gen, und):
    order = torch.full((gen + und,), -2, dtype=torch.int32, device=kernels)
    _order_kernel[(1,)](order, und, gen + und)
    places = (order >= 0).nonzero().flatten()
    assert order[places].tolist() == list(range(und)) and (order == -1).sum() == gen
    gaps = places.diff().tolist()
    assert not gaps or max(gaps) - min(gaps) <= 1
