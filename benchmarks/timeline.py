"""Profile the overhead of a step: host launches, GPU kernels, and the idle time between kernels."""

import re
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bagel_rt.request import Progress

_LAUNCH = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")


@dataclass(frozen=True)
class Timeline:
    """Averages over the profiled steps.

    Attributes:
        launches: host launches per step: kernels, copies, memsets and graphs. On a CPU, operator calls.
        kernels: GPU activities per step, copies included. None on a CPU, or if the profiler recorded none.
        idle: share of the time between the first and the last GPU activity without any. None like ``kernels``.
    """

    launches: float | None = None
    kernels: float | None = None
    idle: float | None = None


class ProfileWindow:
    """A progress callback that profiles ``steps`` steps of a stage, starting after step ``first``.

    The device is synchronized at both ends. The runtime reports text progress for up to eight tokens at a time while
    the next eight are in flight. A window over tokens therefore covers exactly ``steps`` tokens only if ``steps`` is a
    multiple of eight and ``first`` is at least 9.

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
        """The timeline, which is empty if ``failure`` is set."""
        if self._timeline is None and self._profile is not None:
            self._profile.stop()  # the request ended inside the window
            self._profile = None
        return self._timeline or Timeline()

    def _begin(self) -> None:
        _synchronize(self.device)
        self._profile = profile(activities=_activities(self.device))
        self._profile.start()

    def _end(self) -> None:
        _synchronize(self.device)
        self._profile.stop()
        self._timeline = read_timeline(self._profile.events(), self.steps, self.device)
        self.failure = "" if self._timeline.launches is not None else "the profiler recorded no GPU activity"


def read_timeline(events, steps: int, device: torch.device) -> Timeline:
    """Compute the timeline of ``steps`` steps from profiler events."""
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
    """Share of the time from the first start to the last end that no (start, end) span covers."""
    spans = sorted(spans)
    busy, latest_end = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, latest_end))
        latest_end = max(latest_end, end)
    total = latest_end - spans[0][0]
    return 1 - busy / total if total > 0 else 0.0


def initialize_profiler(device: torch.device) -> None:
    """Run the profiler once. It cannot see the kernels of CUDA graphs that were captured before its first use."""
    with profile(activities=_activities(device)):
        torch.ones(1, device=device).add_(1)
        _synchronize(device)


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
