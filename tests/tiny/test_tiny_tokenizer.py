"""Trained tokenizers, as loaded by the runtime."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_rt.checkpoint import DEFAULT_MODEL
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.tiny.examples import texts
from bagel_rt.tiny.tokenizer import SPECIAL_TOKENS, train_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, train_tokenizer(texts(np.random.default_rng(0), 2000), 600))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def test_words_of_the_world_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("two green squares above a red circle")) == 7
    assert len(tokenizer) <= 600


@settings(max_examples=30)
@given(st.text())
def test_encode_decode_round_trip_in_lower_case(tokenizer, text):
    lower = "".join(character.lower() for character in unicodedata.normalize("NFC", text))
    assert tokenizer.decode(tokenizer.encode(text)) == lower


@pytest.mark.parametrize("source", ["trained", "embedded"])
def test_case_does_not_change_the_tokens(tokenizer, source):
    tokenizer = tokenizer if source == "trained" else Tokenizer.from_folder(DEFAULT_MODEL)
    assert tokenizer.encode("A Large Red STAR.<|im_end|>") == tokenizer.encode("a large red star.<|im_end|>")


def test_special_tokens_are_last_in_qwen2_order(tokenizer):
    first = len(tokenizer) - len(SPECIAL_TOKENS)
    ids = [tokenizer.encode(name) for name in SPECIAL_TOKENS]
    assert ids == [[first + index] for index in range(len(SPECIAL_TOKENS))]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.start_of_image) == (first + 1, first + 2, first + 9)


def test_vocab_and_merges_match_tokenizer_json(folder, tokenizer, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    parts = Tokenizer.from_folder(tmp_path)
    for text in ["a pink star in the top left corner<|im_end|>", "größe 12\n\n  x", ""]:
        assert parts.encode(text) == tokenizer.encode(text)


def test_order_of_texts_does_not_matter():
    corpus = list(texts(np.random.default_rng(1), 500))
    assert train_tokenizer(corpus, 400).to_str() == train_tokenizer(corpus[::-1], 400).to_str()


def test_config_files_agree_on_the_eos_token(folder, tokenizer):
    generation = json.loads((folder / "generation_config.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert generation["eos_token_id"][0] == tokenizer.eos
    assert config["added_tokens_decoder"][str(tokenizer.eos)]["content"] == config["eos_token"] == "<|im_end|>"


def test_rejects_vocabulary_smaller_than_the_bytes():
    with pytest.raises(ValueError, match="size must be an integer >= 270, got 269"):
        train_tokenizer([], 269)
    assert train_tokenizer([], 270).get_vocab_size() == 270
