"""Locking and execution context for calls from official code: one thread at a time, on the model's device, without
autocast."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from bagel_rt.models.bagel.model import BagelModel


@contextmanager
def exclusive(model: BagelModel) -> Iterator[None]:
    """Hold the model's lock and disable autocast. On CUDA, also make the model's GPU the thread's current one.

    Kernels launch on the current GPU. A second thread waits for the lock, as official code expects; the engine alone
    would raise an error.
    """
    device = model.device
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with model.lock, on_device, torch.autocast(device.type, enabled=False):
        yield


class HasInferenceScope(Protocol):
    """The owner of an :func:`entry_point`."""

    def inference_scope(self) -> AbstractContextManager[None]:
        """Exclusive use of the model in inference mode."""


P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=HasInferenceScope)


def entry_point(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Decorate a method to run inside ``self.inference_scope()``."""

    @functools.wraps(method)
    def wrapped(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.inference_scope():
            return method(self, *args, **kwargs)

    return wrapped
