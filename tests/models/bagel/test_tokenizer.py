"""The tokenizer against recorded ids; both ways to load it against each other; text streams against whole answers."""

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from conftest import CHECKPOINT, PACK
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, processors

from bagel_rt.errors import CheckpointError
from bagel_rt.models.bagel.tokenizer import END, START, TextStream, Tokenizer

META = json.loads((PACK / "cases" / "00_tokenizer" / "meta.json").read_text(encoding="utf-8"))
PARTS = ("vocab.json", "merges.txt", "tokenizer_config.json")

texts = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.text("aeht' \n\r\t13.,é世\u0301\u00a0", max_size=12),
        st.sampled_from([START, END, "<|vision_start|>", "<|im", "_end|>", "<", "\r\n", "'LL", "  the  "]),
    ),
    max_size=8,
).map("".join)


def copy_files(folder: Path, names=PARTS) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(CHECKPOINT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Tokenizer:
    """Read from tokenizer.json alone."""
    return Tokenizer.from_folder(copy_files(tmp_path_factory.mktemp("whole"), ["tokenizer.json"]))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Tokenizer:
    """Read from vocab.json, merges.txt and tokenizer_config.json."""
    return Tokenizer.from_folder(copy_files(tmp_path_factory.mktemp("parts")))


@pytest.fixture(params=["whole", "parts"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


# Recorded truth


def test_special_tokens_and_length_are_the_recorded_ones(tokenizer):
    names = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "start_of_image": tokenizer.start_of_image,
        "end_of_image": tokenizer.end_of_image,
    }
    assert names == META["special_token_ids"]
    assert len(tokenizer) == META["tokenizer_length"]


@pytest.mark.parametrize("row", META["encode"], ids=lambda row: ascii(row["text"][:30]))
def test_encodes_to_the_recorded_ids_and_back(tokenizer, row):
    assert tokenizer.encode(row["text"]) == row["ids"]
    assert tokenizer.decode(row["ids"]) == row["roundtrip"]


@pytest.mark.parametrize("row", META["decode"], ids=lambda row: str(row["ids"][:4]))
def test_decodes_any_ids_to_the_recorded_text(tokenizer, row):
    assert tokenizer.decode(row["ids"]) == row["text"]


def recorded_answers() -> list:
    """What was generated and what the official code said it was, of every case that recorded both."""
    found = []
    for path in sorted(PACK.glob("cases/*/meta.json")):
        meta = json.loads(path.read_text(encoding="utf-8"))
        said = [output["text"] for output in meta.get("outputs", []) if "text" in output]
        for generated, text in zip(meta.get("text_generations", []), said):  # noqa: B905 (scripted texts have no ids)
            found.append(pytest.param(generated["returned_ids_including_start"], text, id=path.parent.name))
    return found


@pytest.mark.parametrize("ids, text", recorded_answers())
def test_answers_are_the_recorded_ones(tokenizer, ids, text):
    assert tokenizer.answer(ids) == text


# Both ways to load


@given(text=texts)
def test_the_parts_encode_as_the_whole(whole, parts, text):
    assert parts.encode(text) == whole.encode(text)


def test_the_parts_split_and_spell_as_the_whole(whole, parts):
    # The small vocabulary has few merges that a wrong split would show in, so the rules themselves are compared.
    first, second = (json.loads(tokenizer._backend.to_str()) for tokenizer in (whole, parts))
    assert first == second | {"post_processor": first["post_processor"]}  # which corrects offsets, not ids


@pytest.mark.parametrize("flag", ["special", "normalized", "single_word", "lstrip", "rstrip"])
def test_the_parts_give_added_tokens_the_flags_of_the_whole(tmp_path, flag):
    copy_files(tmp_path, [*PARTS, "tokenizer.json"])
    flip = {"special": False}.get(flag, True)
    edit(tmp_path, "tokenizer_config.json", lambda values: values["added_tokens_decoder"]["358"].update({flag: flip}))
    edit(tmp_path, "tokenizer.json", lambda values: values["added_tokens"][6].update({flag: flip}))
    whole = Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    first, second = (t._backend.get_added_tokens_decoder() for t in (whole, Tokenizer.from_folder(tmp_path)))
    assert first[358].content == "<|box_end|>" and getattr(first[358], flag) is flip
    assert {token: repr(added) for token, added in first.items()} == {t: repr(added) for t, added in second.items()}


def test_the_whole_is_preferred(tmp_path):
    copy_files(tmp_path, [*PARTS, "tokenizer.json"])
    (tmp_path / "vocab.json").write_text("{}")
    assert len(Tokenizer.from_folder(str(tmp_path))) == META["tokenizer_length"]


# Properties


@given(text=texts)
@example(text="e\u0301")
@example(text=END + "\u0338")  # the last character and the mark compose: then it is no special token
def test_text_comes_back_in_nfc(whole, text):
    assert whole.decode(whole.encode(text)) == unicodedata.normalize("NFC", text)


@given(ids=st.lists(st.integers(0, META["tokenizer_length"] - 1), max_size=40))
def test_decoding_agrees_with_the_tokenizers_package(whole, ids):
    assert whole.decode(ids) == whole._backend.decode(ids, skip_special_tokens=False)


def test_an_added_token_outside_the_byte_alphabet_spells_itself():
    backend = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    backend.add_tokens(["<new word>"])
    tokenizer = Tokenizer(backend, "test")
    assert tokenizer.decode(tokenizer.encode("a <new word>!")) == "a <new word>!"


def test_nothing_is_cut_or_filled_up_whatever_the_file_says():
    backend = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    assert Tokenizer(backend, "test").decode(Tokenizer(backend, "test").encode("a long text")) == "a long text"


def test_nothing_is_added_whatever_the_file_says():
    backend = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(f"{START} $A", special_tokens=[(START, 353)])
    assert Tokenizer(backend, "test").encode("ind") == [285]


# Streams

pieces_of = st.one_of(
    st.integers(0, META["tokenizer_length"] + 20),  # with ids that only the padded vocabulary has
    st.sampled_from([START, END, "<|im_", "end|>", "start|>", "<|im_end|", "<<|", "é世🚲", "ind", "<think>"]),
)


@given(parts_=st.lists(pieces_of, max_size=30))
@example(parts_=["<|im_e", "<|im_end|>"])
@example(parts_=["a<|im_end", END, "b"])
@example(parts_=["a<|im_end"])
@example(parts_=["<|im_end", "|>b"])
def test_a_stream_adds_up_to_the_answer(whole, parts_):
    ids = []
    for part in parts_:
        ids += [part] if isinstance(part, int) else spelled_out(whole, part)
    stream = TextStream(whole)
    pieces = [stream.feed(token) for token in ids]
    assert "".join([*pieces, stream.finish()]) == whole.answer([whole.bos, *ids])


def spelled_out(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text one byte per token: special tokens in letters, characters in pieces."""
    ids = {tokenizer.spell(token): token for token in range(len(tokenizer))}
    return [ids[bytes([byte])] for byte in text.encode()]


def test_characters_come_whole_and_as_soon_as_they_are(whole):
    stream = TextStream(whole)
    assert [stream.feed(token) for token in spelled_out(whole, "a世é")] == ["a", "", "", "世", "", "é"]
    assert stream.finish() == ""


def test_half_a_character_at_the_end_is_replaced(whole):
    stream = TextStream(whole)
    assert [stream.feed(token) for token in spelled_out(whole, "世")[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_only_what_may_begin_a_marker_is_held_back(whole):
    stream = TextStream(whole)
    assert [stream.feed(token) for token in spelled_out(whole, "<b<|i<")] == ["", "<b", "", "", "", "<|i"]
    assert stream.finish() == "<"


@pytest.mark.parametrize("marker", [START, END])
def test_nothing_follows_a_marker(whole, marker):
    stream = TextStream(whole)
    fed = [*whole.encode("ab"), *whole.encode(marker), *whole.encode("cd")]
    assert "".join(map(stream.feed, fed)) == "ab" and stream.finish() == ""


# Refused

BAD_CALLS = {
    "text-that-is-bytes": (lambda t: t.encode(b"a"), "text must be a str, got bytes"),
    "no-text": (lambda t: t.encode(None), "got NoneType"),
    "half-a-surrogate-pair": (lambda t: t.encode("a\ud83d"), "surrogates"),
    "an-id-past-the-end": (lambda t: t.decode([64, len(t)]), "token id must be one of the 366 ids from 0, got 366"),
    "a-negative-id": (lambda t: t.decode([-1]), "token id must be a whole number from 0 .*, got -1"),
    "an-id-that-is-text": (lambda t: t.decode("abc"), "token id must be a whole number from 0 .*, got 'a'"),
    "a-fraction-in-an-answer": (lambda t: t.answer([t.bos, 1.5]), "got 1.5"),
    "a-negative-id-in-a-stream": (lambda t: TextStream(t).feed(-3), "got -3"),
    "an-answer-without-its-start": (lambda t: t.answer([64, 65]), "must contain <|im_start|>, got 'ab'"),
}


@pytest.mark.parametrize("call, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_refuses(whole, call, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        call(whole)


def edit(folder: Path, name: str, change) -> None:
    path = folder / name
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def no_token(table: dict) -> None:
    del table["added_tokens_decoder"]["361"]


DAMAGED = {
    "tokenizer-json-cut-short": (
        "tokenizer.json", lambda p: p.write_bytes(p.read_bytes()[:5000]), "tokenizer.json is not a tokenizer: ",
    ),
    "tokenizer-json-that-is-a-list": ("tokenizer.json", lambda p: p.write_text("[]"), "is not a tokenizer: "),
    "tokenizer-json-that-is-a-folder": (
        "tokenizer.json", lambda p: (p.unlink(), p.mkdir()), "tokenizer.json is not a file",
    ),
    "no-start-of-image-in-tokenizer-json": (
        "tokenizer.json",
        lambda p: edit(p.parent, p.name, lambda v: v["added_tokens"].pop(9)),
        r"tokenizer.json has no token <\|vision_start\|>, which frames",
    ),
    "a-byte-that-no-token-spells": (
        "tokenizer.json",
        lambda p: edit(p.parent, p.name, lambda v: v["model"]["vocab"].update({"new": v["model"]["vocab"].pop("~")})),
        "tokenizer.json has no token for 1 of the 256 bytes",
    ),
    "vocab-cut-short": (
        "vocab.json", lambda p: p.write_bytes(p.read_bytes()[:900]), "vocab.json and merges.txt are not a BPE",
    ),
    "an-empty-vocab": ("vocab.json", lambda p: p.write_text("{}"), "vocab.json and merges.txt are not a BPE"),
    "merges-of-unknown-tokens": (
        "merges.txt", lambda p: p.write_text("#version: 0.2\nthe fox\n"), "vocab.json and merges.txt are not a BPE",
    ),
    "merges-of-one-word": ("merges.txt", lambda p: p.write_text("#version: 0.2\nt h\nthe\n"), "not a BPE vocabulary"),
    "a-config-that-is-not-json": ("tokenizer_config.json", lambda p: p.write_text("{"), "_config.json is not JSON"),
    "a-config-without-added-tokens": (
        "tokenizer_config.json", lambda p: p.write_text("{}"), "_config.json: added_tokens_decoder must .*, got None",
    ),
    "an-added-token-without-an-id": (
        "tokenizer_config.json",
        lambda p: edit(p.parent, p.name, lambda v: v["added_tokens_decoder"].update(x={"content": "<x>"})),
        "added_tokens_decoder must map ids to a token's content and flags, got",
    ),
    "an-added-token-without-content": (
        "tokenizer_config.json",
        lambda p: edit(p.parent, p.name, lambda v: v["added_tokens_decoder"].update({"400": {"text": "<x>"}})),
        "added_tokens_decoder must map ids to a token's content and flags, got",
    ),
    "an-added-token-that-is-missing": (
        "tokenizer_config.json",
        lambda p: edit(p.parent, p.name, no_token),
        r"gives <\|vision_end\|> the id 362, but appended to vocab.json it gets 361: the files do not match",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name, damage, message", DAMAGED.values(), ids=DAMAGED)
def test_names_the_damaged_file_and_the_remedy(tmp_path, name, damage, message):
    copy_files(tmp_path, ["tokenizer.json"] if name == "tokenizer.json" else PARTS)
    damage(tmp_path / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "published" in str(caught.value)


@pytest.mark.parametrize("name", PARTS)
def test_names_the_part_that_is_missing(tmp_path, name):
    copy_files(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"must have tokenizer.json or all of .*; missing: {name}. Download"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("backend", [
    pytest.param(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), id="a-word-list"),
    pytest.param(tokenizers.Tokenizer(models.BPE()), id="bpe-of-characters"),
])  # fmt: skip
def test_refuses_another_kind_of_tokenizer(backend):
    with pytest.raises(CheckpointError, match="other.json is not a byte-level BPE tokenizer"):
        Tokenizer(backend, "other.json")
    if isinstance(backend.model, models.BPE):
        backend.decoder = decoders.ByteLevel()
        with pytest.raises(CheckpointError, match="other.json has no token for 256 of the 256 bytes"):
            Tokenizer(backend, "other.json")
