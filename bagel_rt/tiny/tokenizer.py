"""Training of a byte-level BPE tokenizer (Sennrich et al. 2016, arXiv:1508.07909), in the file format of Qwen2.

The texts of the world are lower case, so ``tokenizer.json`` converts every text to lower case. The other files have no
field for this; the runtime reads them only without ``tokenizer.json``.

The vocabulary has the 256 bytes, then the learned merges in order, then Qwen2's special tokens in their order.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from bagel_rt.models.bagel.tokenizer_files import qwen2_backend
from bagel_rt.validation import check, integer

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""The special tokens of Qwen2.5, in the order of their ids."""

_MIN_SIZE = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """Train a tokenizer with at most ``size`` tokens, including special tokens.

    The vocabulary is smaller if no pair of tokens occurs twice in the texts any more.

    Args:
        texts: the training texts; their order does not matter.
        size: maximum vocabulary size, at least 270 (the bytes and the special tokens).

    Raises:
        ValueError: ``size`` is too small.
    """
    check("size", size, integer(_MIN_SIZE, remedy="The bytes and the special tokens need 270"))
    backend = qwen2_backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    return backend


def write_tokenizer(folder: Path | str, backend: tokenizers.Tokenizer) -> None:
    """Write ``vocab.json``, ``merges.txt``, ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json``.

    Args:
        folder: an existing folder.
        backend: a tokenizer from :func:`train_tokenizer`.
    """
    folder = Path(folder)
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))  # vocab.json and merges.txt
    ids = {name: backend.token_to_id(name) for name in SPECIAL_TOKENS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token): {"content": name, **flags} for name, token in ids.items()},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": False,
    }
    for name, content in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
