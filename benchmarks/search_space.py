"""The tuner's search space: launch arguments by op, shape class and architecture.

The arguments are documented in each op's file. The shipped table holds conservative entries. The search space adds
options that could be faster but have not been measured: on-device descriptors, warp specialization (linear only;
attention does not compile with it), deeper pipelines, other tile sizes. ``python -m benchmarks.inspect --candidates``
compiles all of it.
"""

from collections.abc import Iterator
from itertools import product

from bagel_rt.kernels import configs
from benchmarks.compiling import DEVICE_LIMITS


def candidates(op: str, shape_class: str, architecture: str) -> list[dict]:
    """Launch arguments to try for a class: the shipped entry, then the search space that fits in shared memory.

    Raises:
        KeyError: the op, architecture or class is not in the table.
    """
    shipped = configs.TABLE[op][architecture][shape_class]["tiles"]
    result = [] if shipped is None else [shipped]
    if op not in _SPACES:
        return result + [tiles for tiles in _neighbors(shipped) if tiles != shipped]
    space, shared_memory = _SPACES[op]
    for tiles in space(shape_class, architecture in ("sm_90", "sm_100")):
        if tiles not in result and shared_memory(tiles, shape_class) <= DEVICE_LIMITS[architecture].shared_per_block:
            result.append(tiles)
    return result


