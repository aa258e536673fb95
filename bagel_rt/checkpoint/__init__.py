"""Model folders: the default one, and reading and writing their weights."""

from pathlib import Path

DEFAULT_MODEL = Path(__file__).parent.parent / "assets" / "tiny"
"""The small model embedded in the package, in the layout of the published one."""
