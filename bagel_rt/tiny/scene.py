"""Scenes of colored shapes, their random generation, and the train/test split.

A scene is a plain background with one or two groups of objects. Objects are called things, as in the texts that the
model reads and writes. A group is one to three things of the same shape, color and size, in a row or a column. A
single group is at a named place (the center, a side, a corner). If there are two groups, one is above or left of the
other. They always differ in color or shape, so "the red circle" is unambiguous. Counts, sizes and the place or
relation determine every position.

Lengths are fractions of the image side; x points right and y down. Things are aligned to a grid of 8 x 8 cells: a small
thing covers 2 x 2 cells, a large one 3 x 3. With one patch per cell there are few different patches to learn, so a
small model is enough.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol, TypeVar

import numpy as np

from bagel_rt.validation import check, invalid, one_of

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (215, 25, 35),
    "green": (25, 155, 60),
    "blue": (35, 85, 220),
    "yellow": (255, 225, 40),
    "orange": (255, 130, 0),
    "purple": (130, 30, 170),
    "pink": (255, 130, 190),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (18, 18, 22), "grey": (128, 128, 128), "beige": (232, 212, 172)}
SIZES = {"small": 0.095, "large": 0.15}  # radius of a circle; render.OUTLINES scales other shapes to it
CELLS = {"small": 2, "large": 3}  # side of a thing in cells
GRID = 8  # side of an image in cells
PLACES = {  # name -> (column, row): 0 is left or top, 1 the middle, 2 right or bottom
    "center": (1, 1),
    "left": (0, 1),
    "right": (2, 1),
    "top": (1, 0),
    "bottom": (1, 2),
    "top left": (0, 0),
    "top right": (2, 0),
    "bottom left": (0, 2),
    "bottom right": (2, 2),
}
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
MAX_THINGS = 4

REACH = 1.15  # maximum extent of any outline from its center along x or y, in radii
_ANCHORS = (0.25, 0.5, 0.75)
_BORDER = 0.015
_GAP = 0.025
_ONE_GROUP = ((1, "small"), (1, "large"), (2, "small"), (2, "large"), (3, "small"))  # three large ones do not fit
_TWO_GROUPS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))

T = TypeVar("T")


class Positioned(Protocol):
    """Anything with a position: a thing of a scene, or one detected in an image."""

    @property
    def x(self) -> float: ...

    @property
    def y(self) -> float: ...


@dataclass(frozen=True)
class Thing:
    """One shape. (x, y) is the center of its bounding box."""

    shape: str
    color: str
    size: str
    x: float
    y: float

    @property
    def reach(self) -> float:
        """Half the side of the square that holds this thing, whatever its shape."""
        return REACH * SIZES[self.size]


Group = tuple[Thing, ...]


@dataclass(frozen=True)
class Scene:
    """A background and the things on it; things of one group are adjacent."""

    background: str
    things: Group


def pick(rng: np.random.Generator, options: tuple[T, ...] | list[T]) -> T:
    """Draw one of the options uniformly (``rng.choice`` is ten times slower)."""
    return options[int(rng.random() * len(options))]


def groups_of(things: Group) -> list[Group]:
    """Group things by shape and color, in order of first appearance."""
    groups: dict[tuple[str, str], list[Thing]] = {}
    for thing in things:
        groups.setdefault((thing.shape, thing.color), []).append(thing)
    return [tuple(group) for group in groups.values()]


def center_of(group: Sequence[Positioned]) -> tuple[float, float]:
    """The mean position (x, y)."""
    return sum(thing.x for thing in group) / len(group), sum(thing.y for thing in group) / len(group)


def place_of(group: Sequence[Positioned]) -> str:
    """The named place nearest to a group's center."""
    column, row = (0 if at < 0.375 else 2 if at > 0.625 else 1 for at in center_of(group))
    return next(name for name, cell in PLACES.items() if cell == (column, row))


def relation_between(first: Sequence[Positioned], second: Sequence[Positioned]) -> str | None:
    """The relation of ``first`` to ``second``, a key of OPPOSITE; None if the groups are not clearly separated.

    The groups are compared along the axis on which their centers are further apart. Along it, all things of one group
    must be centerd at least 0.08 before all things of the other.
    """
    (x, y), (other_x, other_y) = center_of(first), center_of(second)
    names = ("above", "below") if abs(y - other_y) > abs(x - other_x) else ("left of", "right of")
    axis = "y" if names[0] == "above" else "x"
    low, high = [getattr(thing, axis) for thing in first], [getattr(thing, axis) for thing in second]
    if max(low) + 0.08 <= min(high):
        return names[0]
    return names[1] if max(high) + 0.08 <= min(low) else None


