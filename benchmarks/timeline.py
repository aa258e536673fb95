"""What a step costs apart from its arithmetic: launches by the host, kernels on the GPU, and the gaps between these."""

import re
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bagel_rt.request import Progress

_LAUNCH = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")


@dataclass(frozen=True)
class Timeline:
    """What happened in some steps.

    Attributes:
        launches: per step, what the host gave to the device: kernels, copies, graphs. On a CPU, calls of operators.
        kernels: per step, what ran on the GPU, copies included. None on a CPU, or where the profiler saw none.
        idle: share of the time between the first and the last of them in which none ran. None as ``kernels``.
    """

    launches: float | None = None
    kernels: float | None = None
    idle: float | None = None


class Window:
    """A progress callback that profiles ``steps`` steps of a stage, beginning behind step ``first``.

    The device is waited for at both ends. The runtime reports texts in runs of up to eight tokens while as many more
    are under way, so that a window of texts holds exactly its steps if ``steps`` is a multiple of eight and ``first``
    is 9 or more.

    Attributes:
        failure: why there is no timeline; empty if there is one.
    """

    def __init__(self, device: torch.device, stage: str, first: int, steps: int):
        self.device, self.stage, self.first, self.steps = device, stage, first, steps
        self.failure = f"the request ended before step {first + steps}"
        self._profile = None
        self._timeline: Timeline | None = None

    def __call__(self, progress: Progress) -> None:
        if progress.stage != self.stage or self._timeline is not None:
            return
        if self._profile is None and progress.step >= self.first:
            self._begin()
        elif self._profile is not None and progress.step >= self.first + self.steps:
            self._end()

    def result(self) -> Timeline:
        """The timeline; an empty one where ``failure`` says why."""
        if self._timeline is None and self._profile is not None:
            self._profile.stop()  # the request ended inside the window
            self._profile = None
        return self._timeline or Timeline()

    def _begin(self) -> None:
        _wait(self.device)
        self._profile = profile(activities=_activities(self.device))
        self._profile.start()

    def _end(self) -> None:
        _wait(self.device)
        self._profile.stop()
        self._timeline = read(self._profile.events(), self.steps, self.device)
        self.failure = "" if self._timeline.launches is not None else "the profiler saw nothing of the GPU"


def read(events, steps: int, device: torch.device) -> Timeline:
    """The timeline of so many steps from the profiler's events."""
    if device.type != "cuda":
        operators = [event for event in events if event.cpu_parent is None and "::" in event.name]
        return Timeline(launches=len(operators) / steps)
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    if not on_gpu:
        return Timeline()
    launches = sum(event.device_type == DeviceType.CPU and bool(_LAUNCH.match(event.name)) for event in events)
    spans = [(event.time_range.start, event.time_range.end) for event in on_gpu]
    return Timeline(launches / steps, len(spans) / steps, idle_share(spans))


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Share of the time from the first start to the last end that no (start, end) covers."""
    spans = sorted(spans)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    whole = reached - spans[0][0]
    return 1 - busy / whole if whole > 0 else 0.0


def wake_profiler(device: torch.device) -> None:
    """Let the profiler look at the GPU once: graphs captured before it first did are invisible to it."""
    with profile(activities=_activities(device)):
        torch.ones(1, device=device).add_(1)
        _wait(device)


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
