"""Edits of scenes: an instruction, the scene after the edit, and the claims that the edited image must satisfy.

An edit changes one group or the background, or adds a thing. The claims require everything else to stay unchanged and
in place. Each edit function takes (rng, before); EDITS lists the allowed numbers of groups. It returns None if the
random edit is invalid: too little room, no change, or two groups that look the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from bagel_rt.tiny.claims import Claims, claim_group, is_at
from bagel_rt.tiny.language import article, mentions_size, plural, refer, say_relation, say_size
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

_DISTANCE = 0.46  # from an added thing to the nearest thing of the group, if there is room


@dataclass(frozen=True)
class Edit:
    """An instruction, the scene after it, and the claims about the edited image."""

    text: str
    after: Scene
    claims: Claims


def _valid(things: Group, groups: int) -> bool:
    """Whether the things fit and form this number of groups; two groups must have a relation."""
    actual = groups_of(things)
    return fits(things) and len(actual) == groups and (groups == 1 or relation_between(*actual) is not None)


def _claim_as_is(scene: Scene) -> Claims:
    """Claims about everything in a scene, including positions."""
    groups = tuple(claim_group(group, at=True) for group in groups_of(scene.things))
    return Claims(groups, background=scene.background)


def _replace_group(before: Scene, group: Group, changed: Group, text: str) -> Edit | None:
    """Replace ``group`` with ``changed``; None if it does not fit or looks like the other group."""
    others = tuple(thing for thing in before.things if thing not in group)
    things = changed + others if before.things[0] in group else others + changed
    if not _valid(things, 2 if others else 1):
        return None
    after = Scene(before.background, things)
    return Edit(text, after, _claim_as_is(after))


def recolor(rng: np.random.Generator, before: Scene) -> Edit | None:
    """Change the color of a group."""
    group = pick(rng, groups_of(before.things))
    color = pick(rng, [color for color in COLORS if color != group[0].color])
    who = refer(rng, group, before)
    text = pick(rng, (f"make {who} {color}", f"paint {who} {color}", f"change the color of {who} to {color}"))
    return _replace_group(before, group, tuple(replace(thing, color=color) for thing in group), text)


def reshape(rng: np.random.Generator, before: Scene) -> Edit | None:
    """Change the shape of a group; the color stays."""
    group = pick(rng, groups_of(before.things))
    shape = pick(rng, [shape for shape in SHAPES if shape != group[0].shape])
    who, what = refer(rng, group, before), article(shape) if len(group) == 1 else plural(shape, len(group))
    text = pick(rng, (f"turn {who} into {what}", f"change {who} to {what}", f"make {who} {what}"))
    return _replace_group(before, group, tuple(replace(thing, shape=shape) for thing in group), text)


def resize(rng: np.random.Generator, before: Scene) -> Edit | None:
    """Change the size of a group of one or two things, around the same center."""
    group = pick(rng, groups_of(before.things))
    if len(group) == 3:
        return None  # three large things do not fit
    size = next(size for size in SIZES if size != group[0].size)
    word = pick(rng, ("bigger", "larger", "large") if size == "large" else ("smaller", "small"))
    scaled = _line_up_again(group, size, center_of(group))
    return _replace_group(before, group, scaled, f"make {refer(rng, group, before)} {word}")


def _line_up_again(group: Group, size: str, center: tuple[float, float]) -> Group:
    """Line up a group again, at another center or in another size, in the same order and direction."""
    first = group[0]
    vertical = len(group) > 1 and first.x == group[1].x
    return line_up((first.shape, first.color, size), len(group), center, vertical)


def remove(rng: np.random.Generator, before: Scene) -> Edit:
    """Remove one of two groups."""
    removed = pick(rng, groups_of(before.things))
    after = Scene(before.background, tuple(thing for thing in before.things if thing not in removed))
    verb = pick(rng, ("remove", "delete", "take away"))
    return Edit(f"{verb} {refer(rng, removed, before)}", after, _claim_as_is(after))


def add(rng: np.random.Generator, before: Scene) -> Edit | None:
    """Add a thing beside the only group."""
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
    with_size = mentions_size(rng, things[-1:])
    what = article(f"{say_size(rng, size)} {color} {shape}" if with_size else f"{color} {shape}")
    verb = pick(rng, ("add", "put", "draw"))
    added = claim_group(things[-1:], size=with_size)
    claims = Claims((added, claim_group(group, at=True)), relation, before.background)
    text = f"{verb} {what} {say_relation(rng, relation)} {refer(rng, group, before)}"
    return Edit(text, Scene(before.background, things), claims)


def _beside(group: Group, relation: str, size: str) -> tuple[float, float]:
    """A point ``_DISTANCE`` from the group in that direction, clamped to the border."""
    across, along = center_of(group) if relation in ("above", "below") else center_of(group)[::-1]
    ends = [thing.y if relation in ("above", "below") else thing.x for thing in group]
    room = Thing("circle", "red", size, 0, 0).reach + 0.02
    if relation in ("above", "left of"):
        along = max(min(ends) - _DISTANCE, room)
    else:
        along = min(max(ends) + _DISTANCE, 1 - room)
    across = min(max(across, room), 1 - room)
    return (across, along) if relation in ("above", "below") else (along, across)


def change_background(rng: np.random.Generator, before: Scene) -> Edit:
    """Change the background."""
    background = pick(rng, [name for name in BACKGROUNDS if name != before.background])
    ways = (
        f"make the background {background}",
        f"change the background to {background}",
        f"use {article(background)} background",
    )
    after = replace(before, background=background)
    return Edit(pick(rng, ways), after, _claim_as_is(after))


def move(rng: np.random.Generator, before: Scene) -> Edit | None:
    """Move the only group to another named place."""
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


# Edit -> allowed numbers of groups in the scene before it.
EDITS: dict[Callable[[np.random.Generator, Scene], Edit | None], tuple[int, ...]] = {
    recolor: (1, 2),
    reshape: (1, 2),
    resize: (1, 2),
    remove: (2,),
    add: (1,),
    change_background: (1, 2),
    move: (1,),
}
