"""Read a tokenizer from the files of a model folder, and build it from their data.

A tokenizer file is a program: its regular expressions and normalizers can take hours on a short text, and parts that
contradict each other make the tokenizers package panic. Only the vocabulary, the merges and the added tokens are
therefore taken from a file. Normalizers, pre-tokenizers and decoders are built here, from the few kinds that the models
use.
"""

import operator
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from bagel_rt.checkpoint.files import read_file, read_json
from bagel_rt.errors import CheckpointError

REMEDY = "Download the tokenizer files again from the published model folder"

# Qwen2's pre-tokenization: English contractions, words with one preceding character, single digits, punctuation, line
# breaks, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NORMALIZERS = {"NFC": normalizers.NFC, "Lowercase": normalizers.Lowercase}
# Values of tokenizer.json's model that leave a plain BPE. With dropout, a text would be tokenized at random.
_BPE_VALUES: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0, 0.0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (None, False),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}
_ADDED_TOKEN_FLAGS = ("special", "normalized", "single_word", "lstrip", "rstrip")
_MAX_BYTES = 32 << 20  # of a file; Qwen2's tokenizer.json has 7 MB
_MAX_ID = 1 << 21  # as of vocab_size in llm_config.json
_MAX_TOKEN = 1 << 10  # characters of a token; the longest published one has 256
_MAX_ADDED = 1 << 12  # added tokens; a published tokenizer has 22


def qwen2_backend(model: models.BPE, normalizer_names: Sequence[str] = ("NFC",)) -> tokenizers.Tokenizer:
    """Add Qwen2's pre-tokenization and byte alphabet to a BPE. Special tokens are not added.

    Args:
        model: a BPE over GPT-2's byte alphabet.
        normalizer_names: "NFC", "Lowercase" or both, in the order of their use.
    """
    backend = tokenizers.Tokenizer(model)
    steps: list[Any] = [_NORMALIZERS[name]() for name in normalizer_names]
    if steps:
        backend.normalizer = steps[0] if len(steps) == 1 else normalizers.Sequence(steps)
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def read_backend(folder: Path) -> tuple[tokenizers.Tokenizer, Path]:
    """Read ``tokenizer.json``, else ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``.

    Returns:
        the tokenizer, and the file to name in errors about it.

    Raises:
        FileNotFoundError: neither exists.
        CheckpointError: a file is damaged, of another kind, or does not match the others; the message names it.
    """
    whole, parts = folder / "tokenizer.json", ("vocab.json", "merges.txt", "tokenizer_config.json")
    if whole.exists():
        return _read_whole(whole), whole
    missing = [name for name in parts if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} must have tokenizer.json or all of {', '.join(parts)}; missing: {', '.join(missing)}. {REMEDY}."
        )
    vocab, merges, config = (folder / name for name in parts)
    lines = read_file(merges, _MAX_BYTES).decode("utf-8", "replace").splitlines()
    pairs = [line for line in lines if line and not line.startswith("#version")]
    backend = _bpe(read_json(vocab, _MAX_BYTES), pairs, ("NFC",), f"{vocab} and {merges.name}")
    added = read_json(config, _MAX_BYTES).get("added_tokens_decoder")
    entries = list(added.items()) if isinstance(added, dict) else added
    _add_tokens(backend, entries, f"{config}: added_tokens_decoder")
    return backend, config


def _read_whole(path: Path) -> tokenizers.Tokenizer:
    values = read_json(path, _MAX_BYTES)
    model, added = values.get("model"), values.get("added_tokens", [])
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(added, list):
        raise _unsupported(path, "model", "a byte-level BPE, as used by Qwen2", model)
    for key, allowed in _BPE_VALUES.items():
        if model.get(key) not in allowed:
            raise _unsupported(path, f"model.{key}", " or ".join(map(repr, allowed)), model[key])
    names = _normalizer_names(values.get("normalizer"), path)
    _check_pre_tokenizer(values.get("pre_tokenizer"), path)
    decoder = values.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise _unsupported(path, "decoder", "ByteLevel", decoder)
    backend = _bpe(model.get("vocab"), model.get("merges"), names, str(path))
    entries = [(token.get("id") if isinstance(token, dict) else None, token) for token in added]
    _add_tokens(backend, entries, f"{path}: added_tokens")
    return backend


