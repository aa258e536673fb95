"""Questions about scenes, each with one short answer.

Each question function takes (rng, scene); QUESTIONS lists the allowed numbers of groups. It returns (question, answer),
or None if the question would be ambiguous.
"""

from collections.abc import Callable

import numpy as np

from bagel_rt.tiny.language import COUNT_WORDS, article, be, describe, name_group, plural, refer, say_relation
from bagel_rt.tiny.scene import COLORS, OPPOSITE, SHAPES, Group, Scene, clear_relation, groups_of, pick, place_of

Question = tuple[str, str]


def ask_color(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Ask for the color of the things of one shape; None if they differ."""
    group = pick(rng, groups_of(scene.things))
    if any(thing.shape == group[0].shape and thing.color != group[0].color for thing in scene.things):
        return None
    noun = plural(group[0].shape, len(group))
    return f"{pick(rng, ('what', 'which'))} color {be(len(group))} the {noun}", group[0].color


def ask_shape(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Ask for the shape of the things of one color; None if they differ."""
    group = pick(rng, groups_of(scene.things))
    if any(thing.color == group[0].color and thing.shape != group[0].shape for thing in scene.things):
        return None
    noun = plural("thing", len(group))
    return f"{pick(rng, ('what', 'which'))} shape {be(len(group))} the {group[0].color} {noun}", group[0].shape


def ask_size(rng: np.random.Generator, scene: Scene) -> Question:
    """Ask for the size of a group."""
    group = pick(rng, groups_of(scene.things))
    who = refer(rng, group, scene)
    ways = (f"what size {be(len(group))} {who}", f"{be(len(group))} {who} small or large")
    return pick(rng, ways), group[0].size


def ask_count(rng: np.random.Generator, scene: Scene) -> Question:
    """Ask for the number of things of one kind, which may be zero, or of all things."""
    if rng.random() < 0.2:
        return pick(rng, ("how many things are there", "how many shapes are there")), COUNT_WORDS[len(scene.things)]
    shape, color = _kind(rng, scene, present=rng.random() < 0.75)
    return f"how many {_name(shape, color, 2)} are there", COUNT_WORDS[_count(scene, shape, color)]


def ask_existence(rng: np.random.Generator, scene: Scene) -> Question:
    """Ask whether things of one kind exist; yes and no are equally likely."""
    present = rng.random() < 0.5
    shape, color = _kind(rng, scene, present)
    ways = (f"is there {article(_name(shape, color, 1))}", f"are there any {_name(shape, color, 2)}")
    return pick(rng, ways), "yes" if present else "no"


def ask_which(rng: np.random.Generator, scene: Scene) -> Question:
    """Ask which of three kinds of things exist; the answer repeats each kind, followed by yes or no.

    Training only. The model learns existence from this question. With a single word as the answer, the kind in question
    is several tokens back, and a model of this size guessed yes or no from the form of the question.
    """
    kinds: dict[str, bool] = {}
    while len(kinds) < 3:
        present = rng.random() < 0.5
        kinds.setdefault(_name(*_kind(rng, scene, present), 2), present)
    first, second, third = kinds
    answer = ", ".join(f"{name} {'yes' if present else 'no'}" for name, present in kinds.items())
    return f"are there {first}, {second} or {third}", answer


def _name(shape: str | None, color: str | None, count: int) -> str:
    """ "red circles", "circles" or "red things"."""
    return " ".join([*([color] if color else []), plural(shape or "thing", count)])


def _count(scene: Scene, shape: str | None, color: str | None) -> int:
    """The number of things with this shape and color; None matches all."""
    return sum(shape in (None, thing.shape) and color in (None, thing.color) for thing in scene.things)


def _kind(rng: np.random.Generator, scene: Scene, present: bool) -> tuple[str | None, str | None]:
    """Draw a (shape, color), either of which may be None, that is present in the scene or absent from it.

    An absent kind often shares its shape or its color with a thing in the scene, so that both matter for the answer.
    """
    form = rng.random()
    while True:
        one, other = pick(rng, scene.things), pick(rng, scene.things)
        shape, color = one.shape, one.color if present else other.color
        if not present and rng.random() < 0.75:
            shape, color = (pick(rng, SHAPES), color) if rng.random() < 0.5 else (shape, pick(rng, list(COLORS)))
        kind = (shape, color) if form < 0.5 else (shape, None) if form < 0.75 else (None, color)
        if (_count(scene, *kind) > 0) == present:
            return kind


def ask_background(rng: np.random.Generator, scene: Scene) -> Question:
    """Ask for the color of the background."""
    return f"{pick(rng, ('what', 'which'))} color is the background", scene.background


def ask_place(rng: np.random.Generator, scene: Scene) -> Question:
    """Ask for the place of the only group."""
    (group,) = groups_of(scene.things)
    return f"where {be(len(group))} {refer(rng, group, scene)}", place_of(group)


def _related(rng: np.random.Generator, scene: Scene) -> tuple[Group, Group, str]:
    """Two groups in random order, and the relation of the first to the second."""
    groups = groups_of(scene.things)
    first, second = groups if rng.random() < 0.5 else groups[::-1]
    return first, second, clear_relation(first, second)


def ask_relation(rng: np.random.Generator, scene: Scene) -> Question:
    """Ask whether a relation or its opposite holds; yes and no are equally likely.

    The other axis is never asked about: of two things side by side, one may be slightly higher, which is ambiguous.
    """
    first, second, relation = _related(rng, scene)
    holds = rng.random() < 0.5
    asked = relation if holds else OPPOSITE[relation]
    who, whom = refer(rng, first, scene), refer(rng, second, scene)
    return f"{be(len(first))} {who} {say_relation(rng, asked)} {whom}", "yes" if holds else "no"


def ask_side(rng: np.random.Generator, scene: Scene) -> Question:
    """Ask on which of two sides of a group the other is. Training only; more informative than a yes/no question."""
    first, second, relation = _related(rng, scene)
    sides = ["above", "below"] if relation in ("above", "below") else ["left", "right"]
    rng.shuffle(sides)
    of = "" if "above" in sides else " of"
    who, whom = refer(rng, first, scene), refer(rng, second, scene)
    return f"{be(len(first))} {who} {' or '.join(sides)}{of} {whom}", relation.removesuffix(" of")


def ask_neighbor(rng: np.random.Generator, scene: Scene) -> Question:
    """Ask what is on one side of a group: the other group, or nothing."""
    first, second, relation = _related(rng, scene)
    asked = relation if rng.random() < 0.75 else OPPOSITE[relation]
    answer = name_group(first) if asked == relation else "nothing"
    return f"what is {say_relation(rng, asked)} {refer(rng, second, scene)}", answer


def ask_description(rng: np.random.Generator, scene: Scene) -> Question:
    """Ask for the complete description."""
    return pick(rng, ("describe the picture", "what is in the picture")), describe(scene)


# Question -> allowed numbers of groups in the scene.
QUESTIONS: dict[Callable[[np.random.Generator, Scene], Question | None], tuple[int, ...]] = {
    ask_color: (1, 2),
    ask_shape: (1, 2),
    ask_size: (1, 2),
    ask_count: (1, 2),
    ask_existence: (1, 2),
    ask_background: (1, 2),
    ask_place: (1,),
    ask_relation: (2,),
    ask_neighbor: (2,),
    ask_description: (1, 2),
}
