"""Run a command on a loaded model: progress bars, output images and texts, and the JSON report."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from tqdm import tqdm

from bagel_rt import __version__
from bagel_rt.cli.options import RunOptions, shows_progress
from bagel_rt.cli.outputs import STDOUT, OutputOptions
from bagel_rt.files import QUALITY, save_image, write_image

if TYPE_CHECKING:  # imported inside the commands only, to keep ``bagel-rt --help`` fast
    from bagel_rt.request import ImageResult, Progress


class Run:
    """A loaded model running one command. Leaving the context clears the bars and, with ``--json``, prints the report.

    Attributes:
        bagel: the model.
        bars: its progress callback.
        report: what ``--json`` prints.
        outputs: the texts and images in the report.
    """

    def __init__(self, task: str, options: RunOptions, target: OutputOptions | None = None):
        shown, start = shows_progress(options.progress), time.perf_counter()
        self.bagel = options.load(shown)
        self.bars, self._as_json, self._loaded = Bars(shown), options.as_json, time.perf_counter()
        self._quality = QUALITY if target is None or target.quality is None else target.quality
        self._text_to_stderr = target is not None and target.uses_stdout  # stdout is for the image
        self.outputs: list[dict[str, Any]] = []
        self._source = {
            "task": task,
            "model": options.folder.resolve().name,  # not its path: images are shared with others
            "version": __version__,
            "dtype": str(self.bagel.model.dtype).removeprefix("torch."),
        }
        self.report: dict[str, Any] = self._source | {
            "device": str(self.bagel.model.device),
            "load_seconds": self._loaded - start,
            "seconds": 0.0,
            "outputs": self.outputs,
        }

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bars.close()
        if kind is None and self._as_json:
            self.report["seconds"] = time.perf_counter() - self._loaded
            typer.echo(json.dumps(self.report))

    def print(self, text: str, end: str = "\n") -> None:
        """Print a text immediately, unless stdout is for JSON. If stdout is for an image, print it on stderr."""
        if not self._as_json:
            typer.echo(text + end, nl=False, err=self._text_to_stderr)

    def add_text(self, text: str) -> None:
        """Add a text to the report."""
        self.outputs.append({"type": "text", "text": text})

    def write_image(self, result: "ImageResult", path: Path, **request: Any) -> str:
        """Write an ImageResult with its parameters to a file or to stdout, and add it to the report.

        Returns:
            The lines to print about it. Print them after all images are written: a closed pipe ends the command.
        """
        self.bars.close()
        parameters = self._source | {"seed": result.seed} | request | result.parameters
        if result.thought is not None:
            parameters["thought"] = result.thought
        name = str(path)
        if path == STDOUT:
            name = "stdout"
            save_image(result.image, sys.stdout.buffer, "PNG", parameters)
            sys.stdout.flush()
        else:
            write_image(result.image, path, parameters, self._quality)
        self.outputs.append({"type": "image", "path": str(path), "seed": result.seed, "parameters": parameters})
        line = f"{name}: {result.image.width}x{result.image.height}, seed {result.seed}"
        return line if result.thought is None else f"{result.thought}\n{line}"


class Bars:
    """The progress callback of a request: one bar on stderr per stage."""

    def __init__(self, shown: bool):
        self._shown = shown
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, progress: "Progress") -> None:
        if progress.step == 1 or self._bar is None:
            self.close()
            unit = {"text": "token", "image": "step"}.get(progress.stage, "step")
            self._bar = tqdm(total=progress.total, desc=progress.stage, unit=unit, leave=False, disable=not self._shown)
        self._bar.update()

    def close(self) -> None:
        """Clear the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
