"""Routed linear layer: ``y = x w^T`` with a bias, a residual or a SwiGLU epilogue.

Rows [0, G) of ``x`` are multiplied by ``w_first``, rows [G, T) by ``w_rest``: two contiguous groups, so there is no
gather. In a mixture of transformers each expert has a group; other models have one group.

    none      y = x w^T + bias
    residual  y = residual + x w^T
    swiglu    z = x w^T + bias, y[:, i] = silu(z[:, 2i]) * z[:, 2i+1], silu(a) = a / (1 + exp(-a))

SwiGLU weights (Shazeer 2020, arXiv:2002.05202) interleave gate and up: row 2i is gate i and row 2i+1 is up i, so the
two inputs of an output are in the same tile. Products accumulate in float32 or wider. The sum with bias or residual is
rounded once to the input dtype; the reference also rounds ``z`` and ``silu``, as unfused layers do.

Work: 2 T K N flops; traffic: both weights once, x and y once.

The kernel is one persistent launch over both groups. Each output tile belongs to one group and selects that group's
weight descriptor (or pointer). Often the first group is an image, whose tiles are compute-bound, and the second a few
text rows, whose tiles are bound by reading weights. Tiles of the two groups are interleaved evenly, so that they
overlap. The gradient is in :mod:`.linear_backward`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import configs
from .backend import mismatch, runs_kernel, wants_gradient
from .linear_backward import linear_gradient
from .registry import op
from .triton_language import TensorDescriptor, descriptor_memory, dot, jit, tl, triton


def linear_reference(
    x: Tensor, w_first: Tensor, w_rest: Tensor, bias_first: Tensor | None, bias_rest: Tensor | None,
    residual: Tensor | None, G: int, swiglu: bool,
) -> Tensor:  # fmt: skip
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`linear`."""
    T = x.shape[0]
    if G == 0:
        y = _product(x, w_rest, bias_rest if residual is None else residual)
    elif G == T:
        y = _product(x, w_first, bias_first if residual is None else residual)
    else:
        y = x.new_empty(T, w_first.shape[0])
        groups = (G, T - G)
        x_first, x_rest = x.split_with_sizes(groups)
        y_first, y_rest = y.split_with_sizes(groups)
        add_first, add_rest = (bias_first, bias_rest) if residual is None else residual.split_with_sizes(groups)
        _product(x_first, w_first, add_first, y_first)
        _product(x_rest, w_rest, add_rest, y_rest)
    if swiglu:
        gate, up = y.view(T, y.shape[1] // 2, 2).unbind(-1)
        y = F.silu(gate.contiguous(), inplace=True).mul_(up)  # a strided exp would take twice the time
    return y


def _product(x: Tensor, w: Tensor, addend: Tensor | None, out: Tensor | None = None) -> Tensor:
    if addend is None:
        return torch.mm(x, w.t(), out=out)
    return torch.addmm(addend, x, w.t(), out=out)


@jit
def group_of_tile(t: tl.tensor, rest_tiles: tl.tensor, tiles: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Whether tile t belongs to the first group, and how many tiles of the second group precede it.

    The persistent order distributes ``rest_tiles`` evenly over ``tiles``: floor(t * rest_tiles / tiles) tiles of the
    second group precede tile t. Tile t belongs to the second group if the same formula gives more for t + 1.
    """
    spread = t * rest_tiles.to(tl.int64)
    return spread % tiles + rest_tiles < tiles, (spread // tiles).to(tl.int32)


@jit
def _place(
    tile: tl.tensor, m_tiles: tl.tensor, n_tiles: tl.tensor, GROUP_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Map a tile number within a group to (m, n): bands of ``GROUP_M`` tile rows, column by column, for L2 reuse."""
    group = tile // (GROUP_M * n_tiles) * GROUP_M
    height = tl.minimum(m_tiles - group, GROUP_M)
    within = tile % (GROUP_M * n_tiles)
    return group + within % height, within // height


@jit
def _finish(
    z: tl.tensor, bias: tl.tensor, residual: tl.tensor, y: tl.tensor, first: tl.tensor, row: tl.tensor, rows: tl.tensor,
    n: tl.tensor, N: tl.tensor,
    SWIGLU: tl.constexpr, DESCRIPTORS: tl.constexpr, TMA_STORE: tl.constexpr,
) -> None:  # fmt: skip
    """Apply the epilogue to a float32 tile at row ``row`` of its group and column ``n``, and store it."""
    if bias is not None:
        columns = n + tl.arange(0, z.shape[1])
        z += tl.load(bias + columns, columns < N, 0.0).to(tl.float32)[None, :]
    if SWIGLU:
        gate, up = tl.split(z.reshape(z.shape[0], z.shape[1] // 2, 2))
        z = gate / (1 + tl.exp(-gate)) * up
        n, N = n // 2, N // 2
    m, columns = tl.arange(0, z.shape[0]), tl.arange(0, z.shape[1])
    corner = (first + row).to(tl.int64) * N + n
    places = m[:, None] * N + columns[None, :]
    inside = (m < rows - row)[:, None] & (columns < N - n)[None, :]
    if residual is not None:
        if DESCRIPTORS == "host":
            z += residual.load([first + row, n]).to(tl.float32)
        else:
            z += tl.load(residual + corner + places, inside, 0.0).to(tl.float32)
    if TMA_STORE:
        y.store([row, n], z.to(y.dtype))  # y is bounded by the group's rows
    else:
        tl.store(y + corner + places, z.to(y.dtype.element_ty), inside)


@jit(do_not_specialize=["T", "G"])
def _linear_kernel(
    x: tl.tensor, w_first: tl.tensor, w_rest: tl.tensor, bias_first: tl.tensor, bias_rest: tl.tensor,
    residual: tl.tensor, y_first: tl.tensor, y_rest: tl.tensor, x_stride: tl.tensor, T: tl.tensor, G: tl.tensor,
    N: tl.tensor, K: tl.tensor,
    SWIGLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HALVES: tl.constexpr, FLATTEN: tl.constexpr, DESCRIPTORS: tl.constexpr, TMA_STORE: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Persistent GEMM over both groups. N: rows of a weight; the output has N columns, N // 2 with SWIGLU.

    BLOCK_M, BLOCK_N, BLOCK_K  tile of the product, and its step along K
    GROUP_M          tile rows per band of the grouped order
    HALVES           run the epilogue on two halves of the tile's columns: half the shared memory
    FLATTEN          pipeline across tiles: loads of the next tile start during the epilogue of this one
    DESCRIPTORS      "none": pointers. "host": TMA descriptors of x, w and residual, created by the launcher. "device":
                     TMA descriptors of x and w, created here, as WARP_SPECIALIZE requires
    TMA_STORE        store by TMA, else through pointers; not with "none"
    WARP_SPECIALIZE  separate load and compute warps. Requires "device", num_warps=4 and no FLATTEN; on Triton 3.6 also
                     no HALVES and no SWIGLU, since its compiler aborts on the split of the tile
    """
    columns = N // 2 if SWIGLU else N
    WIDTH: tl.constexpr = (BLOCK_N // 2 if SWIGLU else BLOCK_N) // (2 if HALVES else 1)
    if DESCRIPTORS == "device":
        x = tl.make_tensor_descriptor(x, [T, K], [x_stride, 1], [BLOCK_M, BLOCK_K])
        w_first = tl.make_tensor_descriptor(w_first, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
        w_rest = tl.make_tensor_descriptor(w_rest, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
        if TMA_STORE:
            y_first = tl.make_tensor_descriptor(y_first, [G, columns], [columns, 1], [BLOCK_M, WIDTH])
            y_rest = tl.make_tensor_descriptor(y_rest, [T - G, columns], [columns, 1], [BLOCK_M, WIDTH])
    n_tiles = tl.cdiv(N, BLOCK_N)
    rest_tiles = tl.cdiv(T - G, BLOCK_M) * n_tiles
    tiles = tl.cdiv(G, BLOCK_M) * n_tiles + rest_tiles
    k = tl.arange(0, BLOCK_K)
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        is_first, rest_before = group_of_tile(t, rest_tiles, tiles)
        if is_first:  # compiles to a select; a branch with loads or stores would break the software pipeline
            w, y, bias = w_first, y_first, bias_first
        else:
            w, y, bias = w_rest, y_rest, bias_rest
        first, rows = tl.where(is_first, 0, G), tl.where(is_first, G, T - G)
        tile = tl.where(is_first, t - rest_before, rest_before)
        m_tile, n_tile = _place(tile, tl.cdiv(rows, BLOCK_M), n_tiles, GROUP_M)
        row, n = m_tile * BLOCK_M, n_tile * BLOCK_N
        if DESCRIPTORS == "none":  # rows past the end are clamped to the last one and not stored
            x_rows = first + tl.minimum(row + tl.arange(0, BLOCK_M), rows - 1)
            w_rows = tl.minimum(n + tl.arange(0, BLOCK_N), N - 1)
            x_places = x + x_rows.to(tl.int64)[:, None] * x_stride + k[None, :]
            w_places = w + w_rows.to(tl.int64)[:, None] * K + k[None, :]
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            if DESCRIPTORS == "none":
                inside = (k < K - start)[None, :]
                x_tile = tl.load(x_places + start, inside, 0.0)
                w_tile = tl.load(w_places + start, inside, 0.0)
            else:
                x_tile = x.load([first + row, start])
                w_tile = w.load([n, start])
            product = dot(x_tile, w_tile.T, product)
        if HALVES:
            left, right = tl.split(product.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
            _finish(left, bias, residual, y, first, row, rows, n, N, SWIGLU, DESCRIPTORS, TMA_STORE)
            n += BLOCK_N // 2
            _finish(right, bias, residual, y, first, row, rows, n, N, SWIGLU, DESCRIPTORS, TMA_STORE)
        else:
            _finish(product, bias, residual, y, first, row, rows, n, N, SWIGLU, DESCRIPTORS, TMA_STORE)


_SIZES = {"few": 16, "some": 64, "hundreds": 512}  # maximum rows of a size class


def shape_class(x: Tensor, G: int, residual: Tensor | None, swiglu: bool, aligned: bool) -> str:
    """Shape class of the tile table: size of the larger group and epilogue ("bias" also covers no epilogue).

    "unaligned" is for tensors that TMA cannot address; its tiles use pointers.
    """
    if not aligned:
        return "unaligned"
    if x.dtype == torch.float32:
        return "float32"
    rows = max(G, x.shape[0] - G)
    size = next((name for name, limit in _SIZES.items() if rows <= limit), "many")
    return f"{size} {'swiglu' if swiglu else 'bias' if residual is None else 'residual'}"


def _fake(
    x: Tensor, w_first: Tensor, w_rest: Tensor, bias_first: Tensor | None, bias_rest: Tensor | None,
    residual: Tensor | None, G: int, swiglu: bool,
) -> Tensor:  # fmt: skip
    N = w_first.shape[0]
    return x.new_empty(x.shape[0], N // 2 if swiglu else N)


@op(
    "linear",
    "(Tensor x, Tensor w_first, Tensor w_rest, Tensor? bias_first, Tensor? bias_rest, Tensor? residual, SymInt G, "
    "bool swiglu) -> Tensor",
    kernel="triton",
    fake=_fake,
    gradient=linear_gradient,
)
def _linear(
    x: Tensor, w_first: Tensor, w_rest: Tensor, bias_first: Tensor | None, bias_rest: Tensor | None,
    residual: Tensor | None, G: int, swiglu: bool,
) -> Tensor:  # fmt: skip
    if runs_kernel(x, w_first, w_rest, bias_first, bias_rest, residual) and x.numel() and w_first.numel():
        x = x if x.stride(1) == 1 else x.contiguous()
        columns = w_first.shape[0] // (2 if swiglu else 1)
        w_first, w_rest = w_first.contiguous(), w_rest.contiguous()
        residual = residual if residual is None else residual.contiguous()
        matrices = (x, w_first, w_rest) if residual is None else (x, w_first, w_rest, residual)
        aligned = columns * x.itemsize % 16 == 0 and all(map(_fits_tma, matrices))
        tiles = configs.tiles("linear", shape_class(x, G, residual, swiglu, aligned), x.device)
        if tiles:
            y = x.new_empty(x.shape[0], columns)
            bias_first, bias_rest = (b if b is None else b.contiguous() for b in (bias_first, bias_rest))
            _launch_kernel(x, w_first, w_rest, bias_first, bias_rest, residual, y, G, swiglu, **tiles)
            return y
    return linear_reference(x, w_first, w_rest, bias_first, bias_rest, residual, G, swiglu)


def _fits_tma(matrix: Tensor) -> bool:
    """Whether TMA can address a matrix: contiguous rows that do not overlap, each 16-byte aligned."""
    row_stride, column_stride = matrix.stride()
    aligned = matrix.data_ptr() % 16 == 0 and row_stride * matrix.itemsize % 16 == 0
    return aligned and column_stride == 1 and row_stride >= matrix.shape[1]


def _launch_kernel(
    x: Tensor, w_first: Tensor, w_rest: Tensor, bias_first: Tensor | None, bias_rest: Tensor | None,
    residual: Tensor | None, y: Tensor, G: int, swiglu: bool, *, PROGRAMS: int, **tiles: Any,
) -> None:  # fmt: skip
    """Launch the kernel with an entry of the tile table: at most ``PROGRAMS`` programs per multiprocessor."""
    T, K = x.shape
    N = w_first.shape[0]
    height, width, depth = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    x_stride = x.stride(0)
    y_first = y_rest = y
    if tiles["TMA_STORE"] and 0 < G < T:
        y_first, y_rest = y.split_with_sizes((G, T - G))
    if tiles["DESCRIPTORS"] == "host":
        x = TensorDescriptor.from_tensor(x, [height, depth])
        w_first, w_rest = (TensorDescriptor.from_tensor(w, [width, depth]) for w in (w_first, w_rest))
        out_block = [height, width // (1 + swiglu) // (1 + tiles["HALVES"])]
        if residual is not None:
            residual = TensorDescriptor.from_tensor(residual, out_block)
        if tiles["TMA_STORE"]:
            y_first, y_rest = (TensorDescriptor.from_tensor(y, out_block) for y in (y_first, y_rest))
    elif tiles["DESCRIPTORS"] == "device":
        descriptor_memory(y.device)
    count = (triton.cdiv(G, height) + triton.cdiv(T - G, height)) * triton.cdiv(N, width)
    programs = min(count, PROGRAMS * configs.multiprocessors(y.device))
    _linear_kernel[(programs,)](
        x, w_first, w_rest, bias_first, bias_rest, residual, y_first, y_rest, x_stride, T, G, N, K,
        SWIGLU=swiglu, **tiles,
    )  # fmt: skip


def linear(
    x: Tensor, w_first: Tensor, w_rest: Tensor | None = None, bias_first: Tensor | None = None,
    bias_rest: Tensor | None = None, *, G: int | None = None, residual: Tensor | None = None, swiglu: bool = False,
) -> Tensor:  # fmt: skip
    """Multiply each packed row by the weight of its group. Differentiable.

    Args:
        x: [T, K], floating point.
        w_first, w_rest: weights of rows [0, G) and [G, T), [N, K], dtype of ``x``. Without ``w_rest`` all rows of
            ``x`` use ``w_first`` and ``bias_first``. With ``swiglu`` N is even and weight rows alternate gate, up.
        bias_first, bias_rest: [N] like the weights, or both None. Not together with ``residual``.
        G: number of rows of the first group, 0 <= G <= T; ignored without ``w_rest``.
        residual: [T, N] like ``x``, added to the product, or None. Not together with ``swiglu``.
        swiglu: combine each pair of columns into silu(gate) * up.

    Returns:
        [T, N], contiguous; [T, N // 2] with ``swiglu``.

    Raises:
        ValueError: a shape, dtype or G does not match, or the epilogues exclude each other. The message names the
            argument.
    """
    T, K = x.shape
    N = w_first.shape[0]
    dtype = x.dtype
    if w_rest is None:
        w_rest, bias_rest, G = w_first, bias_first, T
    if G is None or not 0 <= G <= T:
        raise ValueError(f"linear: G must be from 0 to {T}, the rows of x, got {G}.")
    for name, w in (("w_first", w_first), ("w_rest", w_rest)):
        if w.shape != (N, K) or w.dtype != dtype:
            raise mismatch("linear", name, w, (N, K), dtype)
    if bias_first is not None or bias_rest is not None:
        _check_biases(bias_first, bias_rest, N, dtype)
    if residual is not None:
        if bias_first is not None or swiglu:
            raise ValueError(
                f"linear: residual must be None with {'swiglu' if swiglu else 'a bias'}. Add it afterward."
            )
        if residual.shape != (T, N) or residual.dtype != dtype:
            raise mismatch("linear", "residual", residual, (T, N), dtype)
    if swiglu and N % 2:
        raise ValueError(f"linear: w_first must have an even number of rows with swiglu, got {N}.")
    if swiglu and wants_gradient(x, w_first, w_rest, bias_first, bias_rest):
        return _differentiable_swiglu(x, w_first, w_rest, bias_first, bias_rest, G)
    return _linear(x, w_first, w_rest, bias_first, bias_rest, residual, G, swiglu)


def _check_biases(bias_first: Tensor | None, bias_rest: Tensor | None, N: int, dtype: torch.dtype) -> None:
    for name, bias in (("bias_first", bias_first), ("bias_rest", bias_rest)):
        if bias is None:
            raise ValueError(f"linear: {name} must be given together with the other bias, got None.")
        if bias.shape != (N,) or bias.dtype != dtype:
            raise mismatch("linear", name, bias, (N,), dtype)


def _differentiable_swiglu(
    x: Tensor, w_first: Tensor, w_rest: Tensor, bias_first: Tensor | None, bias_rest: Tensor | None, G: int
) -> Tensor:
    """SwiGLU by autograd. Deinterleaves gate and up in the weights, so that the products need no strided access."""
    w_first, w_rest = _deinterleave(w_first), _deinterleave(w_rest)
    bias_first, bias_rest = (b if b is None else _deinterleave(b) for b in (bias_first, bias_rest))
    gate, up = _linear(x, w_first, w_rest, bias_first, bias_rest, None, G, False).chunk(2, 1)
    return F.silu(gate) * up


def _deinterleave(rows: Tensor) -> Tensor:
    return rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
