"""The KV caches of official callers: the contents of a ``NaiveCache`` as contexts of this runtime.

Official code passes a cache from call to call and uses four of its attributes: ``key_cache`` and ``value_cache``, which
map each layer to a tensor or None, ``num_layers`` and ``seq_lens``. The entry points fill a cache by replacing both
mappings with :class:`LayerTensors`, which read the tensors from the runtime's KV cache. A cache that official code
filled is copied into contexts when an entry point first reads it.
"""

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NoReturn, Protocol

import torch

from bagel_rt.runtime.context import Context, DecodedText
from bagel_rt.runtime.slots import KVCache
from bagel_rt.validation import invalid


class OfficialCache(Protocol):
    """The attributes of an official ``NaiveCache``."""

    key_cache: Mapping[int, torch.Tensor | None]
    value_cache: Mapping[int, torch.Tensor | None]


class ContextCache:
    """An empty cache with the attributes of the official one, for use without the official code."""

    def __init__(self, num_layers: int):
        self.key_cache: Mapping[int, torch.Tensor | None] = dict.fromkeys(range(num_layers))
        self.value_cache: Mapping[int, torch.Tensor | None] = dict.fromkeys(range(num_layers))

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.key_cache)

    @property
    def seq_lens(self) -> int:
        """Number of cached tokens, summed over samples."""
        return token_count(self)


class ContextBatch:
    """The contexts that a cache holds, one per sample of a batch.

    ``copy.deepcopy`` copies no keys and values: a copy shares its slots until one of the two is extended.
    """

    def __init__(self, contexts: Sequence[Context]):
        self.contexts = list(contexts)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContextBatch":
        return ContextBatch([context.clone() for context in self.contexts])

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a context cannot be pickled, because its keys and values are in the model's KV cache. Save the texts and "
            "images, and update a new context with them."
        )


class LayerTensors(MutableMapping[int, torch.Tensor | None]):
    """Layer -> keys or values of all samples, [tokens, kv_heads, head_dim], read from contexts; None if they are empty.

    The ``key_cache`` or ``value_cache`` of an official cache. Tensors that official code stores replace those of the
    contexts.
    """

    def __init__(self, batch: ContextBatch, cache: KVCache, buffer: str):
        """
        Args:
            batch: the contexts, in the order of the samples.
            cache: the KV cache of the contexts.
            buffer: "k" or "v".
        """
        self.batch, self.cache, self.buffer = batch, cache, buffer
        self.stored: dict[int, torch.Tensor | None] = {}  # by official code

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerTensors":
        twin = LayerTensors(copy.deepcopy(self.batch, memo), self.cache, self.buffer)
        twin.stored = copy.deepcopy(self.stored, memo)
        return twin

    def __getitem__(self, layer: int) -> torch.Tensor | None:
        if layer in self.stored:
            return self.stored[layer]
        if layer not in range(len(self)):
            raise KeyError(layer)
        tensors: torch.Tensor = getattr(self.cache, self.buffer)[layer]
        parts = [tensors[context.key_start :][: context.length] for context in self.batch.contexts if context.length]
        return torch.cat(parts) if parts else None

    def __setitem__(self, layer: int, tensor: torch.Tensor | None) -> None:
        self.stored[layer] = tensor

    def __delitem__(self, layer: int) -> None:
        raise TypeError("a layer of a cache cannot be deleted")

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self.cache.k)


def token_count(cache: OfficialCache) -> int:
    """Number of tokens in an official cache, summed over samples."""
    layers = cache.key_cache
    if isinstance(layers, LayerTensors) and not layers.stored:
        return sum(context.length for context in layers.batch.contexts)
    tensor = layers[0] if layers else None
    return 0 if tensor is None else len(tensor)


def read_contexts(official: OfficialCache | None, lengths: Sequence[int], cache: KVCache) -> list[Context]:
    """The contexts of a caller's cache, one per sample; new ones if the cache is None or empty, regardless of lengths.

    Args:
        official: a ``NaiveCache`` or :class:`ContextCache`. If official code filled it, it is copied into new contexts,
            whose RoPE positions the caller must set.
        lengths: tokens of each sample in the cache, as the caller counts them.
        cache: the KV cache of the model.

    Raises:
        TypeError: not an official cache.
        ValueError: the lengths are not those of the cache, or it belongs to another model.
    """
    if official is not None and not hasattr(official, "key_cache"):
        raise TypeError(
            f"past_key_values must be a NaiveCache, got {type(official).__name__}. Pass the cache that the official "
            "code creates."
        )
    if official is None or not token_count(official):
        return [Context(cache) for _ in lengths]
    layers = official.key_cache
    if not isinstance(layers, LayerTensors) or layers.stored:
        contexts = _import_contexts(official, lengths, cache)
        write_contexts(official, contexts, cache)
        return contexts
    if layers.cache is not cache:
        raise ValueError("past_key_values must belong to this model. Start with an empty cache.")
    contexts = layers.batch.contexts
    cached = [context.length for context in contexts]
    if cached != list(lengths):
        raise invalid("key_values_lens", list(lengths), f"{cached}, the lengths of past_key_values")
    return contexts


def write_contexts(official: OfficialCache, contexts: Sequence[Context], cache: KVCache) -> None:
    """Fill a caller's cache with contexts."""
    layers = official.key_cache
    if isinstance(layers, LayerTensors) and not layers.stored and layers.batch.contexts is contexts:
        return
    batch = ContextBatch(contexts)
    official.key_cache, official.value_cache = LayerTensors(batch, cache, "k"), LayerTensors(batch, cache, "v")


def _import_contexts(official: OfficialCache, lengths: Sequence[int], cache: KVCache) -> list[Context]:
    """Copy keys and values that official code computed into new contexts."""
    if len(official.key_cache) != len(cache.k):
        raise invalid("past_key_values", len(official.key_cache), f"a cache of {len(cache.k)} layers, as the model has")
    if sum(lengths) != token_count(official):
        allowed = f"lengths that add up to {token_count(official)}, the length of past_key_values"
        raise invalid("key_values_lens", list(lengths), allowed)
    contexts = [Context(cache) for _ in lengths]
    for context, length in zip(contexts, lengths, strict=True):
        if length:
            context.extend(length)
            # Whether imported contexts are equal is unknown, so each gets a unique history.
            context.history = (_Imported(()),)
    for buffer, layers in (("k", official.key_cache), ("v", official.value_cache)):
        for layer in range(len(cache.k)):
            tensor = layers[layer]
            if tensor is None:
                raise ValueError(f"past_key_values must be filled in every layer, got none in layer {layer}.")
            target = getattr(cache, buffer)[layer]
            for context, part in zip(contexts, tensor.split(list(lengths)), strict=True):
                target[context.key_start :][: context.length] = part
    return contexts


class _Imported(DecodedText):
    """The unknown contents of an imported context; equal to itself only."""

    __eq__, __hash__ = object.__eq__, object.__hash__
