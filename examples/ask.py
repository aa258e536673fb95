"""Ask about a picture, and read the answer while it is written: ``python examples/ask.py [FOLDER]``.

Writes shapes.png, and the question and its answer to answer.txt.
"""

import sys
from pathlib import Path

from bagel_rt import Bagel

folder = Path(*sys.argv[1:2])
question = "what color are the triangles"

bagel = Bagel.from_pretrained()
picture = bagel.generate("three orange triangles at the bottom", seed=0).image
picture.save(folder / "shapes.png")

pieces = []
for piece in bagel.stream(question, [picture], max_think_token_n=32):
    print(piece, end="", flush=True)
    pieces.append(piece)
print()
(folder / "answer.txt").write_text(f"{question}\n{''.join(pieces)}\n", encoding="utf-8")