def _neighbors(tiles: dict) -> Iterator[dict]:
    """The default search space: each size of the shipped entry halved, unchanged and doubled, with 1 to 16 warps."""
    sizes = {name: sorted({max(1, size // 2), size, 2 * size}) for name, size in tiles.items() if type(size) is int}
    return _grid(**tiles | sizes | {"num_warps": [1, 2, 4, 8, 16]})


def _grid(**choices) -> Iterator[dict]:
    """Cartesian product of the choices; a value that is not a list is a single choice."""
    values = [value if isinstance(value, list) else [value] for value in choices.values()]
    for combination in product(*values):
        yield dict(zip(choices, combination, strict=True))


def _linear(shape_class: str, has_tma: bool) -> Iterator[dict]:
    plain = dict(HALVES=False, FLATTEN=False, DESCRIPTORS="none", TMA_STORE=False, WARP_SPECIALIZE=False)
    host = dict(DESCRIPTORS="host", TMA_STORE=True, WARP_SPECIALIZE=False)
    size = shape_class.split(maxsplit=1)[0]
    if size in ("float32", "unaligned"):
        for height, width in ((64, 64), (32, 64), (32, 32), (128, 64)):
            yield from _linear_grid(
                height, width, 32, plain, GROUP_M=8, PROGRAMS=2, num_warps=[4, 8], num_stages=[2, 3]
            )
    elif size in ("few", "some"):
        height = 16 if size == "few" else 64
        loads = host | dict(HALVES=False, FLATTEN=[True, False]) if has_tma else plain
        for width, depth in product((32, 64, 128), (64, 128, 256)):
            yield from _linear_grid(
                height, width, depth, loads, GROUP_M=8, PROGRAMS=[1, 2], num_warps=4, num_stages=[3, 4, 6, 8]
            )
    elif not has_tma:
        for height, width in ((128, 128), (128, 64), (64, 128), (128, 256), (256, 128)):
            for depth, stages in ((32, [3, 4, 5]), (64, [2, 3])):
                yield from _linear_grid(
                    height, width, depth, plain, GROUP_M=8, PROGRAMS=[1, 2], num_warps=[4, 8], num_stages=stages
                )
    else:
        for height, width, depth in ((128, 256, 64), (256, 128, 64), (128, 128, 64), (128, 128, 128)):
            pipelined = host | dict(HALVES=[True, False], FLATTEN=[True, False])
            yield from _linear_grid(
                height, width, depth, pipelined, GROUP_M=[8, 16], PROGRAMS=1, num_warps=8, num_stages=[3, 4, 5]
            )
        specialized = dict(
            HALVES=False, FLATTEN=False, DESCRIPTORS="device", TMA_STORE=[True, False], WARP_SPECIALIZE=True
        )
        for height, width in ((128, 256), (256, 128), (128, 128)):
            yield from _linear_grid(
                height, width, 64, specialized, GROUP_M=[8, 16], PROGRAMS=1, num_warps=4, num_stages=[3, 4, 5]
            )


def _linear_grid(height: int, width: int, depth: int, switches: dict, **choices) -> Iterator[dict]:
    return _grid(BLOCK_M=height, BLOCK_N=width, BLOCK_K=depth, **switches, **choices)


def _linear_shared_memory(tiles: dict, shape_class: str) -> int:
    """Bytes: the pipeline stages of both operands, plus the staging tiles of TMA stores and of the residual."""
    itemsize = 4 if shape_class == "float32" else 2
    height, width = tiles["BLOCK_M"], tiles["BLOCK_N"]
    stages = tiles["num_stages"] * (height + width) * tiles["BLOCK_K"]
    part = height * width // (1 + tiles["HALVES"]) // (1 + ("swiglu" in shape_class))
    residual = part * ("residual" in shape_class and tiles["DESCRIPTORS"] == "host")
    return itemsize * (stages + part * tiles["TMA_STORE"] + residual)


def _attention(shape_class: str, has_tma: bool) -> Iterator[dict]:
    if shape_class == "wide dtype":
        tiles = dict(BLOCK_M=[16, 32, 64], BLOCK_N=[16, 32], BLOCK_TAIL=16, num_warps=[4, 8], num_stages=[1, 2])
    elif shape_class == "decode":
        tiles = dict(BLOCK_M=16, BLOCK_N=[32, 64, 128], BLOCK_TAIL=32, num_warps=[2, 4], num_stages=[2, 3, 4])
    else:
        tiles = dict(
            BLOCK_M=[64, 128], BLOCK_N=[32, 64, 128], BLOCK_TAIL=[32, 64], num_warps=[4, 8], num_stages=[2, 3, 4]
        )
    loads = ["pointers", "host descriptors", "device descriptors"] if has_tma else "pointers"
    for candidate in _grid(LOADS=loads, **tiles):
        if candidate["BLOCK_TAIL"] <= candidate["BLOCK_N"]:
            yield candidate


def _attention_shared_memory(tiles: dict, shape_class: str) -> int:
    """Bytes: the queries, plus the pipeline stages of keys and values."""
    return _row_bytes(shape_class) * (tiles["BLOCK_M"] + 2 * tiles["num_stages"] * tiles["BLOCK_N"])


def _row_bytes(shape_class: str) -> int:
    return (64 if shape_class == "head_dim 64" else 128) * (4 if shape_class == "wide dtype" else 2)


def _dq_shared_memory(tiles: dict, shape_class: str) -> int:
    """Bytes: the queries and output gradients, plus the pipeline stages of keys and values."""
    return _attention_shared_memory(tiles, shape_class) + _row_bytes(shape_class) * tiles["BLOCK_M"]


def _dk_dv(shape_class: str, has_tma: bool) -> Iterator[dict]:
    if shape_class == "wide dtype":
        return _grid(BLOCK_M=[16, 32], BLOCK_N=[16, 32], num_warps=[4, 8], num_stages=[1, 2])
    return _grid(BLOCK_M=[16, 32, 64, 128], BLOCK_N=[64, 128], num_warps=[4, 8], num_stages=[1, 2, 3])


def _dk_dv_shared_memory(tiles: dict, shape_class: str) -> int:
    """Bytes: the keys and values, plus the pipeline stages of queries and output gradients."""
    return 2 * _row_bytes(shape_class) * (tiles["BLOCK_N"] + tiles["num_stages"] * tiles["BLOCK_M"])


_SPACES = {
    "linear": (_linear, _linear_shared_memory),
    "attention": (_attention, _attention_shared_memory),
    "attention_dq": (_attention, _dq_shared_memory),
    "attention_dk_dv": (_dk_dv, _dk_dv_shared_memory),
}
