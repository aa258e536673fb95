"""Edit an image. ``python examples/edit.py [FOLDER]`` writes before.png and after.png to the folder."""

import sys
from pathlib import Path

from bagel_rt import Bagel

folder = Path(*sys.argv[1:2])

bagel = Bagel.from_pretrained()
before = bagel.generate("three orange triangles at the bottom", seed=0).image
after = bagel.edit(before, "turn the triangles into stars", seed=0, cfg_img_scale=2.0).image  # a path works too
before.save(folder / "before.png")
after.save(folder / "after.png")
