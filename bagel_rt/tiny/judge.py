"""Whether a picture or an answer is right: all that the example claims, and no thing more."""

from dataclasses import dataclass
from itertools import permutations
from math import dist

from PIL import Image

from bagel_rt.tiny.claims import GroupClaim, is_at
from bagel_rt.tiny.examples import Example
from bagel_rt.tiny.language import plural
from bagel_rt.tiny.scene import center_of, relation_between
from bagel_rt.tiny.sight import Seen, SeenThing, see

__all__ = ["Seen", "SeenThing", "Verdict", "judge", "judge_answer", "see"]

_MOVED = 0.08  # fractions of the side; what stays where it is may move less than that


@dataclass(frozen=True)
class Verdict:
    """Whether all is right, and, for people, what is not."""

    correct: bool
    failures: list[str]


def judge(example: Example, image: Image.Image) -> Verdict:
    """Compares a picture with the claims of a "generate" or "edit" example.

    The groups claimed must be there, exactly as many things of each, in the relation, at the place, of the size and on
    the background that the claims name; things beyond them are failures too. What was not said may be anything.

    Raises:
        ValueError: the example asks for an answer, not for a picture.
    """
    if example.task == "ask":
        raise ValueError(f"judge: the example {example.text!r} asks a question; use judge_answer")
    seen = see(image)
    failures = []
    claimed = []
    for claim in example.claims.groups:
        group = [thing for thing in seen.things if (thing.shape, thing.color) == (claim.shape, claim.color)]
        claimed.append(group)
        failures += _failures_of_group(claim, group)
    strange = [thing for thing in seen.things if not any(thing in group for group in claimed)]
    failures += [f"nobody asked for the {thing} at ({thing.x:.2f}, {thing.y:.2f})" for thing in strange]
    if example.claims.relation is not None and all(claimed):
        found = relation_between(*claimed)
        if found != example.claims.relation:
            failures.append(f"expected the first {example.claims.relation} the second, found {found}")
    if example.claims.background not in (None, seen.background):
        failures.append(f"expected a {example.claims.background} background, found {seen.background}")
    return Verdict(not failures, failures)


def _failures_of_group(claim: GroupClaim, group: list[SeenThing]) -> list[str]:
    """What is wrong with the things that have the claimed shape and colour."""
    name = f"{claim.color} {plural(claim.shape, claim.count)}"
    if len(group) != claim.count:
        return [f"expected {claim.count} {name}, found {len(group)}"]
    failures = [
        f"expected {claim.size} {name}, found a {thing}" for thing in group if claim.size not in (None, thing.size)
    ]
    x, y = center_of(group)
    if claim.place is not None and not is_at(claim.place, x, y):
        failures.append(f"expected the {name} at the {claim.place}, found ({x:.2f}, {y:.2f})")
    if claim.at is not None and (moved := _farthest_move(claim.at, group)) >= _MOVED:
        failures.append(f"expected the {name} to stay, found one {moved:.2f} of the side away")
    return failures


def _farthest_move(points: tuple[tuple[float, float], ...], group: list[SeenThing]) -> float:
    """The longest way from a claimed centre to a found one, in the best assignment."""
    found = [(thing.x, thing.y) for thing in group]
    return min(max(map(dist, points, order)) for order in permutations(found))


def judge_answer(example: Example, text: str) -> bool:
    """Whether a text is the answer; case, spaces around it and a final period do not matter.

    Raises:
        ValueError: the example asks for a picture.
    """
    if example.answer is None:
        raise ValueError(f"judge_answer: {example.text!r} is a {example.task} example and has no answer; use judge")
    return " ".join(text.lower().split()).removesuffix(".") == example.answer
