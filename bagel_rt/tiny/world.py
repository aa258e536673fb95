"""The words that the embedded model was trained on, and a hint for prompts that use others."""

import re
from collections.abc import Iterable

WORDS = frozenset(
    """
    circle circles square squares triangle triangles star stars shape shapes thing things
    red green blue yellow orange purple pink white black grey beige color background
    zero one two three four no yes nothing any many
    small little smaller large larger big bigger size
    center middle left right top bottom side corner above over below under
    draw show describe add put move make turn change paint use remove delete take away
    a an the it them there is are in on at to of into with or what which where how image
    """.split()
) | {"picture"}

# Common words that do not change what a prompt asks for.
_IGNORED = frozenset(
    """
    and but this that these those its their his her my your our i me we you he she they
    be am was were been do does did has have had can could will would shall should may might must
    as by for from so very just only also please now then than not all each both other another
    colored colors images
    """.split()
)
_MAX_NAMED = 3  # words in a hint
_MAX_LENGTH = 20  # characters of such a word


def prompt_hint(prompts: Iterable[str]) -> str | None:
    """Return a sentence to show if a prompt leaves the embedded model's world of colored shapes, else None.

    A prompt leaves it if it has a word that the model was not trained on, or none that it was trained on. Case and
    punctuation are ignored.
    """
    unknown: dict[str, None] = {}  # a set in order of appearance
    outside = False
    for prompt in prompts:
        words = re.findall(r"\w+", prompt.lower())
        strange = [word for word in words if word not in WORDS and word not in _IGNORED]
        outside = outside or bool(strange) or WORDS.isdisjoint(words)
        unknown |= dict.fromkeys(strange)
    if not outside:
        return None
    hint = 'The demo model only knows colored shapes, such as "two small blue stars on black"'
    if not unknown:
        return f"{hint}."
    names = [word if len(word) <= _MAX_LENGTH else f"{word[:_MAX_LENGTH]}…" for word in unknown]
    named = ", ".join(f'"{name}"' for name in names[:_MAX_NAMED])
    return f"{hint}, not {named}{' and other words' if len(names) > _MAX_NAMED else ''}."
