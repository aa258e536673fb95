"""Model folders: where they are, reading weights, writing them."""

from pathlib import Path

DEFAULT_MODEL = Path(__file__).parent.parent / "assets" / "tiny"
"""The small model that the package carries, in the layout of the published one."""
