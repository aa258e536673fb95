"""Questions about scenes, each with one short answer.

Each function here takes (rng, scene), with as many groups as QUESTIONS says, and returns (question, answer), or None
where the question would have more than one answer.
"""

from collections.abc import Callable

import numpy as np

from bagel_rt.tiny.language import COUNT_WORDS, article, be, describe, name_group, plural, refer, say_relation
from bagel_rt.tiny.scene import COLORS, OPPOSITE, SHAPES, Group, Scene, groups_of, pick, place_of, relation_between

Question = tuple[str, str]


def ask_color(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Of the things of one shape, if they agree."""
    group = pick(rng, groups_of(scene.things))
    if any(thing.shape == group[0].shape and thing.color != group[0].color for thing in scene.things):
        return None
    noun = plural(group[0].shape, len(group))
    return f"{pick(rng, ('what', 'which'))} color {be(len(group))} the {noun}", group[0].color


def ask_shape(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Of the things of one colour, if they agree."""
    group = pick(rng, groups_of(scene.things))
    if any(thing.color == group[0].color and thing.shape != group[0].shape for thing in scene.things):
        return None
    noun = plural("thing", len(group))
    return f"{pick(rng, ('what', 'which'))} shape {be(len(group))} the {group[0].color} {noun}", group[0].shape


def ask_size(rng: np.random.Generator, scene: Scene) -> Question:
    """Small or large."""
    group = pick(rng, groups_of(scene.things))
    who = refer(rng, group, scene)
    ways = (f"what size {be(len(group))} {who}", f"{be(len(group))} {who} small or large")
    return pick(rng, ways), group[0].size


def ask_count(rng: np.random.Generator, scene: Scene) -> Question:
    """Of a kind of things, now and then of one that is not there, or of all things."""
    if rng.random() < 0.2:
        return pick(rng, ("how many things are there", "how many shapes are there")), COUNT_WORDS[len(scene.things)]
    shape, color = _kind(rng, scene, present=rng.random() < 0.75)
    return f"how many {_name(shape, color, 2)} are there", COUNT_WORDS[_count(scene, shape, color)]


def ask_existence(rng: np.random.Generator, scene: Scene) -> Question:
    """Of a kind of things; as often no as yes."""
    present = rng.random() < 0.5
    shape, color = _kind(rng, scene, present)
    ways = (f"is there {article(_name(shape, color, 1))}", f"are there any {_name(shape, color, 2)}")
    return pick(rng, ways), "yes" if present else "no"


def ask_which(rng: np.random.Generator, scene: Scene) -> Question:
    """Of three kinds of things, whether each is there. The answer says each again, and whether it is there after that.

    Only for training: whether something is there is learnt from this. Where one word is the whole answer the
    thing asked of is several tokens back, and a model of this size said "yes" and "no" by the form of the question.
    """
    asked: dict[str, bool] = {}
    while len(asked) < 3:
        present = rng.random() < 0.5
        asked.setdefault(_name(*_kind(rng, scene, present), 2), present)
    first, second, third = asked
    answer = ", ".join(f"{name} {'yes' if present else 'no'}" for name, present in asked.items())
    return f"are there {first}, {second} or {third}", answer


def _name(shape: str | None, color: str | None, count: int) -> str:
    """ "red circles", "circles" or "red things"."""
    return " ".join([*([color] if color else []), plural(shape or "thing", count)])


def _count(scene: Scene, shape: str | None, color: str | None) -> int:
    """How many things have the shape and the colour, where given."""
    return sum(shape in (None, thing.shape) and color in (None, thing.color) for thing in scene.things)


def _kind(rng: np.random.Generator, scene: Scene, present: bool) -> tuple[str | None, str | None]:
    """A shape, a colour or both (half the time) that things of the scene have, or that none has.

    An absent kind often shares the shape or the colour of something there, so that both must be looked at.
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
    """Its colour."""
    return f"{pick(rng, ('what', 'which'))} color is the background", scene.background


def ask_place(rng: np.random.Generator, scene: Scene) -> Question:
    """Of a single group."""
    (group,) = groups_of(scene.things)
    return f"where {be(len(group))} {refer(rng, group, scene)}", place_of(group)


def _related(rng: np.random.Generator, scene: Scene) -> tuple[Group, Group, str]:
    """Two groups in random order, and how the first lies to the second."""
    groups = groups_of(scene.things)
    first, second = groups if rng.random() < 0.5 else groups[::-1]
    return first, second, relation_between(first, second)


def ask_relation(rng: np.random.Generator, scene: Scene) -> Question:
    """Whether a group lies so or the other way round; as often no as yes.

    "above" is not asked of things side by side: one is mostly a little higher, and who knows what counts.
    """
    first, second, relation = _related(rng, scene)
    true = rng.random() < 0.5
    asked = relation if true else OPPOSITE[relation]
    who, whom = refer(rng, first, scene), refer(rng, second, scene)
    return f"{be(len(first))} {who} {say_relation(rng, asked)} {whom}", "yes" if true else "no"


def ask_side(rng: np.random.Generator, scene: Scene) -> Question:
    """On which of two sides of a group the other one is. Only for training, where it says more than a yes or no."""
    first, second, relation = _related(rng, scene)
    sides = ["above", "below"] if relation in ("above", "below") else ["left", "right"]
    rng.shuffle(sides)
    of = "" if "above" in sides else " of"
    who, whom = refer(rng, first, scene), refer(rng, second, scene)
    return f"{be(len(first))} {who} {' or '.join(sides)}{of} {whom}", relation.removesuffix(" of")


def ask_neighbor(rng: np.random.Generator, scene: Scene) -> Question:
    """What is on one side of a group: the other one, or nothing."""
    first, second, relation = _related(rng, scene)
    asked = relation if rng.random() < 0.75 else OPPOSITE[relation]
    answer = name_group(first) if asked == relation else "nothing"
    return f"what is {say_relation(rng, asked)} {refer(rng, second, scene)}", answer


def ask_description(rng: np.random.Generator, scene: Scene) -> Question:
    """Of everything."""
    return pick(rng, ("describe the picture", "what is in the picture")), describe(scene)


# Each question with the numbers of groups that a scene may have.
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
