"""Edits of scenes: an instruction, the scene after it, and what must then be true of the picture.

An edit changes one group, or the background, or adds a thing; all else stays as and where it is, and the claims
say so. Each function here takes (rng, before), with as many groups as EDITS says, and returns None where what it drew
is impossible: too little room, no change, or two groups that look the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from bagel_rt.tiny.claims import Claims, claim_group, is_at
from bagel_rt.tiny.language import article, plural, refer, say_relation, say_size, says_size
from bagel_rt.tiny.scene import (
    BACKGROUNDS,
    COLORS,
    OPPOSITE,
    PLACES,
    SHAPES,
    SIZES,
    Group,
    Scene,
    Thing,
    anchor,
    center_of,
    fits,
    groups_of,
    line_up,
    pick,
    relation_between,
)

_APART = 0.46  # from an added thing to the nearest of the group, where there is room


@dataclass(frozen=True)
class Edit:
    """An instruction, the scene it leads to, and what it claims of the picture."""

    text: str
    after: Scene
    claims: Claims


def _valid(things: Group, groups: int) -> bool:
    """Whether the things fit and are still so many groups, with a relation if they are two."""
    found = groups_of(things)
    return fits(things) and len(found) == groups and (groups == 1 or relation_between(*found) is not None)


def _claim_as_is(scene: Scene) -> Claims:
    """Everything of a scene, positions too."""
    groups = tuple(claim_group(group, at=True) for group in groups_of(scene.things))
    return Claims(groups, background=scene.background)


def _replace_group(before: Scene, group: Group, changed: Group, text: str) -> Edit | None:
    """The scene with ``changed`` for ``group``, unless it then takes too much room or looks like the other group."""
    others = tuple(thing for thing in before.things if thing not in group)
    things = changed + others if before.things[0] in group else others + changed
    if not _valid(things, 2 if others else 1):
        return None
    after = Scene(before.background, things)
    return Edit(text, after, _claim_as_is(after))


def recolor(rng: np.random.Generator, before: Scene) -> Edit | None:
    """A group gets another colour."""
    group = pick(rng, groups_of(before.things))
    color = pick(rng, [color for color in COLORS if color != group[0].color])
    who = refer(rng, group, before)
    text = pick(rng, (f"make {who} {color}", f"paint {who} {color}", f"change the color of {who} to {color}"))
    return _replace_group(before, group, tuple(replace(thing, color=color) for thing in group), text)


def reshape(rng: np.random.Generator, before: Scene) -> Edit | None:
    """A group gets another shape and keeps its colour."""
    group = pick(rng, groups_of(before.things))
    shape = pick(rng, [shape for shape in SHAPES if shape != group[0].shape])
    who, what = refer(rng, group, before), article(shape) if len(group) == 1 else plural(shape, len(group))
    text = pick(rng, (f"turn {who} into {what}", f"change {who} to {what}", f"make {who} {what}"))
    return _replace_group(before, group, tuple(replace(thing, shape=shape) for thing in group), text)


def resize(rng: np.random.Generator, before: Scene) -> Edit | None:
    """One or two things become small or large, on cells around those that they had."""
    group = pick(rng, groups_of(before.things))
    if len(group) == 3:
        return None  # three large things fit nowhere
    size = next(size for size in SIZES if size != group[0].size)
    word = pick(rng, ("bigger", "larger", "large") if size == "large" else ("smaller", "small"))
    scaled = _line_up_again(group, size, center_of(group))
    return _replace_group(before, group, scaled, f"make {refer(rng, group, before)} {word}")


def _line_up_again(group: Group, size: str, center: tuple[float, float]) -> Group:
    """The things of a group in their order at another place, or of another size."""
    first = group[0]
    vertical = len(group) > 1 and first.x == group[1].x
    return line_up((first.shape, first.color, size), len(group), center, vertical)


def remove(rng: np.random.Generator, before: Scene) -> Edit:
    """One of two groups goes."""
    gone = pick(rng, groups_of(before.things))
    after = Scene(before.background, tuple(thing for thing in before.things if thing not in gone))
    verb = pick(rng, ("remove", "delete", "take away"))
    return Edit(f"{verb} {refer(rng, gone, before)}", after, _claim_as_is(after))


def add(rng: np.random.Generator, before: Scene) -> Edit | None:
    """One more thing, beside the only group."""
    (group,) = groups_of(before.things)
    relation = pick(rng, list(OPPOSITE))
    kinds = [
        (shape, color) for shape in SHAPES for color in COLORS if (shape, color) != (group[0].shape, group[0].color)
    ]
    shape, color = pick(rng, kinds)
    size = pick(rng, list(SIZES))
    things = group + line_up((shape, color, size), 1, _beside(group, relation, size))
    if not _valid(things, 2) or relation_between(things[-1:], group) != relation:
        return None
    say = says_size(rng, things[-1:])
    what = article(f"{say_size(rng, size)} {color} {shape}" if say else f"{color} {shape}")
    verb = pick(rng, ("add", "put", "draw"))
    added = claim_group(things[-1:], size=say)
    claims = Claims((added, claim_group(group, at=True)), relation, before.background)
    text = f"{verb} {what} {say_relation(rng, relation)} {refer(rng, group, before)}"
    return Edit(text, Scene(before.background, things), claims)


def _beside(group: Group, relation: str, size: str) -> tuple[float, float]:
    """A point ``_APART`` from the group in that direction, or as far as the border lets it."""
    across, along = center_of(group) if relation in ("above", "below") else center_of(group)[::-1]
    ends = [thing.y if relation in ("above", "below") else thing.x for thing in group]
    room = Thing("circle", "red", size, 0, 0).reach + 0.02
    along = max(min(ends) - _APART, room) if relation in ("above", "left of") else min(max(ends) + _APART, 1 - room)
    across = min(max(across, room), 1 - room)
    return (across, along) if relation in ("above", "below") else (along, across)


def change_background(rng: np.random.Generator, before: Scene) -> Edit:
    """Another background behind the same things."""
    background = pick(rng, [name for name in BACKGROUNDS if name != before.background])
    ways = (
        f"make the background {background}",
        f"change the background to {background}",
        f"use {article(background)} background",
    )
    after = replace(before, background=background)
    return Edit(pick(rng, ways), after, _claim_as_is(after))


def move(rng: np.random.Generator, before: Scene) -> Edit | None:
    """The only group goes to a named place where it is not yet."""
    (group,) = groups_of(before.things)
    place = pick(rng, list(PLACES))
    x, y = center_of(group)
    if is_at(place, x, y):
        return None
    things = _line_up_again(group, group[0].size, anchor(place))
    if not _valid(things, 1) or not is_at(place, *center_of(things)):
        return None
    where = f"{place} side" if place in ("left", "right") else f"{place} corner" if " " in place else place
    claims = Claims((claim_group(things, place=place),), background=before.background)
    text = f"{pick(rng, ('move', 'put'))} {refer(rng, group, before)} {{}} the {where}"
    preposition = "to" if text.startswith("move") else "in" if place == "center" or " " in place else "at"
    return Edit(text.format(preposition), Scene(before.background, things), claims)


# Each edit with the numbers of groups that a scene may have before it.
EDITS: dict[Callable[[np.random.Generator, Scene], Edit | None], tuple[int, ...]] = {
    recolor: (1, 2),
    reshape: (1, 2),
    resize: (1, 2),
    remove: (2,),
    add: (1,),
    change_background: (1, 2),
    move: (1,),
}
