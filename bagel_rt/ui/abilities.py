"""What the loaded model can do, as texts of the page: one sentence, placeholders, a hint for prompts beyond it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.tiny.world import prompt_hint

_OTHER_MODEL = "Start the page with --model and the published weights for anything else."


@dataclass(frozen=True)
class Abilities:
    """What a model can do.

    Attributes:
        summary: one sentence.
        thinks: whether it was trained to write a thought first.
        draws_in_chat: whether it was trained to request images in an answer.
        placeholders: example of an input, by task: "draw", "edit", "ask", "chat".
        hint: returns a hint for prompts that it was not trained for, or None.
    """

    summary: str
    thinks: bool
    draws_in_chat: bool
    placeholders: dict[str, str]
    hint: Callable[[Iterable[str]], str | None]


def abilities_of(config: BagelConfig, small: bool) -> Abilities:
    """Describe a model.

    Args:
        config: its configuration.
        small: whether it is the embedded model of colored shapes.
    """
    side = config.default_resolution
    if small:
        return Abilities(
            f"This demo model draws, edits and describes colored shapes on plain backgrounds, at {side}x{side} pixels. "
            f"{_OTHER_MODEL}",
            thinks=False,
            draws_in_chat=False,
            placeholders={
                "draw": "two small blue stars on black",
                "edit": "make the star red",
                "ask": "how many triangles are there",
                "chat": "Add an image and ask, such as: is there a blue star",
            },
            hint=_hint_with_remedy,
        )
    return Abilities(
        f"This model generates images of up to {side}x{side} pixels from text, edits images as you instruct, and "
        "answers questions about them.",
        thinks=True,
        draws_in_chat=True,
        placeholders={
            "draw": "A lighthouse on a cliff at dusk, oil on canvas",
            "edit": "Make it a winter scene, keep the house",
            "ask": "What is unusual about this image?",
            "chat": "Write a message; add images if you like",
        },
        hint=lambda prompts: None,
    )


def _hint_with_remedy(prompts: Iterable[str]) -> str | None:
    hint = prompt_hint(prompts)
    return None if hint is None else f"{hint} {_OTHER_MODEL}"
