"""Emulate CUDA graphs on a CPU: record operator calls with their tensors, and repeat them on replay.

As in a CUDA graph, Python values and tensor addresses are fixed at capture; only the contents of tensors may change. An
op of this package is recorded as one call, like its kernel launch on a GPU.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Recording(TorchDispatchMode):
    """The operator calls of ``work``. As in a capture, in-place writes of the recorded run have no effect."""

    def __init__(self, work):
        super().__init__()
        self._calls, self._before = [], {}
        with self:
            work()
        for storage, content in self._before.values():
            storage.copy_(content)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._save(values.get(argument.name))
        outputs = func(*args, **kwargs)
        inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        allocated = [t for t in _tensors(outputs) if t.untyped_storage().data_ptr() not in inputs]
        self._calls.append((func, args, kwargs, outputs, allocated))
        return outputs

    def _save(self, tensor) -> None:
        """Save the contents of a tensor before its first in-place write."""
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = (storage, storage.clone())

    def replay(self) -> None:
        """Repeat every call, and copy newly allocated outputs to the addresses of the recorded ones."""
        for func, args, kwargs, outputs, allocated in self._calls:
            repeated = func(*args, **kwargs)
            for old, new in zip(_tensors(outputs), _tensors(repeated), strict=True):
                if any(old is tensor for tensor in allocated):
                    old.copy_(new)


def _tensors(values) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def dispatch_ops(monkeypatch) -> None:
    """Call the ops through the dispatcher, as under torch.compile, where a recording intercepts them."""
    monkeypatch.setattr("bagel_rt.kernels.registry.is_compiling", lambda: True)
