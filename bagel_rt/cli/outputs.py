"""Output files: their names are checked before a model is loaded, and no file is replaced without ``--overwrite``."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bagel_rt.cli.parsing import OptionGroup
from bagel_rt.files import IMAGE_FORMATS, QUALITY, partial_path
from bagel_rt.validation import integer, invalid

STDOUT = Path("-")

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output files.")]


def check_file(option: str, path: Path, suffixes: tuple[str, ...], overwrite: bool) -> None:
    """Raise ValueError unless a file of this name can be written. The error names ``option``."""

    def require(condition: bool, allowed: str, remedy: str = "") -> None:
        if not condition:
            raise ValueError(f"{option} must be {allowed}, got {path}." + (f" {remedy}." if remedy else ""))

    require(path.suffix.lower() in suffixes, f"a file name that ends in {' or '.join(suffixes)}")
    try:
        require(not path.is_dir(), "a file name", "This is a folder")
        exists = path.exists() or path.is_symlink()
        require(overwrite or not exists, "a new file", "This one exists; --overwrite replaces it")
        remedy = f"{path.parent} is a file" if path.parent.exists() else f"Create {path.parent} first"
        require(path.parent.is_dir(), "in an existing folder", remedy)
        require(not path.exists() or os.access(path, os.W_OK), "a writable file", "This one is read-only")
        partial_path(path).touch()
        partial_path(path).unlink()
    except OSError as error:
        require(False, "a file that can be written", f"{error.strerror}; choose another name")


@dataclass(frozen=True)
class OutputOptions(OptionGroup):
    """Where and how a command writes its images."""

    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Image file to write: .png, .jpg, .jpeg or .webp; - is stdout, as PNG. Several images are written to "
            "FILE-1, FILE-2, ...",
        ),
    ]
    overwrite: Overwrite = False
    quality: Annotated[
        int | None, typer.Option(show_default=str(QUALITY), help="Quality of JPEG and WebP, 1 to 100."), integer(1, 100)
    ] = None

    @property
    def uses_stdout(self) -> bool:
        return self.output == STDOUT

    def paths(self, count: int, numbered: bool, as_json: bool) -> list[Path]:
        """The paths of ``count`` images, with numbers from 1 if ``numbered``; ValueError if one cannot be written."""
        if self.uses_stdout:
            self._check_stdout(numbered, as_json)
            return [STDOUT]
        names = [f"{self.output.stem}-{number}" if numbered else self.output.stem for number in range(1, count + 1)]
        paths = [self.output.with_name(name + self.output.suffix) for name in names]
        for path in paths:
            check_file("--output", path, tuple(IMAGE_FORMATS), self.overwrite)
        self._check_quality(IMAGE_FORMATS[self.output.suffix.lower()])
        return paths

    def _check_stdout(self, numbered: bool, as_json: bool) -> None:
        if numbered:
            raise invalid("--output", "-", "a file name", "stdout takes only one image")
        if as_json:
            raise invalid("--output", "-", "a file name", "With --json, stdout is for the report")
        if sys.stdout is None or sys.stdout.isatty():
            raise invalid("--output", "-", "a file name", "For -, redirect stdout to a file or a program")
        self._check_quality("PNG")

    def _check_quality(self, image_format: str) -> None:
        if self.quality is not None and image_format == "PNG":
            raise ValueError(f"--quality must be left out for PNG, got {self.quality}. Write a .jpg or .webp file.")
