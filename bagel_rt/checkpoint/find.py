"""Find the weight files of a model folder."""

import logging
import os
import re
from pathlib import Path

from bagel_rt.checkpoint.files import DOWNLOAD, printable, read_json
from bagel_rt.checkpoint.header import PICKLES, PICKLES_UNSUPPORTED
from bagel_rt.errors import CheckpointError

_FALLBACK_STEMS = {"ema": ("model",)}
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")
_MAX_NAMES = 10  # files named in one message
_HUB_NAME = r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
# An address of the Hugging Face Hub, also as Path() writes it, or the bare name of a model.
_HUB_ID = re.compile(rf"(?:(?:https?:/+)?(?:huggingface\.co|hf\.co)/|hf:/+){_HUB_NAME}(?:/.*)?|{_HUB_NAME}")

log = logging.getLogger(__name__)


def describe_missing_folder(path: Path | str) -> str:
    """Say why a path is not a model folder and what to do. For a model on the Hub, that is to download it."""
    if os.path.isfile(path):
        return f"{path} is a file, not a folder. Give its folder, {Path(path).parent}."
    hub = _HUB_ID.fullmatch(os.fspath(path))
    if hub is None or os.path.isdir(os.path.dirname(path)):
        return f"{path}: no such folder. Give the path of a downloaded BAGEL checkpoint folder."
    name = hub[1] or hub[2]
    return (
        f"{path}: no such folder. If it is a model on the Hugging Face Hub, download it and give the new folder: "
        f"hf download {name} --local-dir {name.split('/')[1]}"
    )


def find_weights(folder: Path | str, stem: str, choice: str | None = None) -> Path:
    """Find the file to pass to :func:`~bagel_rt.checkpoint.read.load_weights`.

    The order is ``<stem>.safetensors``, the index ``<stem>.safetensors.index.json``, and shards without an index
    ``<stem>-0000k-of-0000N.safetensors``; for ``ema`` then the same of ``model``. An index without any of its shards
    does not count: the published folder contains one. A log message says which of several files is used, and that an
    adapter is not.

    Args:
        folder: the model folder.
        stem: "ema" or "ae".
        choice: a file of the folder to use instead, or its stem.

    Raises:
        CheckpointError: no such file. The message lists the other weight files in the folder.
    """
    folder = Path(folder)
    if stem in _FALLBACK_STEMS:
        _warn_about_adapter(folder)
    if choice is not None:
        if os.path.lexists(folder / choice):
            return folder / choice
        stems: tuple[str, ...] = (choice.removesuffix(".safetensors"),)
    else:
        stems = (stem, *_FALLBACK_STEMS.get(stem, ()))
    found = [file for name in stems for file in _candidates(folder, name)]
    if not found:
        raise CheckpointError(_describe_missing_weights(folder, stems))
    if len(found) > 1:
        others = ", ".join(file.name for file in found[1:])
        log.warning(
            "%s: using the weights in %s, not %s. To choose, give a file name as `weights`.",
            folder,
            found[0].name,
            others,
        )
    return found[0]


def describe_other_weights(used: Path) -> str:
    """The safetensors files beside and below one that does not fit, as a sentence; empty if there are none."""
    stem = _SHARD_NUMBER.sub("", used.name.split(".safetensors")[0])
    return _as_sentence(
        [name for name in _other_weights(used.parent, stem) if not name.startswith((f"{stem}.", f"{stem}-"))]
    )


def _other_weights(folder: Path, stem: str) -> list[str]:
    """The safetensors files in a folder and its subfolders that may be meant, instead of those with this stem."""
    files = (file for pattern in ("*.safetensors", "*/*.safetensors") for file in sorted(folder.glob(pattern)))
    counterpart = "ema.safetensors" if stem == "ae" else "ae.safetensors"  # has a purpose of its own
    return [name for name in (os.fspath(file.relative_to(folder)) for file in files) if name != counterpart]


def _as_sentence(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"Other weight files there: {', '.join(map(printable, names[:_MAX_NAMES]))}{more}." if names else ""


def _candidates(folder: Path, stem: str) -> list[Path]:
    """Weights with this stem: a single file, an index, or shards without an index."""
    single, index = (folder / f"{stem}.safetensors{suffix}" for suffix in ("", ".index.json"))
    found = [single] if os.path.lexists(single) else []
    if os.path.lexists(index):
        return found + ([index] if _has_shards(index) else [])
    return found + sorted(folder.glob(f"{stem}-[0-9]*-of-[0-9]*.safetensors"))[:1]


def _has_shards(index: Path) -> bool:
    """Whether any shard of an index exists. True for a malformed index, so that loading it explains what is wrong."""
    try:
        shards = {*read_json(index)["weight_map"].values()}
        return any(os.path.lexists(index.parent / shard) for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError):
        return True


def _warn_about_adapter(folder: Path) -> None:
    adapter = next((name for name in _ADAPTERS if os.path.lexists(folder / name)), None)
    if adapter:
        log.warning(
            "%s contains an adapter (%s), which is not applied. Merge it into the weights to use it.", folder, adapter
        )


def _describe_missing_weights(folder: Path, stems: tuple[str, ...]) -> str:
    names = [f"{stem}.safetensors" for stem in stems]
    sentence = f"{folder} must contain {' or '.join(names)}, or shards of it"
    download = f"ownload the model: {DOWNLOAD} {folder}"
    others = _other_weights(folder, stems[0])
    if others:
        same_name = next((name for name in others if Path(name).name in names), None)
        remedy = f"Rename the right file to {names[0]}"
        if same_name:
            remedy = f"Move {same_name} there"
        elif stems[0] in _FALLBACK_STEMS:
            remedy += ", give its name as `weights`"
        return f"{sentence}. {_as_sentence(others)} {remedy}, or d{download}"
    for suffixes, reason in ((PICKLES, PICKLES_UNSUPPORTED), ((".gguf",), "GGUF is not supported")):
        unsupported = sorted(printable(file.name) for file in folder.glob("*") if file.suffix in suffixes)
        if unsupported:
            return f"{sentence}. It contains {', '.join(unsupported[:5])}, but {reason}. D{download}"
    return f"{sentence}. D{download}"
