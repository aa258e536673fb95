"""Contact sheets that show the effect of each hyper-parameter: ``python docs/hyperparameters.py [NAME...]``.

Writes ``docs/hyperparameters/NAME.webp`` with the embedded model: one row per request, one tile per value. The seed is
fixed, and the other parameters have their defaults except for those in ``OTHER_SETTINGS``. ``--timesteps N`` makes
quick sheets to test the script.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from bagel_rt import Bagel
from bagel_rt.models.bagel.settings import HYPERPARAMETERS, TASKS
from bagel_rt.tiny.contact_sheet import FAINT, INK, Section, Tile, contact_sheet

FOLDER = Path(__file__).parent / "hyperparameters"
SEED = 0
PROMPTS = ("a large blue star in the center on white", "a blue square left of a red triangle")
EDITS = (
    ("three orange triangles at the bottom", "turn the triangles into stars"),
    ("a blue square left of a red triangle on white", "remove the square"),
)
QUESTIONS = (("a large yellow circle above a blue star on grey", "what is in the picture"),)
MAX_TOKENS = 48  # more than any answer of the embedded model has
SEEDS = 4  # number of answers per tile with sampling

IMAGE_VALUES = {
    "seed": (0, 1, 2, 3, 4, 5, 6, 7),
    "cfg_text_scale": (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0),
    "cfg_interval": ((0.0, 1.0), (0.2, 1.0), (0.4, 1.0), (0.6, 1.0), (0.8, 1.0), (0.0, 0.4), (0.0, 0.8), (1.0, 1.0)),
    "cfg_renorm_type": ("global", "channel", "text_channel"),
    "cfg_renorm_min": (0.0, 0.25, 0.5, 0.75, 1.0),
    "timestep_shift": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0),
    "num_timesteps": (2, 3, 5, 10, 20, 30, 50, 100),
    "negative_prompt": (None, "a blue star", "a star", "white", "a red circle"),
}
EDIT_VALUES = {"cfg_img_scale": (1.0, 1.5, 2.0, 4.0)}
TEXT_VALUES = {
    "max_think_token_n": (2, 4, 8, 16, 32),
    "do_sample": (False, True),
    "text_temperature": (0.3, 1.0, 2.0, 3.0, 5.0),
    "top_k": (1, 2, 5, 20, 0),
    "top_p": (0.1, 0.5, 0.9, 1.0),
}
# Other parameters to change: at the defaults, the embedded model is so certain that these would show no effect.
OTHER_SETTINGS = {
    "cfg_interval": {"cfg_text_scale": 16.0},
    "cfg_renorm_type": {"cfg_text_scale": 16.0},
    "cfg_renorm_min": {"cfg_text_scale": 16.0},
    "timestep_shift": {"num_timesteps": 6},
    "do_sample": {"text_temperature": 3.0},
    "text_temperature": {"do_sample": True},
    "top_k": {"do_sample": True, "text_temperature": 3.0},
    "top_p": {"do_sample": True, "text_temperature": 3.0},
}


def generations(bagel: Bagel, name: str, timesteps: int) -> Iterator[Section]:
    """Images of the same prompts under several values."""
    values = IMAGE_VALUES[name]
    settings = (
        {"seed": [SEED] * len(values), "num_timesteps": timesteps} | OTHER_SETTINGS.get(name, {}) | {name: list(values)}
    )
    for prompt in PROMPTS:
        results = bagel.generate([prompt] * len(values), **settings)
        tiles = [Tile((result.image,), _label(name, value)) for result, value in zip(results, values, strict=True)]
        yield Section(prompt, "", tiles)


def edits(bagel: Bagel, name: str, timesteps: int) -> Iterator[Section]:
    """Edits of the same images under several values."""
    settings = {"seed": SEED, "num_timesteps": timesteps}
    for prompt, instruction in EDITS:
        source = bagel.generate(prompt, **settings).image
        results = [(bagel.edit(source, instruction, **settings, **{name: value}), value) for value in EDIT_VALUES[name]]
        yield Section(instruction, "", [Tile((source, result.image), _label(name, value)) for result, value in results])


def answers(bagel: Bagel, name: str, timesteps: int) -> Iterator[Section]:
    """Answers to the same question under several values; with sampling, one per seed."""
    for prompt, question in QUESTIONS:
        image = bagel.generate(prompt, seed=SEED, num_timesteps=timesteps).image
        tiles = []
        for value in TEXT_VALUES[name]:
            settings = {"max_think_token_n": MAX_TOKENS} | OTHER_SETTINGS.get(name, {}) | {name: value}
            seeds = range(SEEDS if settings.get("do_sample") else 1)
            texts = [bagel.chat(question, [image], seed=seed, **settings) for seed in seeds]
            lines = [f"{seed}: {text}" if len(texts) > 1 else text for seed, text in enumerate(texts)]
            tiles.append(Tile((image,), (*_label(name, value), *((line, INK) for line in lines))))
        yield Section(question, "", tiles)


def _label(name: str, value: object) -> tuple[tuple[str, str], ...]:
    shown = "none" if value is None else str(value)
    return ((shown if name == "negative_prompt" else f"{name} {shown}", FAINT),)


def _subtitle(name: str, timesteps: int) -> str:
    """The task of a sheet, its defaults and its changed parameters."""
    changed = [f"{other} {value}" for other, value in OTHER_SETTINGS.get(name, {}).items()]
    if name in TEXT_VALUES:
        return ", ".join([f"one answer per seed, 0 to {SEEDS - 1}, with sampling", *changed])
    task, title = ("edit", "editing") if name in EDIT_VALUES else ("generate", "text-to-image")
    parts = [title] + ([f"seed {SEED}"] if name != "seed" else [])
    if name in HYPERPARAMETERS:
        parts.append(f"default {getattr(TASKS[task].image, name)}")
    if "num_timesteps" not in (name, *OTHER_SETTINGS.get(name, {})):
        parts.append(f"{timesteps} timesteps")
    return ", ".join([*parts, *changed])


def sheets() -> dict[str, Callable[[Bagel, str, int], Iterator[Section]]]:
    """Parameter -> the function that generates the sections of its sheet."""
    return (
        dict.fromkeys(IMAGE_VALUES, generations)
        | dict.fromkeys(EDIT_VALUES, edits)
        | dict.fromkeys(TEXT_VALUES, answers)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="parameter to show; default: all")
    parser.add_argument("--timesteps", type=int, default=50, metavar="N", help="default: 50")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER", help="default: %(default)s")
    arguments = parser.parse_args()
    generators = sheets()
    if unknown := sorted(set(arguments.names) - set(generators)):
        parser.error(f"NAME must be from {', '.join(generators)}, got {', '.join(unknown)}.")
    bagel = Bagel.from_pretrained(device="cpu")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or generators:
        sections = list(generators[name](bagel, name, arguments.timesteps))
        sheet = contact_sheet(name, _subtitle(name, arguments.timesteps), sections)
        sheet.save(arguments.output / f"{name}.webp", quality=90, method=6)
        print(name, flush=True)


if __name__ == "__main__":
    main()
