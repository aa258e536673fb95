"""Tokenizers learnt on texts, as the runtime reads them."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.tiny.examples import texts
from bagel_rt.tiny.tokenizer import SPECIAL_TOKENS, learn_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, learn_tokenizer(texts(np.random.default_rng(0), 2000), 600))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def test_words_of_the_world_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("two green squares above a red circle")) == 7
    assert len(tokenizer) <= 600


@settings(max_examples=30)
@given(st.text())
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_special_tokens_end_the_vocabulary_in_qwen2s_order(tokenizer):
    first = len(tokenizer) - len(SPECIAL_TOKENS)
    ids = [tokenizer.encode(name) for name in SPECIAL_TOKENS]
    assert ids == [[first + index] for index in range(len(SPECIAL_TOKENS))]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.start_of_image) == (first + 1, first + 2, first + 9)


def test_both_sets_of_files_say_the_same(folder, tokenizer, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    parts = Tokenizer.from_folder(tmp_path)
    for text in ["a pink star in the top left corner<|im_end|>", "Größe 12\n\n  x", ""]:
        assert parts.encode(text) == tokenizer.encode(text)


def test_the_order_of_texts_plays_no_part():
    given = list(texts(np.random.default_rng(1), 500))
    assert learn_tokenizer(given, 400).to_str() == learn_tokenizer(given[::-1], 400).to_str()


def test_the_files_that_loaders_of_transformers_read_agree(folder, tokenizer):
    generation = json.loads((folder / "generation_config.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert generation["eos_token_id"][0] == tokenizer.eos
    assert config["added_tokens_decoder"][str(tokenizer.eos)]["content"] == config["eos_token"] == "<|im_end|>"


def test_a_size_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="size must be an integer >= 270, got 269"):
        learn_tokenizer([], 269)
    assert learn_tokenizer([], 270).get_vocab_size() == 270
