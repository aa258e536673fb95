"""The plan against the definition of its segments, row by row in plain Python; and the C++ planner against numpy."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_rt.runtime import plan as plan_module
from bagel_rt.runtime.plan import MAX_SLOTS, Plan, Segment, build_plan, plan_reference, visibility

needs_extension = pytest.mark.skipif(
    plan_module.EXTENSION is None, reason=f"no bagel_rt._C: {plan_module.EXTENSION_ERROR}"
)


def und(n: int) -> np.ndarray:
    """Rows of a text or ViT segment: all the understanding expert's."""
    return np.zeros(n, bool)


def image(n: int) -> np.ndarray:
    """Rows of a VAE or noise segment: n generation rows between two markers."""
    return np.pad(np.ones(n, bool), 1)


@st.composite
def experts(draw) -> np.ndarray:
    """Which rows of one segment are the generation expert's: none, all, all between markers, or any."""
    n = draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["und", "gen", "image", "any"]))
    if kind == "any":
        return np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    return {"und": und(n), "gen": np.ones(n, bool), "image": image(n)}[kind]


@st.composite
def segment_lists(draw) -> list[Segment]:
    """Up to three contexts side by side in the cache, their segments shuffled, some stored apart.

    A context grows by causal and full segments, and may be the shared prefix (whole or in part) of further ones that
    are stored after everything else.
    """
    segments, apart, slot = [], [], draw(st.integers(0, 5))
    for _ in range(draw(st.integers(0, 3))):
        key_start, length = slot, draw(st.integers(0, 9))
        modes = draw(st.lists(st.sampled_from(["causal", "full"]), max_size=5))
        for mode in modes:
            gen = draw(experts())
            segments.append(Segment(mode, gen, key_start, length, key_start + length))
            length += gen.size
        visibles = draw(st.lists(st.integers(0, length), max_size=2))
        kinds = st.sampled_from(["causal", "full"])
        apart += [Segment(draw(kinds), draw(experts()), key_start, visible, 0) for visible in visibles]
        slot = key_start + length + draw(st.integers(0, 3))
    for segment in apart:
        segments.append(segment._replace(write=slot))
        slot += segment.gen.size + draw(st.integers(0, 1))
    return draw(st.permutations(segments))


def expected_rows(segments: list[Segment]) -> list[tuple[bool, int, int, set[int]]]:
    """The definition. For each row in segment order: (gen, segment, slot written, slots seen)."""
    rows = []
    for number, (mode, gen, key_start, visible, write) in enumerate(segments):
        n = len(gen)
        for i in range(n):
            seen = set(range(key_start, key_start + visible))
            seen |= set(range(write, write + (i + 1 if mode == "causal" else n)))
            rows.append((bool(gen[i]), number, write + i, seen))
    return rows


block_sizes = st.integers(1, 128)


@settings(max_examples=250)
@given(segment_lists(), block_sizes)
def test_visibility_matches_the_segments(segments, block_q):
    plan = plan_reference(segments, block_q)
    rows = expected_rows(segments)
    packed = [i for i, row in enumerate(rows) if row[0]] + [i for i, row in enumerate(rows) if not row[0]]
    assert plan.G == sum(row[0] for row in rows)
    assert plan.order.tolist() == packed
    assert plan.slots.tolist() == [rows[i][2] for i in packed]
    mask = visibility(plan)
    assert [set(np.flatnonzero(seen)) for seen in mask] == [rows[i][3] for i in packed]


@settings(max_examples=250)
@given(segment_lists(), block_sizes)
def test_blocks_cover_the_rows_with_exact_limits(segments, block_q):
    plan = plan_reference(segments, block_q)
    rows = expected_rows(segments)
    next_row, previous = 0, None
    for row_start, row_end, key_start, full_end, part_end, own_start, own_end in plan.blocks.tolist():
        assert row_start == next_row < row_end <= row_start + block_q
        assert row_end <= plan.G or row_start >= plan.G, "a block holds one expert's rows"
        limits = plan.limits[row_start:row_end]
        assert (full_end, part_end) == (limits.min(), limits.max())
        for packed in range(row_start, row_end):
            segment = segments[rows[plan.order[packed]][1]]
            contiguous = segment.write == segment.key_start + segment.visible
            if contiguous:
                spans = (segment.key_start, 0, 0)
            elif segment.mode == "full":
                spans = (segment.key_start, segment.write, segment.write + len(segment.gen))
            else:
                own = (segment.key_start, segment.key_start + segment.visible) if segment.visible else (0, 0)
                spans = (segment.write, *own)
            assert (key_start, own_start, own_end) == spans, "a block never mixes contexts"
        run = (key_start, own_start, own_end, row_start < plan.G)
        if previous is not None and previous[0] == run:
            assert previous[1] == block_q, "only the last block of a run is short"
        next_row, previous = row_end, (run, row_end - row_start)
    assert next_row == len(plan.order)


