"""``python -m bagel_rt.cli``."""

from bagel_rt.cli import app

app(prog_name="bagel-rt")
