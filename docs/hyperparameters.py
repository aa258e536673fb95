"""What each hyper-parameter does, in pictures of the embedded model: ``python docs/hyperparameters.py [NAME...]``.

A contact sheet a parameter, ``docs/hyperparameters/NAME.webp``: a row for each request, a tile for each value, the seed
the same, all else the default but for what is in ``BESIDE``. ``--timesteps N`` makes quick ones of few steps, to see
that the script works.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from bagel_rt import Bagel
from bagel_rt.models.bagel.settings import TASKS
from bagel_rt.tiny.contact_sheet import FAINT, INK, Section, Tile, contact_sheet

FOLDER = Path(__file__).parent / "hyperparameters"
SEED = 0
DRAWN = ("a large blue star in the center on white", "a blue square left of a red triangle")
EDITED = (
    ("three orange triangles at the bottom", "turn the triangles into stars"),
    ("a blue square left of a red triangle on white", "remove the square"),
)
ASKED = (("a large yellow circle above a blue star on grey", "what is in the picture"),)
LONGEST = 48  # tokens of an answer; those of this world are shorter
SEEDS = 4  # answers of a tile where tokens are sampled

DRAWING = {
    "seed": (0, 1, 2, 3, 4, 5, 6, 7),
    "cfg_text_scale": (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0),
    "cfg_interval": ((0.0, 1.0), (0.2, 1.0), (0.4, 1.0), (0.6, 1.0), (0.8, 1.0), (0.0, 0.4), (0.0, 0.8), (1.0, 1.0)),
    "cfg_renorm_type": ("global", "channel", "text_channel"),
    "cfg_renorm_min": (0.0, 0.25, 0.5, 0.75, 1.0),
    "timestep_shift": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0),
    "num_timesteps": (2, 3, 5, 10, 20, 30, 50, 100),
    "negative_prompt": (None, "a blue star", "a star", "white", "a red circle"),
}
EDITING = {"cfg_img_scale": (1.0, 1.5, 2.0, 4.0)}
ANSWERING = {
    "max_think_token_n": (2, 4, 8, 16, 32),
    "do_sample": (False, True),
    "text_temperature": (0.3, 1.0, 2.0, 3.0, 5.0),
    "top_k": (1, 2, 5, 20, 0),
    "top_p": (0.1, 0.5, 0.9, 1.0),
}
# What is not the default: at the defaults these would show little, for this model is sure of its answers and its steps.
BESIDE = {
    "cfg_interval": {"cfg_text_scale": 16.0},
    "cfg_renorm_type": {"cfg_text_scale": 16.0},
    "cfg_renorm_min": {"cfg_text_scale": 16.0},
    "timestep_shift": {"num_timesteps": 6},
    "do_sample": {"text_temperature": 3.0},
    "text_temperature": {"do_sample": True},
    "top_k": {"do_sample": True, "text_temperature": 3.0},
    "top_p": {"do_sample": True, "text_temperature": 3.0},
}


def drawing_sheet(bagel: Bagel, name: str, timesteps: int) -> Image.Image:
    """Pictures of the same texts under several values."""
    values, sections = DRAWING[name], []
    for prompt in DRAWN:
        given = {"seed": SEED, "num_timesteps": timesteps} | BESIDE.get(name, {}) | {name: list(values)}
        results = bagel.generate([prompt] * len(values), **_one_seed(given, len(values)))
        tiles = [Tile((result.image,), _label(name, value)) for result, value in zip(results, values, strict=True)]
        sections.append(Section(prompt, "", tiles))
    return contact_sheet(name, f"text-to-image, {_said(TASKS['generate'].image, name, timesteps)}", sections)


def editing_sheet(bagel: Bagel, name: str, timesteps: int) -> Image.Image:
    """Edits of the same picture under several values."""
    sections = []
    for prompt, instruction in EDITED:
        source = bagel.generate(prompt, seed=SEED, num_timesteps=timesteps).image
        tiles = [
            Tile(
                (source, bagel.edit(source, instruction, seed=SEED, num_timesteps=timesteps, **{name: value}).image),
                _label(name, value),
            )
            for value in EDITING[name]
        ]
        sections.append(Section(instruction, "", tiles))
    return contact_sheet(name, f"editing, {_said(TASKS['edit'].image, name, timesteps)}", sections)


def answering_sheet(bagel: Bagel, name: str, timesteps: int) -> Image.Image:
    """Answers to the same question under several values; sampled ones of several seeds."""
    sections = []
    for prompt, question in ASKED:
        picture = bagel.generate(prompt, seed=SEED, num_timesteps=timesteps).image
        tiles = []
        for value in ANSWERING[name]:
            given = {"max_think_token_n": LONGEST} | BESIDE.get(name, {}) | {name: value}
            seeds = range(SEEDS if given.get("do_sample") else 1)
            answers = [bagel.chat(question, [picture], seed=seed, **given) for seed in seeds]
            said = [f"{seed}: {answer}" if len(answers) > 1 else answer for seed, answer in enumerate(answers)]
            tiles.append(Tile((picture,), (*_label(name, value), *((line, INK) for line in said))))
        sections.append(Section(question, "", tiles))
    note = [f"one answer a seed, 0 to {SEEDS - 1}, where tokens are sampled", *_beside(name)]
    return contact_sheet(name, ", ".join(note), sections)


def _one_seed(given: dict, count: int) -> dict:
    """The same seed for every picture of a batch, which by itself would count up."""
    return given | {"seed": given["seed"] if isinstance(given["seed"], list) else [given["seed"]] * count}


def _label(name: str, value) -> tuple[tuple[str, str], ...]:
    said = "none" if value is None else str(value)
    return ((said if name == "negative_prompt" else f"{name} {said}", FAINT),)


def _said(defaults, name: str, timesteps: int) -> str:
    """What stands beside a sheet's title."""
    default = getattr(defaults, name, None)
    told = [f"seed {SEED}"] if name != "seed" else []
    told += [f"default {default}"] if default is not None else []
    if "num_timesteps" not in (name, *BESIDE.get(name, {})):
        told.append(f"{timesteps} timesteps")
    return ", ".join([*told, *_beside(name)])


def _beside(name: str) -> list[str]:
    return [f"{other} {value}" for other, value in BESIDE.get(name, {}).items()]


def sheets() -> dict[str, Callable[[Bagel, str, int], Image.Image]]:
    """Parameter -> what makes its sheet."""
    made = {name: drawing_sheet for name in DRAWING} | {name: editing_sheet for name in EDITING}
    return made | {name: answering_sheet for name in ANSWERING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of parameters; default: all")
    parser.add_argument("--timesteps", type=int, default=50, metavar="N", help="default: 50")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER", help="default: %(default)s")
    arguments = parser.parse_args()
    made = sheets()
    if unknown := sorted(set(arguments.names) - set(made)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(made)}")
    bagel = Bagel.from_pretrained(device="cpu")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or made:
        sheet = made[name](bagel, name, arguments.timesteps)
        sheet.save(arguments.output / f"{name}.webp", quality=90, method=6)
        print(name, flush=True)


if __name__ == "__main__":
    main()
