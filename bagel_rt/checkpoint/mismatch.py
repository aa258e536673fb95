"""Explain why the tensors of a checkpoint are not those of the model: the cause, the remedy, then a few details."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bagel_rt.checkpoint.files import DOWNLOAD, printable
from bagel_rt.checkpoint.find import describe_other_weights
from bagel_rt.checkpoint.header import DTYPES, StoredTensor, error_report
from bagel_rt.errors import CheckpointError

if TYPE_CHECKING:
    from bagel_rt.checkpoint.read import WeightSlot

_EXAMPLES = 2  # tensors of each kind of mismatch that are listed
_QUANTIZED = "is quantized ({}), which is not supported"
# Part of the name of an additional tensor -> what the file is.
_FORMATS = {
    ".encoded_exponent": "is compressed (DFloat11, DF11), which is not supported",
    ".sign_mantissa": "is compressed (DFloat11, DF11), which is not supported",
    ".quant_state.bitsandbytes__nf4": _QUANTIZED.format("bitsandbytes, NF4"),
    ".quant_state.bitsandbytes__fp4": _QUANTIZED.format("bitsandbytes, FP4"),
    ".absmax": _QUANTIZED.format("bitsandbytes, 4 bits"),
    ".SCB": _QUANTIZED.format("bitsandbytes, INT8"),
    ".qweight": _QUANTIZED.format("GPTQ or AWQ"),
    ".weight_packed": _QUANTIZED.format("compressed-tensors"),
    ".lora_": "contains an adapter (LoRA) instead of whole weights, which is not supported",
    "lora_unet_": "contains an adapter (LoRA) instead of whole weights, which is not supported",
    "encoder.down_blocks.": "contains an autoencoder with the names of diffusers, which is not supported",
}
# Stored dtype -> kind of quantization.
_QUANTIZED_DTYPES = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "INT8", "U8": "8 or 4 bits", "I32": "packed integers"}


def explain_mismatch(
    path: Path,
    stored: Mapping[str, StoredTensor],
    slots: Mapping[str, "WeightSlot"],
    missing: Sequence[str],
    unexpected: Sequence[str],
) -> CheckpointError | None:
    """The error for a checkpoint that does not match the slots; None if it matches.

    Args:
        path: the file or index.
        stored: the tensors of the checkpoint.
        slots: the tensors that it must contain.
        missing, unexpected: names that only one of them has.
    """
    present = [name for name in slots if name in stored]
    shapes = [name for name in present if stored[name].shape != slots[name].shape]
    dtypes = [name for name in present if stored[name].dtype not in DTYPES]
    details = [
        *_examples([f"missing tensor {name} of shape {list(slots[name].shape)}" for name in missing], "missing"),
        *_examples(
            [f"dtype of {name} must be {', '.join(DTYPES)}, got {printable(stored[name].dtype)}" for name in dtypes],
            "of another dtype",
        ),
        *_examples(
            [f"shape of {name} must be {list(slots[name].shape)}, got {list(stored[name].shape)}" for name in shapes],
            "of another shape",
        ),
        *_examples(
            [f"unexpected tensor {printable(name)} of shape {list(stored[name].shape)}" for name in unexpected],
            "unexpected",
        ),
    ]
    if not details:
        return None
    # A format with names of its own leaves the model's tensors missing, and stores integers under other names.
    odd_dtypes = {stored[name].dtype for name in [*dtypes, *(unexpected if missing else ())]}
    cause = _other_format(unexpected, odd_dtypes)
    download = f"ownload the published weights: {DOWNLOAD} {path.parent}"
    if cause:
        sentence = f"{path} {cause}. D{download}"
    else:
        cause = _other_model(slots, missing, shapes, unexpected)
        sentence = f"{path} {cause}. Use the configuration and the weights of the same model folder, or d{download}"
    return error_report(sentence, details, describe_other_weights(path))


def _examples(lines: Sequence[str], kind: str) -> list[str]:
    more = [f"and {len(lines) - _EXAMPLES} more {kind}"] if len(lines) > _EXAMPLES else []
    return [*lines[:_EXAMPLES], *more]


def _other_format(unexpected: Sequence[str], dtypes: set[str]) -> str | None:
    """What the file is, if the names or dtypes of its tensors show a known format."""
    for part, cause in _FORMATS.items():
        if any(part in name for name in unexpected):
            return cause
    kind = next((_QUANTIZED_DTYPES[dtype] for dtype in sorted(dtypes) if dtype in _QUANTIZED_DTYPES), None)
    if kind == "fp8" and any("scale" in name for name in unexpected):
        kind = "fp8, scaled"
    return _QUANTIZED.format(kind) if kind else None


def _other_model(
    slots: Mapping[str, "WeightSlot"], missing: Sequence[str], shapes: Sequence[str], unexpected: Sequence[str]
) -> str:
    """How the file differs from the model."""
    required = {name: slot.part for name, slot in slots.items() if slot.default is None}
    if len(missing) == len(required):
        return f"contains none of the {len(required)} tensors of the model"
    absent = {required[name] for name in missing}
    lost = set(missing)
    if missing and all(name in lost for name, part in required.items() if part in absent):
        return f"has no {' and no '.join(sorted(absent))}, but the whole model is needed"
    if missing:
        return f"has only {len(required) - len(missing)} of the {len(required)} tensors of the model"
    if shapes:
        return f"has {_count(shapes)} of other shapes than the model that the configuration describes"
    return f"has {_count(unexpected)} beyond those of the model"


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
