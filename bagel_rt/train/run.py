"""A training run in a folder: stopped at any time, it resumes as if it had not been stopped.

``state.safetensors`` holds everything that a step changes, ``log.jsonl`` one line a step.
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
    """The steps of a run, its log and its state.

    Attributes:
        step: steps done.
    """

    name: str
    """On the progress bar."""
    shown: tuple[str, ...]
    """The losses on the progress bar."""

    def __init__(self, folder: str | Path, steps: int):
        self.step = 0
        self._steps, self._folder = steps, Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._state, self._log = self._folder / "state.safetensors", self._folder / "log.jsonl"
        self._updating = False  # whether some of what a step changes is changed and some is not

    @abstractmethod
    def train_step(self) -> dict:
        """Do one step and return its losses, for the log."""

    @abstractmethod
    def _tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a step changes, under the names it is saved by."""

    @abstractmethod
    def _identity(self) -> dict:
        """What a resumed run must share, JSON-ready."""

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self._steps

    def run(self, seconds: float | None = None, progress: bool = True, save_every: float = 300.0) -> bool:
        """Train until all steps are done or the time is over; the state is saved then, every so often, and on Ctrl-C.

        Args:
            seconds: time after which no further step is begun; by default there is no limit.
            progress: show a bar on stderr.
            save_every: seconds between saves.

        Returns:
            Whether all steps are done.
        """
        begun = saved = time.monotonic()
        bar = tqdm(total=self._steps, initial=self.step, desc=self.name, unit="step", disable=not progress)
        self._shorten_log()
        try:
            with bar, open(self._log, "a", encoding="utf-8") as log:
                while not self.done and (seconds is None or time.monotonic() - begun < seconds):
                    losses = self.train_step()
                    log.write(json.dumps({"step": self.step, **losses}) + "\n")
                    bar.update()
                    bar.set_postfix({name: f"{losses[name]:.4f}" for name in self.shown})
                    if time.monotonic() - saved > save_every:
                        log.flush()
                        self.save()
                        saved = time.monotonic()
        finally:
            if not self._updating:  # half a step would be worse than the steps since the last save
                self.save()
        return self.done

    def save(self) -> None:
        """Write the state, atomically."""
        save_state(self._state, self._tensors(), {"step": self.step, **self._identity()})

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        """Go on from the state in the folder, if there is one.

        Raises:
            CheckpointError: it is the state of another model or of other settings.
        """
        if not self._state.exists():
            return
        facts = load_state(self._state, self._tensors())
        for name, value in self._identity().items():
            if facts.get(name) != value:
                raise CheckpointError(
                    f"{self._state} was trained with {name} {facts.get(name)}, this run has {value}. Continue with the "
                    "settings it was begun with, or take another folder."
                )
        self.step = facts["step"]
        for state in optimizer.state.values():
            state["step"].fill_(self.step)

    def _shorten_log(self) -> None:
        """Forget the steps after the last save, which will be done again."""
        if self._log.exists():
            lines = self._log.read_text("utf-8").splitlines(keepends=True)
            self._log.write_text("".join(lines[: self.step]), "utf-8")


def allocate_moments(optimizer: torch.optim.AdamW, weights: Iterable[torch.Tensor]) -> None:
    """Make the optimizer's state before its first step, so that a saved one has a place to go."""
    for weight in weights:
        moments = {kind: torch.zeros_like(weight) for kind in MOMENTS}
        optimizer.state[weight] = {"step": torch.zeros((), dtype=torch.float32, device=weight.device), **moments}
