"""Decides whether an image or an answer is correct. An image must satisfy all claims and show nothing else."""

from dataclasses import dataclass
from itertools import permutations
from math import dist

from PIL import Image

from bagel_rt.tiny.claims import Claims, GroupClaim, is_at
from bagel_rt.tiny.detector import DetectedThing, detect
from bagel_rt.tiny.language import plural
from bagel_rt.tiny.scene import center_of, relation_between

_MAX_SHIFT = 0.08  # fraction of the side; a thing that shifts less than this counts as unmoved


@dataclass(frozen=True)
class Verdict:
    """Whether everything is correct, and descriptions of what is not."""

    correct: bool
    failures: list[str]


def judge(claims: Claims, image: Image.Image) -> Verdict:
    """Compare an image with claims.

    The claimed groups must be there, with the claimed count, relation, place, size and background. Any other thing is a
    failure too. Attributes without a claim may have any value.
    """
    detected = detect(image)
    failures = []
    claimed = []
    for claim in claims.groups:
        group = [thing for thing in detected.things if (thing.shape, thing.color) == (claim.shape, claim.color)]
        claimed.append(group)
        failures += _failures_of_group(claim, group)
    extra = [thing for thing in detected.things if not any(thing in group for group in claimed)]
    failures += [f"unexpected {thing} at ({thing.x:.2f}, {thing.y:.2f})" for thing in extra]
    if claims.relation is not None and all(claimed):
        relation = relation_between(*claimed)
        if relation != claims.relation:
            failures.append(f"expected the first {claims.relation} the second, found {relation}")
    if claims.background not in (None, detected.background):
        failures.append(f"expected a {claims.background} background, found {detected.background}")
    return Verdict(not failures, failures)


def _failures_of_group(claim: GroupClaim, group: list[DetectedThing]) -> list[str]:
    """Failures among the things that have the claimed shape and color."""
    name = f"{claim.color} {plural(claim.shape, claim.count)}"
    if len(group) != claim.count:
        return [f"expected {claim.count} {name}, found {len(group)}"]
    failures = [
        f"expected {claim.size} {name}, found a {thing}" for thing in group if claim.size not in (None, thing.size)
    ]
    x, y = center_of(group)
    if claim.place is not None and not is_at(claim.place, x, y):
        failures.append(f"expected the {name} at the {claim.place}, found ({x:.2f}, {y:.2f})")
    if claim.at is not None and (shift := _largest_shift(claim.at, group)) >= _MAX_SHIFT:
        failures.append(f"expected the {name} to stay in place, found a shift by {shift:.2f} of the side")
    return failures


def _largest_shift(points: tuple[tuple[float, float], ...], group: list[DetectedThing]) -> float:
    """The largest distance between a claimed and a detected center, in the best assignment."""
    centers = [(thing.x, thing.y) for thing in group]
    return min(max(map(dist, points, order)) for order in permutations(centers))


def judge_answer(expected: str, text: str) -> bool:
    """Whether a text is the expected answer. Case, whitespace and a final period are ignored."""
    return " ".join(text.lower().split()).removesuffix(".") == expected
