"""Machine-checkable claims of a text about an image. None means that the text does not specify the attribute."""

from dataclasses import dataclass

from bagel_rt.tiny.scene import PLACES, Group

_LOW, _HIGH = 0.4, 0.6


@dataclass(frozen=True)
class GroupClaim:
    """The image has exactly ``count`` things of this shape and color.

    Attributes:
        size: the size of all of them.
        place: the named place of their mean position.
        at: their centers (x, y), in any order; for things that an edit must not move.
    """

    count: int
    shape: str
    color: str
    size: str | None = None
    place: str | None = None
    at: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True)
class Claims:
    """All groups in the image, the relation of the first to the second, and the background."""

    groups: tuple[GroupClaim, ...] = ()
    relation: str | None = None
    background: str | None = None


def claim_group(group: Group, size: bool = True, place: str | None = None, at: bool = False) -> GroupClaim:
    """The claim that is true of a group of a scene, optionally with its size, place and positions."""
    first = group[0]
    positions = tuple((thing.x, thing.y) for thing in group) if at else None
    return GroupClaim(len(group), first.shape, first.color, first.size if size else None, place, positions)


def is_at(place: str, x: float, y: float) -> bool:
    """Whether a point is at a named place. "left" does not constrain y; "center" constrains both axes."""
    column, row = PLACES[place]
    if place == "center":
        return 1 / 3 < x < 2 / 3 and 1 / 3 < y < 2 / 3
    sides = {0: lambda at: at < _LOW, 1: lambda at: True, 2: lambda at: at > _HIGH}
    return sides[column](x) and sides[row](y)
