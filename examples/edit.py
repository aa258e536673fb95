"""Change a picture as a text says: ``python examples/edit.py [FOLDER]`` writes before.png and after.png there."""

import sys
from pathlib import Path

from bagel_rt import Bagel

folder = Path(*sys.argv[1:2])

bagel = Bagel.from_pretrained()
before = bagel.generate("three orange triangles at the bottom", seed=0).image
after = bagel.edit(before, "turn the triangles into stars", seed=0, cfg_img_scale=2.0).image  # a path will do as well
before.save(folder / "before.png")
after.save(folder / "after.png")
