"""Locking and execution context for calls from official code: one thread at a time, on the model's device, without
autocast."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from weakref import WeakKeyDictionary

import torch

from bagel_rt.models.bagel.model import BagelModel

_LOCKS: WeakKeyDictionary = WeakKeyDictionary()  # model -> lock; models that share weights share a lock


def model_lock(model: BagelModel):
    """The reentrant lock that a thread holds while the model computes."""
    return _LOCKS.setdefault(model, threading.RLock())


def share_lock(model: BagelModel, other: BagelModel) -> None:
    """Make ``model`` use the lock of ``other``, whose weights it shares."""
    _LOCKS[model] = model_lock(other)


@contextmanager
def exclusive(model: BagelModel) -> Iterator[None]:
    """Hold the model's lock and disable autocast. On CUDA, also make the model's GPU the thread's current one.

    Kernels launch on the current GPU.
    """
    device = model.device
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with model_lock(model), on_device, torch.autocast(device.type, enabled=False):
        yield


def entry_point(method):
    """Decorate a method to run inside ``self.inference_scope()``."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with self.inference_scope():
            return method(self, *args, **kwargs)

    return wrapped
