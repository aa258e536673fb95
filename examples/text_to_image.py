"""Generate an image from a prompt. ``python examples/text_to_image.py [FOLDER]`` writes star.png to the folder.

Without an argument ``from_pretrained`` loads the embedded model; pass the published folder to load BAGEL-7B-MoT.
"""

import sys
from pathlib import Path

from bagel_rt import Bagel

folder = Path(*sys.argv[1:2])

bagel = Bagel.from_pretrained()
result = bagel.generate("a large blue star in the center on white", seed=0)
result.image.save(folder / "star.png")
print(f"{result.image.width}x{result.image.height} pixels, seed {result.seed}, {result.parameters}")
