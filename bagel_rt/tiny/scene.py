"""The world of coloured shapes: what a scene is, which scenes there are, and which of them are kept for tests.

A scene is a plain background with one or two groups. A group is one to three equal things, in a row or a column.
A single group stands at a named place (the centre, a side, a corner); of two groups one is above or left of the
other. Two groups never agree in both colour and shape, so "the red circle" has one meaning in every scene. What is of
which number, size and place decides every position.

Lengths are fractions of the picture's side; x grows to the right and y downwards. Things stand on a grid of 8 x 8
cells, a small one on 2 x 2 of them, a large one on 3 x 3. So a model that sees and draws in patches of a cell has to
know few of them, and can be small.
"""

import hashlib
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np

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
SIZES = {"small": 0.095, "large": 0.15}  # the radius of a circle; render.OUTLINES says how the others compare
CELLS = {"small": 2, "large": 3}  # that a thing takes, each way
GRID = 8  # cells each way
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
MOST_THINGS = 4

REACH = 1.15  # no outline reaches further than this, in radii, from its centre along x or y
_ANCHORS = (0.25, 0.5, 0.75)
_BORDER = 0.015
_GAP = 0.025
_ONE_GROUP = ((1, "small"), (1, "large"), (2, "small"), (2, "large"), (3, "small"))  # three large ones do not fit
_TWO_GROUPS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))

T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """One shape. (x, y) is the centre of its bounding box."""

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
    """A background and things on it; those of one group follow each other."""

    background: str
    things: Group


def pick(rng: np.random.Generator, options: tuple[T, ...] | list[T]) -> T:
    """One of the options, all equally likely (``rng.choice`` takes ten times as long)."""
    return options[int(rng.random() * len(options))]


def groups_of(things: Group) -> list[Group]:
    """Things that agree in shape and colour, in the order of their first one."""
    groups: dict[tuple[str, str], list[Thing]] = {}
    for thing in things:
        groups.setdefault((thing.shape, thing.color), []).append(thing)
    return [tuple(group) for group in groups.values()]


def center_of(group) -> tuple[float, float]:
    """The mean position (x, y) of things; anything with an ``x`` and a ``y`` will do."""
    return sum(thing.x for thing in group) / len(group), sum(thing.y for thing in group) / len(group)


def place_of(group) -> str:
    """The named place nearest to a group's centre."""
    column, row = (0 if at < 0.375 else 2 if at > 0.625 else 1 for at in center_of(group))
    return next(name for name, cell in PLACES.items() if cell == (column, row))


def relation_between(first, second) -> str | None:
    """How ``first`` lies to ``second``: a key of OPPOSITE, or None where neither axis separates the groups clearly.

    All things of one group must be past all of the other along the axis, by 0.08, and the centres further apart along
    it than across.
    """
    (x, y), (other_x, other_y) = center_of(first), center_of(second)
    names = ("above", "below") if abs(y - other_y) > abs(x - other_x) else ("left of", "right of")
    axis = "y" if names[0] == "above" else "x"
    low, high = [getattr(thing, axis) for thing in first], [getattr(thing, axis) for thing in second]
    if max(low) + 0.08 <= min(high):
        return names[0]
    return names[1] if max(high) + 0.08 <= min(low) else None


def fits(things: Group) -> bool:
    """Whether all things are inside the border and apart from each other, and not too many."""
    inside = all(
        min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) - thing.reach > _BORDER - 1e-6  # large ones touch it
        for thing in things
    )
    return (
        inside
        and len(things) <= MOST_THINGS
        and all(
            max(abs(one.x - other.x), abs(one.y - other.y)) >= one.reach + other.reach + _GAP
            for one, other in combinations(things, 2)
        )
    )


def combination(scene: Scene) -> tuple:
    """What of a scene decides its split; of two groups, the upper or left one comes first.

    Raises:
        ValueError: the scene is not of this world (no things, three kinds of things, groups without a relation).
    """
    groups = groups_of(scene.things)
    kinds = [(len(group), group[0].color, group[0].shape) for group in groups]
    if len(groups) == 1:
        return (*kinds[0], groups[0][0].size, scene.background, place_of(groups[0]))
    relation = relation_between(*groups) if len(groups) == 2 else None
    if relation is None:
        raise ValueError(
            f"a scene has one group, or two of which one is above or left of the other; these things are {scene.things}"
        )
    if relation in ("below", "right of"):
        kinds, relation = kinds[::-1], OPPOSITE[relation]
    return (*kinds[0], relation, *kinds[1])


def split_of(scene: Scene) -> str:
    """ "test" for a tenth of all combinations, else "train"; the same on every machine and in every version."""
    digest = hashlib.blake2b(repr(combination(scene)).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") % 10 == 0 else "train"


def usual_size(count: int) -> str:
    """The size of so many things where nothing is said: as large as they fit."""
    return "large" if count < 3 else "small"


def line_up(
    kind: tuple[str, str, str], count: int, center: tuple[float, float], vertical: bool = False
) -> tuple[Thing, ...]:
    """``count`` things of a kind (shape, color, size) side by side or one below the other, on the cells next to a
    centre that leave them inside."""
    cells = CELLS[kind[2]]
    along, across = center[::-1] if vertical else center
    first, row = _cell(along, cells * count), _cell(across, cells)
    places = [((first + cells * (index + 0.5)) / GRID, (row + cells / 2) / GRID) for index in range(count)]
    return tuple(Thing(*kind, *(place[::-1] if vertical else place)) for place in places)


def _cell(center: float, cells: int) -> int:
    """The first of so many cells around a centre."""
    return min(max(round(center * GRID - cells / 2), 0), GRID - cells)


def anchor(place: str) -> tuple[float, float]:
    """The middle of a place."""
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
    second = (first + 1 + int(rng.random() * (len(kinds) - 1))) % len(kinds)  # any but the first
    things: Group = ()
    for kind, count, along in zip((kinds[first], kinds[second]), counts, _ANCHORS[::2], strict=True):
        size = "small" if usual_size(count) == "small" else pick(rng, list(SIZES))
        center = (along, 0.5) if beside else (0.5, along)
        things += line_up((*kind, size), count, center, beside)
    return things


def draw_scene(rng: np.random.Generator, groups: int | None = None) -> Scene:
    """A random scene of one or two groups (by default either, equally often)."""
    if groups is None:
        groups = 1 if rng.random() < 0.5 else 2
    if groups not in (1, 2):
        raise ValueError(f"groups={groups}, but a scene has 1 or 2")
    things = _one_group(rng) if groups == 1 else _two_groups(rng)
    return Scene(pick(rng, list(BACKGROUNDS)), things)
