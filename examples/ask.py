"""Ask about an image and print the answer while it is generated.

``python examples/ask.py [FOLDER]`` writes shapes.png and answer.txt to the folder.
"""

import sys
from pathlib import Path

from bagel_rt import Bagel

folder = Path(*sys.argv[1:2])
question = "what color are the triangles"

bagel = Bagel.from_pretrained()
image = bagel.generate("three orange triangles at the bottom", seed=0).image
image.save(folder / "shapes.png")

pieces = []
for piece in bagel.stream(question, [image], max_think_token_n=32):
    print(piece, end="", flush=True)
    pieces.append(piece)
print()
(folder / "answer.txt").write_text(f"{question}\n{''.join(pieces)}\n", encoding="utf-8")
