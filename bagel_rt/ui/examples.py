"""What a newcomer may begin with: texts that suit the model, and pictures to edit and to ask about.

The pictures are the embedded model's own, as are those that show what its examples give: texts and seeds that it does
well. All are made again by ``python -m bagel_rt.ui.examples``.
"""

import shutil
from pathlib import Path

import bagel_rt

MADE = Path(bagel_rt.__file__).parent / "assets" / "examples"

# The world of the embedded model: coloured shapes on plain backgrounds.
DRAWN = {  # picture -> (text, seed)
    "star": ("a large blue star in the center on white", 0),
    "triangles": ("three orange triangles at the bottom", 0),
    "pair": ("a blue square left of a red triangle on white", 0),
    "circle": ("a large yellow circle above a blue star on grey", 4),
}
EDITED = {  # picture -> (picture that it was made from, text, seed)
    "stars": ("triangles", "turn the triangles into stars", 0),
    "red-star": ("star", "make the star red", 0),
    "white-background": ("triangles", "use a white background", 0),
}
ASKED = (  # (picture, question)
    ("pair", "what is left of the triangle"),
    ("triangles", "how many triangles are there"),
    ("star", "what color is the star"),
)
TOLD = (("triangles", "what is in the picture"), ("star", "is there a blue star"))  # in a conversation
# For models that know more.
GENERAL = (
    "A lighthouse on a cliff at dusk, waves below, oil on canvas",
    "A bowl of ramen on a wooden table, steam rising, seen from above, soft daylight",
    "An isometric cutaway of a small library with a reading cat, paper craft",
    "A street after rain at night, neon signs mirrored in puddles, a cyclist passing",
)


class Examples:
    """The examples of each task, a row for each, as the page takes them.

    Attributes:
        draw: [text], or [text, seed, result].
        edit: [picture, text], or [picture, text, seed, result].
        ask: [picture, question].
        talk: [message].
    """

    def __init__(self, folder: Path, small: bool):
        """
        Args:
            folder: gets copies of the pictures, which the page may serve from there.
            small: whether the model is the embedded one, so that results can be shown beforehand.
        """
        path = {name: shutil.copy(MADE / f"{name}.png", folder) for name in (*DRAWN, *EDITED)}
        self.draw = [[text, seed, path[name]] for name, (text, seed) in DRAWN.items()]
        self.edit = [[path[given], text, seed, path[name]] for name, (given, text, seed) in EDITED.items()]
        if not small:
            self.draw = [[text] for text in GENERAL]
            self.edit = [row[:2] for row in self.edit]
        self.ask = [[path[name], text] for name, text in ASKED]
        self.talk = [[{"text": text, "files": [path[name]]}] for name, text in TOLD]


def main() -> None:
    from bagel_rt.files import write_png
    from bagel_rt.pipeline import Bagel

    bagel, made = Bagel.from_pretrained(device="cpu"), {}
    for name, (text, seed) in DRAWN.items():
        made[name] = bagel.generate(text, seed=seed)
    for name, (given, text, seed) in EDITED.items():
        made[name] = bagel.edit(made[given].image, text, seed=seed)
    MADE.mkdir(exist_ok=True)
    for name, (*_, text, seed) in (DRAWN | EDITED).items():
        write_png(made[name].image, MADE / f"{name}.png", {"prompt": text, "seed": seed} | made[name].parameters)


if __name__ == "__main__":
    main()