def clear_relation(first: Group, second: Group) -> str:
    """The relation of two groups that are clearly separated, as those of every scene.

    Raises:
        ValueError: they are not.
    """
    relation = relation_between(first, second)
    if relation is None:
        raise invalid("the groups", (first, second), "above, below, left of or right of each other")
    return relation


def fits(things: Group) -> bool:
    """Whether there are at most MAX_THINGS things, all inside the border and separated by at least the gap."""
    inside = all(
        min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) - thing.reach
        > _BORDER - 1e-6  # tolerance: large things touch the border
        for thing in things
    )
    return (
        inside
        and len(things) <= MAX_THINGS
        and all(
            max(abs(one.x - other.x), abs(one.y - other.y)) >= one.reach + other.reach + _GAP
            for one, other in combinations(things, 2)
        )
    )


def combination(scene: Scene) -> tuple[str | int, ...]:
    """The attributes that decide whether a scene is for training or testing; the upper or left group comes first.

    Raises:
        ValueError: the scene does not have one group, or two groups with a relation.
    """
    groups = groups_of(scene.things)
    kinds = [(len(group), group[0].color, group[0].shape) for group in groups]
    if len(groups) == 1:
        return (*kinds[0], groups[0][0].size, scene.background, place_of(groups[0]))
    relation = relation_between(*groups) if len(groups) == 2 else None
    if relation is None:
        raise invalid("scene.things", scene.things, "one group, or two groups, one above or left of the other")
    if relation in ("below", "right of"):
        kinds, relation = kinds[::-1], OPPOSITE[relation]
    return (*kinds[0], relation, *kinds[1])


def split_of(scene: Scene) -> str:
    """ "test" for a tenth of all combinations, else "train". Must never change: released models depend on it."""
    digest = hashlib.blake2b(repr(combination(scene)).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") % 10 == 0 else "train"


def default_size(count: int) -> str:
    """The default size of a group of ``count`` things: the largest that fits."""
    return "large" if count < 3 else "small"


def line_up(
    kind: tuple[str, str, str], count: int, center: tuple[float, float], vertical: bool = False
) -> tuple[Thing, ...]:
    """Place ``count`` things of a kind (shape, color, size) in a row or a column of cells, around a center.

    The row or column is shifted to stay inside the grid.
    """
    cells = CELLS[kind[2]]
    along, across = center[::-1] if vertical else center
    first, row = _cell(along, cells * count), _cell(across, cells)
    places = [((first + cells * (index + 0.5)) / GRID, (row + cells / 2) / GRID) for index in range(count)]
    return tuple(Thing(*kind, *(place[::-1] if vertical else place)) for place in places)


def _cell(center: float, cells: int) -> int:
    """The first of ``cells`` adjacent cells around a center, clamped to the grid."""
    return min(max(round(center * GRID - cells / 2), 0), GRID - cells)


def anchor(place: str) -> tuple[float, float]:
    """The position (x, y) of a place."""
    column, row = PLACES[place]
    return _ANCHORS[column], _ANCHORS[row]


def _one_group(rng: np.random.Generator) -> Group:
    count, size = pick(rng, _ONE_GROUP)
    places = list(PLACES) if count == 1 else list(PLACES)[:5]  # rows and columns do not fit into corners
    place = "center" if rng.random() < 0.25 else pick(rng, places)
    kind = (pick(rng, SHAPES), pick(rng, list(COLORS)), size)
    return line_up(kind, count, anchor(place), vertical=place in ("left", "right"))


def _two_groups(rng: np.random.Generator) -> Group:
    beside = rng.random() < 0.5
    counts = pick(rng, _TWO_GROUPS)
    kinds = [(shape, color) for shape in SHAPES for color in COLORS]
    first = int(rng.random() * len(kinds))
    second = (first + 1 + int(rng.random() * (len(kinds) - 1))) % len(kinds)  # uniform over the other kinds
    things: Group = ()
    for kind, count, along in zip((kinds[first], kinds[second]), counts, _ANCHORS[::2], strict=True):
        size = "small" if default_size(count) == "small" else pick(rng, list(SIZES))
        center = (along, 0.5) if beside else (0.5, along)
        things += line_up((*kind, size), count, center, beside)
    return things


def draw_scene(rng: np.random.Generator, groups: int | None = None) -> Scene:
    """Draw a random scene with one or two groups. With ``groups=None`` the number is random too."""
    if groups is None:
        groups = 1 if rng.random() < 0.5 else 2
    check("groups", groups, one_of((1, 2)))
    things = _one_group(rng) if groups == 1 else _two_groups(rng)
    return Scene(pick(rng, list(BACKGROUNDS)), things)