@needs_extension
@settings(max_examples=400)
@given(segment_lists(), block_sizes)
def test_extension_matches_the_reference_bit_for_bit(segments, block_q):
    assert_identical(Plan(*plan_module.EXTENSION.build_plan(segments, block_q)), plan_reference(segments, block_q))


@needs_extension
@pytest.mark.parametrize("block_q", [1, 50, 128])
def test_extension_matches_the_reference_at_full_size(block_q):
    noise = [Segment("full", image(4096), start, 60 - start // 100, start + 60 - start // 100) for start in (0, 5000)]
    segments = [*noise, Segment("full", image(4096), 0, 60, 10_000), Segment("causal", und(700), 20_000, 3, 20_003)]
    assert_identical(build_plan(segments, block_q), plan_reference(segments, block_q))


@needs_extension
def test_build_plan_uses_the_extension(monkeypatch):
    monkeypatch.delattr(plan_module, "plan_reference")
    assert build_plan([TEXT]).G == 0


def test_build_plan_falls_back_to_the_reference(monkeypatch):
    monkeypatch.setattr(plan_module, "EXTENSION", None)
    assert_identical(build_plan([TEXT], 2), plan_reference([TEXT], 2))


@needs_extension
def test_extension_accepts_strided_rows_and_numpy_integers():
    gen = np.array([True, False, False, True, True, False])[::2]
    segments = [Segment("full", gen, np.int32(4), np.int64(2), np.uint8(200))]
    assert_identical(build_plan(segments, np.int64(2)), plan_reference(segments, 2))


def assert_identical(plan: Plan, other: Plan) -> None:
    for name, dtype in (("order", np.int64), ("limits", np.int32), ("slots", np.int64), ("blocks", np.int32)):
        mine, theirs = getattr(plan, name), getattr(other, name)
        assert mine.dtype == theirs.dtype == dtype
        assert mine.shape == theirs.shape
        assert mine.tobytes() == theirs.tobytes(), name
    assert plan.G == other.G
    assert plan == other


def test_plan_of_no_rows_is_empty():
    plan = build_plan([])
    assert (plan.G, plan.order.shape, plan.blocks.shape) == (0, (0,), (0, 7))
    assert visibility(plan).shape == (0, 0)
    assert visibility(plan, 8).shape == (0, 8)


def test_text_and_image_of_one_context_share_a_run():
    plan = build_plan([Segment("causal", und(3), 10, 0, 10), Segment("full", image(2), 10, 3, 13)], block_q=4)
    assert plan.G == 2
    assert plan.order.tolist() == [4, 5, 0, 1, 2, 3, 6]
    assert plan.limits.tolist() == [7, 7, 1, 2, 3, 7, 7]
    assert plan.slots.tolist() == [14, 15, 10, 11, 12, 13, 16]
    assert plan.blocks.tolist() == [[0, 2, 10, 7, 7, 0, 0], [2, 6, 10, 1, 7, 0, 0], [6, 7, 10, 7, 7, 0, 0]]


def test_causal_rows_stored_apart_see_their_whole_context():
    plan = build_plan([Segment("causal", und(3), 2, 5, 20)])
    assert plan.limits.tolist() == [1, 2, 3]
    assert plan.blocks.tolist() == [[0, 3, 20, 1, 3, 2, 7]]


def test_latents_stored_apart_need_a_second_span():
    behind = build_plan([Segment("full", image(2), 0, 5, 5)])
    elsewhere = build_plan([Segment("full", image(2), 0, 5, 6)])
    assert behind.blocks.tolist() == [[0, 2, 0, 9, 9, 0, 0], [2, 4, 0, 9, 9, 0, 0]]
    assert elsewhere.blocks.tolist() == [[0, 2, 0, 5, 5, 6, 10], [2, 4, 0, 5, 5, 6, 10]]


def test_plans_compare_by_value():
    segment = Segment("causal", und(3), 0, 0, 0)
    assert build_plan([segment]) == build_plan([segment])
    assert build_plan([segment]) != build_plan([segment], block_q=2)
    assert build_plan([segment]) != build_plan([segment._replace(key_start=1, write=1)])
    assert build_plan([segment]) != "a plan"


TEXT = Segment("causal", und(3), 0, 4, 4)


@pytest.mark.parametrize("planner", [build_plan, plan_reference], ids=["build_plan", "plan_reference"])
@pytest.mark.parametrize(
    "segments, block_q, message",
    [
        ([TEXT], 0, "block_q must be from 1 to 128, got 0"),
        ([TEXT], 129, "block_q must be from 1 to 128, got 129"),
        ([TEXT, TEXT._replace(mode="sliding")], 128, "mode of segment 1 must be causal or full, got 'sliding'"),
        ([TEXT._replace(gen=und(0))], 128, "segment 0 must have rows, got none"),
        ([TEXT._replace(gen=np.zeros(3, np.int64))], 128, "one-dimensional numpy array of bool"),
        ([TEXT._replace(gen=np.zeros((3, 1), bool))], 128, "one-dimensional numpy array of bool"),
        ([TEXT._replace(gen=[False] * 3)], 128, "one-dimensional numpy array of bool"),
        ([TEXT._replace(key_start=-1)], 128, "must not be negative, got key_start=-1, visible=4, write=4"),
        ([TEXT._replace(visible=-1)], 128, "must not be negative, got key_start=0, visible=-1, write=4"),
        ([Segment("full", und(3), 0, 4, -1)], 128, "must not be negative, got key_start=0, visible=4, write=-1"),
        ([Segment("full", und(3), 0, 4, MAX_SLOTS - 2)], 128, "segment 0 must end by slot 2147483647"),
        ([Segment("full", und(3), np.int32(MAX_SLOTS), np.int32(4), 0)], 128, "segment 0 must end by slot 2147483647"),
        ([TEXT, Segment("full", und(3), 0, 2, 2)], 128, r"got \[2, 5\) for segment 1 and \[4, 7\) for segment 0"),
        ([TEXT, TEXT], 128, r"got \[4, 7\) for segment 0 and \[4, 7\) for segment 1"),
    ],
    ids=[
        "blocks of no rows", "blocks of too many rows", "an unknown mode", "a segment of no rows",
        "experts given as integers", "experts in two dimensions", "experts in a list", "a negative key_start",
        "a negative visible",
        "a negative write", "a write past int32", "a prefix past int32", "writes that overlap",
        "the same segment twice",
    ],
)  # fmt: skip
def test_rejects_invalid_segments(segments, block_q, message, planner):
    with pytest.raises(ValueError, match=message):
        planner(segments, block_q)


def test_rejects_a_mask_narrower_than_the_plan():
    with pytest.raises(ValueError, match="slots_total must be at least 7, the slots of the plan, got 6"):
        visibility(build_plan([TEXT]), 6)


@pytest.mark.parametrize("planner", [build_plan, plan_reference], ids=["build_plan", "plan_reference"])
def test_last_slot_of_int32_is_usable(planner):
    plan = planner([Segment("full", und(3), MAX_SLOTS - 7, 4, MAX_SLOTS - 3)])
    assert plan.blocks.tolist() == [[0, 3, MAX_SLOTS - 7, 7, 7, 0, 0]]
    assert plan.slots.tolist() == [MAX_SLOTS - 3, MAX_SLOTS - 2, MAX_SLOTS - 1]


def test_environment_disables_the_extension():
    script = "import bagel_rt.runtime.plan as p; p.build_plan([]); print(p.EXTENSION, p.EXTENSION_ERROR)"
    environment = os.environ | {"BAGEL_RT_EXTENSION": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "None disabled by BAGEL_RT_EXTENSION=0\n"
