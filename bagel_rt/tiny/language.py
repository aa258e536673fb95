"""Phrases for things, groups and places, and captions of scenes: lower case, no punctuation, at most 16 words.

The embedded model is trained on these texts. A changed word, or a changed order of random draws, needs new weights.
"""

import numpy as np

from bagel_rt.tiny.claims import Claims, claim_group
from bagel_rt.tiny.scene import (
    OPPOSITE,
    PLACES,
    Group,
    Scene,
    clear_relation,
    default_size,
    groups_of,
    pick,
    place_of,
    relation_between,
)

COUNT_WORDS = ("zero", "one", "two", "three", "four")
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_RELATION_WORDS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
_PLACE_WORDS = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
} | {name: (f"in the {name}", f"in the {name} corner") for name in PLACES if " " in name}
_PREFIXES = ("a picture of", "an image of", "draw", "show")


def article(noun_phrase: str) -> str:
    """Prefix a phrase with "a" or "an"."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def plural(noun: str, count: int) -> str:
    """The noun in singular or plural."""
    return noun if count == 1 else f"{noun}s"


def be(count: int) -> str:
    """ "is" or "are"."""
    return "is" if count == 1 else "are"


def say_size(rng: np.random.Generator, size: str) -> str:
    return pick(rng, _SIZE_WORDS[size])


def say_relation(rng: np.random.Generator, relation: str) -> str:
    return pick(rng, _RELATION_WORDS[relation])


def name_group(group: Group, size_word: str = "") -> str:
    """An indefinite noun phrase: "a red circle", "two small blue stars"."""
    phrase = f"{size_word} {group[0].color} {plural(group[0].shape, len(group))}".lstrip()
    return article(phrase) if len(group) == 1 else f"{COUNT_WORDS[len(group)]} {phrase}"


def say_group(rng: np.random.Generator, group: Group, size: bool) -> str:
    """Like :func:`name_group`, with or without a size; sometimes "one" in place of the article."""
    phrase = name_group(group, say_size(rng, group[0].size) if size else "")
    return f"one {phrase.split(maxsplit=1)[1]}" if len(group) == 1 and rng.random() < 0.2 else phrase


def refer(rng: np.random.Generator, group: Group, scene: Scene) -> str:
    """A definite noun phrase that identifies this group of the scene: "the circles", "the red circles"."""
    others = [other[0] for other in groups_of(scene.things) if other[0] != group[0]]
    shape, color = plural(group[0].shape, len(group)), group[0].color
    ways = [f"the {color} {shape}"]
    if all(other.shape != group[0].shape for other in others):
        ways.append(f"the {shape}")
    if all(other.color != color for other in others):
        ways.append(f"the {color} {plural('thing', len(group))}")
    return pick(rng, ways)


def describe(scene: Scene) -> str:
    """The complete description of a scene, in fixed words, upper or left group first; at most 14 words."""
    groups = groups_of(scene.things)
    if len(groups) == 2 and relation_between(*groups) in ("below", "right of"):  # possible after the edit "add"
        groups = groups[::-1]
    phrases = [name_group(group, group[0].size) for group in groups]
    if len(groups) == 1:
        return f"{phrases[0]} {_PLACE_WORDS[place_of(groups[0])][0]} on {scene.background}"
    return f"{phrases[0]} {relation_between(*groups)} {phrases[1]} on {scene.background}"


def mentions_size(rng: np.random.Generator, group: Group) -> bool:
    """Whether a text mentions the size of a group: always if it is not the default size, otherwise sometimes."""
    return group[0].size != default_size(len(group)) or rng.random() < 0.3


def _caption_of_one(rng: np.random.Generator, group: Group) -> tuple[str, Claims]:
    """A noun phrase without prefix or background."""
    size = mentions_size(rng, group)
    place: str | None = place_of(group)
    if place == "center" and rng.random() < 0.5:
        place = None
    phrase = say_group(rng, group, size)
    if place is not None:
        phrase = f"{phrase} {pick(rng, _PLACE_WORDS[place])}"
    return phrase, Claims((claim_group(group, size, place),))


def _caption_of_two(rng: np.random.Generator, groups: list[Group]) -> tuple[str, Claims]:
    """A noun phrase without prefix or background, at most 14 words."""
    first, second = groups if rng.random() < 0.5 else groups[::-1]
    relation = clear_relation(first, second)
    sizes = [mentions_size(rng, first), mentions_size(rng, second)]
    claims = Claims((claim_group(first, sizes[0]), claim_group(second, sizes[1])), relation)
    one, other = say_group(rng, first, sizes[0]), say_group(rng, second, sizes[1])
    if rng.random() < 0.3:
        them = "it" if len(first) == 1 else "them"
        return f"{one} with {other} {say_relation(rng, OPPOSITE[relation])} {them}", claims
    return f"{one} {say_relation(rng, relation)} {other}", claims


def caption(rng: np.random.Generator, scene: Scene) -> tuple[str, Claims]:
    """Draw a caption of a scene, and its claims.

    It always has color, shape and count of all things and the relation of two groups. The background, the default size
    (large; small for three things) and the place "center" are optional; other sizes and places are always mentioned.
    All images of a caption therefore differ in the background at most.
    """
    groups = groups_of(scene.things)
    phrase, claims = _caption_of_one(rng, groups[0]) if len(groups) == 1 else _caption_of_two(rng, groups)
    form = rng.random()
    if form < 0.5:
        return _with_background(rng, phrase, scene.background), Claims(claims.groups, claims.relation, scene.background)
    if form < 0.6:
        return f"there {be(claims.groups[0].count)} {phrase}", claims
    return f"{pick(rng, _PREFIXES)} {phrase}" if form < 0.8 and len(phrase.split()) <= 13 else phrase, claims


def _with_background(rng: np.random.Generator, phrase: str, background: str) -> str:
    form = rng.random()
    if form < 0.5 or len(phrase.split()) > 12:  # keeps captions within 16 words
        return f"{phrase} on {background}"
    if form < 0.8 or " with " in phrase:
        return f"{phrase} on a {background} background"
    return f"a {background} background with {phrase}"
