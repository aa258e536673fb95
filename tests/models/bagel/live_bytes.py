"""Measure the tensor memory that a block of code allocates, operator by operator."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages on one device that operators allocate inside the block, until they are freed.

    An op of bagel_rt is one operator: only its outputs are counted, as for its kernel on a GPU.

    Attributes:
        peak: the maximum of ``live`` after any operator; may be reset to 0.
    """

    def __init__(self, device: torch.device, *inputs: torch.Tensor):
        """Count the storages of ``inputs`` too."""
        super().__init__()
        self.device, self.peak = device, 0
        self._allocations: dict[int, tuple[StorageWeakRef, int]] = {}
        self._count(inputs)

    @property
    def live(self) -> int:
        """Bytes allocated now."""
        self._allocations = {key: item for key, item in self._allocations.items() if not item[0].expired()}
        return sum(size for _, size in self._allocations.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._count(result, {storage._cdata for storage in self._storages((args, kwargs))})
        return result

    def _count(self, values, inputs=frozenset()) -> None:
        for storage in self._storages(values):
            if storage._cdata not in inputs:  # an output that shares an input's storage is a view or an in-place result
                self._allocations.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.live)

    def _storages(self, values):
        tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
        return [tensor.untyped_storage() for tensor in tensors if tensor.device.type == self.device.type]
