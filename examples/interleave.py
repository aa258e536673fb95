"""Texts and pictures in, texts and pictures out: ``python examples/interleave.py [FOLDER]`` writes story.md there.

The model draws where its own text asks for a picture, which it has to be trained for (ThinkMorph is; the model that
comes with the package answers with a text alone). It goes on writing behind its picture, up to ``max_rounds`` pictures.
"""

import sys
from pathlib import Path

from bagel_rt import Bagel

folder = Path(*sys.argv[1:2])

bagel = Bagel.from_pretrained()
planned = bagel.generate("a blue star", think=True, max_think_token_n=48, seed=0)  # a plan is written, then drawn
planned.image.save(folder / "star.png")

parts = bagel.interleave([planned.image, "continue the story"], max_rounds=2, max_think_token_n=48, seed=0)
lines = [f"![](star.png)\n\n{planned.thought}"]
for number, part in enumerate(parts):
    if isinstance(part, str):
        lines.append(part)
    else:
        part.image.save(folder / f"story-{number}.png")
        lines.append(f"![](story-{number}.png)")
(folder / "story.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
