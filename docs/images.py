"""Generate ``docs/default-model.png`` with the embedded model: ``python docs/images.py``.

The results are not selected: only the prompts are chosen by hand.
"""

from pathlib import Path

from PIL import Image

from bagel_rt import Bagel
from bagel_rt.tiny.contact_sheet import FAINT, INK, Section, Tile, contact_sheet

HERE = Path(__file__).parent
PROMPTS = (
    "two green squares above a red circle",
    "a large blue star in the center on white",
    "a small pink circle left of a yellow triangle on black",
    "three orange triangles at the bottom",
    "a purple square in the top right corner on beige",
    "a red star under two blue circles on a grey background",
    "two yellow stars on the left on black",
    "a green triangle to the right of an orange square",
)
EDITS = ("make the squares blue", "remove the circle", "turn the circle into a star", "use a white background")
QUESTIONS = (
    "what color are the squares",
    "how many shapes are there",
    "what is below the squares",
    "is there a yellow star",
)


def default_model(bagel: Bagel) -> Image.Image:
    """A contact sheet of generated images, edits and answers."""
    drawn = [result.image for result in bagel.generate(list(PROMPTS), seed=list(range(len(PROMPTS))))]
    first = drawn[0]
    edited = [bagel.edit(first, text, seed=0).image for text in EDITS]
    answers = [bagel.chat(text, [first]) for text in QUESTIONS]
    sections = [
        Section("images", "", [Tile((image,), ((text, INK),)) for image, text in zip(drawn, PROMPTS, strict=True)]),
        Section("edits", "", [Tile((first, image), ((text, INK),)) for image, text in zip(edited, EDITS, strict=True)]),
        Section(
            "answers",
            "",
            [Tile((first,), ((text, FAINT), (answer, INK))) for text, answer in zip(QUESTIONS, answers, strict=True)],
        ),
    ]
    return contact_sheet("Images, edits and answers of the embedded model", "128x128 pixels, on a CPU", sections)


if __name__ == "__main__":
    default_model(Bagel.from_pretrained(device="cpu")).save(HERE / "default-model.png", optimize=True)
