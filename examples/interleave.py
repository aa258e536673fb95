"""Think before generating, then continue with interleaved text and images.

``python examples/interleave.py [FOLDER]`` writes story.md and its images to the folder. Only a model trained for it
requests images in its text (ThinkMorph does); the embedded model answers with text alone. After each image the model
continues its text, for at most ``max_rounds`` images.
"""

import sys
from pathlib import Path

from bagel_rt import Bagel

folder = Path(*sys.argv[1:2])

bagel = Bagel.from_pretrained()
first = bagel.generate("a blue star", think=True, max_think_token_n=48, seed=0)  # writes a thought first
first.image.save(folder / "star.png")

parts = bagel.interleave([first.image, "continue the story"], max_rounds=2, max_think_token_n=48, seed=0)
lines = [f"![](star.png)\n\n{first.thought}"]
for number, part in enumerate(parts):
    if isinstance(part, str):
        lines.append(part)
    else:
        part.image.save(folder / f"story-{number}.png")
        lines.append(f"![](story-{number}.png)")
(folder / "story.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
