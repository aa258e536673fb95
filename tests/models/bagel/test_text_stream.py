"""Streams of tokens against whole answers."""

import json

import pytest
from conftest import CHECKPOINT, PACK
from hypothesis import example, given
from hypothesis import strategies as st

from bagel_rt.models.bagel.tokenizer import END, START, TextStream, Tokenizer

META = json.loads((PACK / "cases" / "00_tokenizer" / "meta.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole() -> Tokenizer:
    return Tokenizer.from_folder(CHECKPOINT)


stream_parts = st.one_of(
    st.integers(0, META["tokenizer_length"] + 20),  # includes ids of a padded vocabulary
    st.sampled_from([START, END, "<|im_", "end|>", "start|>", "<|im_end|", "<<|", "é世🚲", "ind", "<think>"]),
)


@given(parts_=st.lists(stream_parts, max_size=30))
@example(parts_=["<|im_e", "<|im_end|>"])
@example(parts_=["a<|im_end", END, "b"])
@example(parts_=["a<|im_end"])
@example(parts_=["<|im_end", "|>b"])
def test_stream_concatenates_to_the_answer(whole, parts_):
    ids = []
    for part in parts_:
        ids += [part] if isinstance(part, int) else one_byte_tokens(whole, part)
    stream = TextStream(whole)
    pieces = [stream.feed(token) for token in ids]
    assert "".join([*pieces, stream.finish()]) == whole.answer([whole.bos, *ids])


def one_byte_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode with one token per byte, which splits special tokens and characters."""
    ids = {tokenizer.spell(token): token for token in range(len(tokenizer))}
    return [ids[bytes([byte])] for byte in text.encode()]


def test_stream_emits_a_character_when_it_is_complete(whole):
    stream = TextStream(whole)
    assert [stream.feed(token) for token in one_byte_tokens(whole, "a世é")] == ["a", "", "", "世", "", "é"]
    assert stream.finish() == ""


def test_stream_replaces_an_incomplete_last_character(whole):
    stream = TextStream(whole)
    assert [stream.feed(token) for token in one_byte_tokens(whole, "世")[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_stream_delays_only_text_that_may_become_a_marker(whole):
    stream = TextStream(whole)
    assert [stream.feed(token) for token in one_byte_tokens(whole, "<b<|i<")] == ["", "<b", "", "", "", "<|i"]
    assert stream.finish() == "<"


@pytest.mark.parametrize("marker", [START, END])
def test_stream_ends_at_a_marker(whole, marker):
    stream = TextStream(whole)
    fed = [*whole.encode("ab"), *whole.encode(marker), *whole.encode("cd")]
    assert "".join(map(stream.feed, fed)) == "ab" and stream.finish() == ""
