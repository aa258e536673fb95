"""Examples of each tab: prompts that suit the model, and images to edit and ask about.

The images are made by the embedded model, with prompts and seeds selected for good results.
``python -m bagel_rt.ui.examples`` regenerates them.
"""

import shutil
from pathlib import Path
from typing import Any

import bagel_rt

FOLDER = Path(bagel_rt.__file__).parent / "assets" / "examples"

# The world of the embedded model: colored shapes on plain backgrounds.
GENERATED = {  # image -> (prompt, seed)
    "star": ("a large blue star in the center on white", 0),
    "triangles": ("three orange triangles at the bottom", 0),
    "pair": ("a blue square left of a red triangle on white", 0),
    "circle": ("a large yellow circle above a blue star on grey", 4),
}
EDITED = {  # image -> (image it is edited from, prompt, seed)
    "stars": ("triangles", "turn the triangles into stars", 0),
    "red-star": ("star", "make the star red", 0),
    "white-background": ("triangles", "use a white background", 0),
}
ASKED = (  # (image, question)
    ("pair", "what is left of the triangle"),
    ("triangles", "how many triangles are there"),
    ("star", "what color is the star"),
)
CHATS = (("triangles", "what is in the picture"), ("star", "is there a blue star"))  # (image, message)
# For models of the whole world.
GENERAL = (
    "A lighthouse on a cliff at dusk, waves below, oil on canvas",
    "A bowl of ramen on a wooden table, steam rising, seen from above, soft daylight",
    "An isometric cutaway of a small library with a reading cat, paper craft",
    "A street after rain at night, neon signs mirrored in puddles, a cyclist passing",
)


class Examples:
    """Rows of examples for each tab.

    Attributes:
        draw: [prompt], or [prompt, seed, result].
        edit: [images, prompt], or [images, prompt, seed, result].
        ask: [images, question].
        chat: [message].
    """

    def __init__(self, folder: Path, small: bool):
        """
        Args:
            folder: receives copies of the images, which the page can serve from there.
            small: whether the model is the embedded one, which made the results that are shown.
        """
        path = {name: str(shutil.copy(FOLDER / f"{name}.png", folder)) for name in (*GENERATED, *EDITED)}
        self.draw: list[list[Any]] = [[text, seed, path[name]] for name, (text, seed) in GENERATED.items()]
        self.edit: list[list[Any]] = [
            [[path[source]], text, seed, path[name]] for name, (source, text, seed) in EDITED.items()
        ]
        if not small:
            self.draw = [[text] for text in GENERAL]
            self.edit = [row[:2] for row in self.edit]
        self.ask: list[list[Any]] = [[[path[name]], text] for name, text in ASKED]
        self.chat: list[list[Any]] = [[{"text": text, "files": [path[name]]}] for name, text in CHATS]


def main() -> None:
    from bagel_rt.files import write_image
    from bagel_rt.pipeline import Bagel

    bagel = Bagel.from_pretrained(device="cpu")
    FOLDER.mkdir(exist_ok=True)
    results = {}
    for name, (prompt, seed) in GENERATED.items():
        results[name] = bagel.generate(prompt, seed=seed)
    for name, (source, prompt, seed) in EDITED.items():
        results[name] = bagel.edit(results[source].image, prompt, seed=seed)
    prompts = {name: example[-2] for name, example in (GENERATED | EDITED).items()}
    for name, result in results.items():
        parameters = {"prompt": prompts[name], "seed": result.seed} | result.parameters
        write_image(result.image, FOLDER / f"{name}.png", parameters)


if __name__ == "__main__":
    main()
