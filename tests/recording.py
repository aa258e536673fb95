"""What a CUDA graph is, on a CPU: operator calls recorded with the tensors they touched, and done again on replay.

Numbers that Python knew when the work was recorded are fixed, as are addresses; only what tensors hold may change. Ops
of this package are recorded whole, as the launches they are on a GPU: what their references read back they read again.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Recording(TorchDispatchMode):
    """Operator calls of one piece of work, which is undone after it was recorded: capturing does nothing by itself."""

    def __init__(self, work):
        super().__init__()
        self._calls, self._before = [], {}
        with self:
            work()
        for storage, content in self._before.values():
            storage.copy_(content)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(given.get(argument.name))
        outputs = func(*args, **kwargs)
        touched = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        made = [t for t in _tensors(outputs) if t.untyped_storage().data_ptr() not in touched]
        self._calls.append((func, args, kwargs, outputs, made))
        return outputs

    def _keep(self, tensor) -> None:
        """Remember what is about to be overwritten."""
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = (storage, storage.clone())

    def replay(self) -> None:
        """Do every call again; what it makes goes where its output went when it was recorded."""
        for func, args, kwargs, outputs, made in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(outputs), _tensors(again), strict=True):
                if any(old is tensor for tensor in made):
                    old.copy_(new)


def _tensors(values) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def dispatch_ops(monkeypatch) -> None:
    """Let the ops go through the dispatcher, where a recording sees them, as they do when they are compiled."""
    monkeypatch.setattr("bagel_rt.kernels.registry.is_compiling", lambda: True)