def _normalizer_names(value: Any, path: Path) -> list[str]:
    if value is None:
        return []
    steps = value.get("normalizers") if isinstance(value, dict) and value.get("type") == "Sequence" else [value]
    names = [str(step.get("type")) for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    if not 1 <= len(names) <= 2 or not set(names) <= set(_NORMALIZERS):
        raise _unsupported(path, "normalizer", "null, NFC, Lowercase or a sequence of both", value)
    return names


def _check_pre_tokenizer(value: Any, path: Path) -> None:
    """CheckpointError if it splits a text in another way than :func:`qwen2_backend`."""
    try:
        split, to_bytes = value["pretokenizers"]
        same = value["type"] == "Sequence" and split["type"] == "Split" and to_bytes["type"] == "ByteLevel"
        same &= split["pattern"] == {"Regex": _SPLIT} and split["behavior"] == "Isolated" and not split["invert"]
        same &= not to_bytes["add_prefix_space"] and not to_bytes["use_regex"]
    except (KeyError, TypeError, ValueError):
        same = False
    if not same:
        raise _unsupported(path, "pre_tokenizer", "Qwen2's: a Split by its regular expression, then ByteLevel", value)


def _bpe(vocab: Any, merges: Any, names: Sequence[str], source: str) -> tokenizers.Tokenizer:
    try:
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
        if any(len(pair) != 2 or not all(isinstance(part, str) for part in pair) for pair in pairs):
            raise ValueError("a merge is not a pair of tokens")
        ids = vocab.values()
        if not all(type(token) is int and 0 <= token < _MAX_ID for token in ids) or len(set(ids)) < len(vocab):
            raise ValueError(f"the ids must be different integers from 0 to {_MAX_ID - 1}")
        if max(map(len, vocab), default=0) > _MAX_TOKEN:
            raise ValueError(f"a token must have at most {_MAX_TOKEN} characters")
        unknown = next((part for pair in pairs for part in (*pair, "".join(pair)) if part not in vocab), None)
        if unknown is not None:
            raise ValueError(f"the token {unknown[:60]!r} of a merge is not in the vocabulary")
        return qwen2_backend(models.BPE(vocab, pairs), names)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} are not a valid BPE: {error}. {REMEDY}.") from None


def _add_tokens(backend: tokenizers.Tokenizer, entries: Any, source: str) -> None:
    """Add tokens in the order of their ids. ``entries`` should be pairs of an id, which may be a string, and flags."""
    if not isinstance(entries, list) or len(entries) > _MAX_ADDED:
        raise CheckpointError(f"{source} must have at most {_MAX_ADDED} tokens, got {reprlib.repr(entries)}. {REMEDY}.")
    added = []
    for key, entry in entries:
        try:
            flags = {flag: _boolean(entry[flag]) for flag in _ADDED_TOKEN_FLAGS if flag in entry}
            if not 0 < len(entry["content"]) <= _MAX_TOKEN:
                raise ValueError
            added.append((int(key), AddedToken(entry["content"], **flags)))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{source} must have tokens with an id, a content of 1 to {_MAX_TOKEN} characters and flags, got "
                f"{reprlib.repr(entry)} with the id {reprlib.repr(key)}. {REMEDY}."
            ) from None
    for token, one in sorted(added, key=operator.itemgetter(0)):
        backend.add_tokens([one])
        if backend.token_to_id(one.content) != token:
            raise CheckpointError(
                f"{source}: the id of {one.content} must be {backend.token_to_id(one.content)} to follow the "
                f"vocabulary, got {token}. {REMEDY}."
            )


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _unsupported(path: Path, name: str, allowed: str, value: Any) -> CheckpointError:
    return CheckpointError(f"{path}: {name} must be {allowed}, got {reprlib.repr(value)}. {REMEDY}.")
