"""A resumable training run in a folder. A resumed run gives the same results as an uninterrupted one.

``state.safetensors`` holds everything that a step changes, ``log.jsonl`` one line per step.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from bagel_rt.errors import CheckpointError
from bagel_rt.train.state import load_state, save_state

MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingRun(ABC):
    """Base class of training loops: runs steps, writes the log, saves and resumes the state.

    Attributes:
        step: number of completed steps.
    """

    name: str
    """Label of the progress bar."""
    progress_losses: tuple[str, ...]
    """Names of the losses on the progress bar."""

    def __init__(self, folder: str | Path, steps: int):
        self.step = 0
        self._steps, self._folder = steps, Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._state, self._log = self._folder / "state.safetensors", self._folder / "log.jsonl"
        self._updating = False  # True while a step has updated only part of the state

    @abstractmethod
    def train_step(self) -> dict:
        """Run one step and return its losses for the log."""

    @abstractmethod
    def _tensors(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of everything that a step changes."""

    @abstractmethod
    def _identity(self) -> dict:
        """JSON-safe settings that must be the same when the run is resumed."""

    @property
    def done(self) -> bool:
        """Whether all steps have run."""
        return self.step >= self._steps

    def run(self, seconds: float | None = None, progress: bool = True, save_every: float = 300.0) -> bool:
        """Train until all steps are done or the time limit is reached.

        The state is saved at the end, every ``save_every`` seconds, and on Ctrl-C.

        Args:
            seconds: time limit, checked before each step; None for no limit.
            progress: show a progress bar on stderr.
            save_every: seconds between saves.

        Returns:
            Whether all steps are done.
        """
        start = saved = time.monotonic()
        bar = tqdm(total=self._steps, initial=self.step, desc=self.name, unit="step", disable=not progress)
        self._truncate_log()
        try:
            with bar, open(self._log, "a", encoding="utf-8") as log:
                while not self.done and (seconds is None or time.monotonic() - start < seconds):
                    losses = self.train_step()
                    log.write(json.dumps({"step": self.step, **losses}) + "\n")
                    bar.update()
                    bar.set_postfix({name: f"{losses[name]:.4f}" for name in self.progress_losses})
                    if time.monotonic() - saved > save_every:
                        log.flush()
                        self.save()
                        saved = time.monotonic()
        finally:
            if not self._updating:  # a partially updated state is worse than losing the steps since the last save
                self.save()
        return self.done

    def save(self) -> None:
        """Save the state atomically."""
        save_state(self._state, self._tensors(), {"step": self.step, **self._identity()})

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the state in the folder, if there is one.

        Raises:
            CheckpointError: the state belongs to another model or other settings.
        """
        if not self._state.exists():
            return
        metadata = load_state(self._state, self._tensors())
        for name, value in self._identity().items():
            if metadata.get(name) != value:
                raise CheckpointError(
                    f"{name} must be {metadata.get(name)} to resume {self._state}, got {value}. Use the settings that "
                    "the run was started with, or another folder."
                )
        self.step = metadata["step"]
        for state in optimizer.state.values():
            state["step"].fill_(self.step)

    def _truncate_log(self) -> None:
        """Drop the entries after the last save: those steps run again."""
        if self._log.exists():
            lines = self._log.read_text("utf-8").splitlines(keepends=True)
            self._log.write_text("".join(lines[: self.step]), "utf-8")


def allocate_moments(optimizer: torch.optim.AdamW, weights: Iterable[torch.Tensor]) -> None:
    """Allocate the optimizer's state before its first step, so that a saved state can be copied into it."""
    for weight in weights:
        moments = {kind: torch.zeros_like(weight) for kind in MOMENTS}
        optimizer.state[weight] = {"step": torch.zeros((), dtype=torch.float32, device=weight.device), **moments}
