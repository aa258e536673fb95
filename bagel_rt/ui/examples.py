"""What a newcomer may begin with: prompts that suit the model, and pictures to edit and to ask about."""

from pathlib import Path

from bagel_rt.shapes.render import render
from bagel_rt.shapes.scene import Scene, Thing

# The world of the embedded model: coloured shapes on plain backgrounds.
SHAPES = (
    "two green squares above a red circle",
    "a large blue star in the center on white",
    "a small pink circle left of a yellow triangle on black",
    "two yellow stars on the left on black",
)
# For models that know more.
GENERAL = (
    "A lighthouse on a cliff at dusk, waves below, oil on canvas",
    "A bowl of ramen on a wooden table, steam rising, seen from above, soft daylight",
    "An isometric cutaway of a small library with a reading cat, paper craft",
    "A street after rain at night, neon signs mirrored in puddles, a cyclist passing",
)
EDITS = (("squares", "make the squares blue"), ("squares", "remove the circle"), ("star", "use a black background"))
QUESTIONS = (
    ("squares", "what color are the squares"),
    ("squares", "how many shapes are there"),
    ("star", "what shape is there"),
)
_SCENES = {
    "squares": Scene(
        "white",
        (
            Thing("square", "green", "small", 0.3, 0.3),
            Thing("square", "green", "small", 0.7, 0.3),
            Thing("circle", "red", "small", 0.5, 0.72),
        ),
    ),
    "star": Scene("beige", (Thing("star", "blue", "large", 0.5, 0.5),)),
}


def draw_pictures(folder: Path, side: int) -> dict[str, str]:
    """The pictures of the examples as files in a folder, ``side`` pixels wide and high: name -> path."""
    paths = {}
    for name, scene in _SCENES.items():
        path = folder / f"{name}.png"
        render(scene, side).save(path)
        paths[name] = str(path)
    return paths
