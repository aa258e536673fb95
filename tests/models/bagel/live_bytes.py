"""Bytes of the tensors that a block of code keeps alive, counted operator by operator."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the device's storages that operators make inside the block, as long as they live.

    An op of bagel_rt counts as one operator, of which the outputs are seen: what its kernel allocates.

    Attributes:
        peak: the largest count after any operator; may be set to 0 in between.
    """

    def __init__(self, device: torch.device, *inputs: torch.Tensor):
        """``inputs`` are counted from the beginning."""
        super().__init__()
        self.device, self.peak = device, 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._count(inputs)

    @property
    def live(self) -> int:
        """The bytes alive now."""
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(size for _, size in self._made.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._count(result, {storage._cdata for storage in self._storages((args, kwargs))})
        return result

    def _count(self, values, given=frozenset()) -> None:
        for storage in self._storages(values):
            if storage._cdata not in given:  # neither a view nor written in place
                self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.live)

    def _storages(self, values):
        tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
        return [tensor.untyped_storage() for tensor in tensors if tensor.device.type == self.device.type]
