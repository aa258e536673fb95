"""What surrounds every computation for a caller of official code: one thread at a time, on the model's GPU, in the
model's own precision, and with the weights as they are now."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from weakref import WeakKeyDictionary

import torch

from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.runtime.graphs import GraphCache

_LOCKS: WeakKeyDictionary = WeakKeyDictionary()  # model -> lock; models of one official module have one


def lock_of(model: BagelModel):
    """The lock under which the model computes; the thread that holds it may take it again."""
    return _LOCKS.setdefault(model, threading.RLock())


def share_lock(model: BagelModel, other: BagelModel) -> None:
    """Let a model compute under the lock of another one, with which it shares its weights."""
    _LOCKS[model] = lock_of(other)


@contextmanager
def exclusive(model: BagelModel) -> Iterator[None]:
    """One thread at a time, on the model's GPU (each thread has a current one, where kernels are launched), and in the
    model's own precision, whatever autocast the caller is in."""
    device = model.device
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with lock_of(model), on_device, torch.autocast(device.type, enabled=False):
        yield


def guarded(method):
    """Run a method under its object's ``working()``."""

    @functools.wraps(method)
    def wrapped(self, *arguments, **named):
        with self.working():
            return method(self, *arguments, **named)

    return wrapped


class WeightSync:
    """Keeps values derived from weights up to date: the owner of the official module may change weights in place
    (``load_state_dict``, a LoRA that is merged)."""

    def __init__(self, model: BagelModel, graphs: GraphCache):
        """
        Args:
            model: the weights' model.
            graphs: dropped when numbers in their buffers are out of date.
        """
        self.model, self.graphs = model, graphs
        self._seen: list[torch.Tensor] = []

    def sync(self) -> None:
        """Take over changes. Cheap: a few copies of single rows per layer and three comparisons."""
        weights, heads = self.model.weights, self.model.config.llm.num_heads
        for layer in weights.layers:
            for norm in layer.qk_norm:
                for rows in (norm[:heads], norm[heads:]):
                    rows[1:] = rows[:1]  # the official parameter is the first row
        # The buffers of a denoising keep these from picture to picture.
        kept = [weights.vae2llm.bias, weights.latent_positions]
        if self.model.markers is not None:
            kept.append(self.model.embed_markers())
        if not all(map(torch.equal, self._seen, kept)):
            self.graphs.clear()
            self._seen = []
        self._seen += [tensor.clone() for tensor in kept[len(self._seen) :]]
