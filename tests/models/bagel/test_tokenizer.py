"""The tokenizer against recorded ids, and tokenizer.json against the separate files."""

import json
import os
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


# Recorded results


def test_special_tokens_and_length_match_the_record(tokenizer):
    names = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "start_of_image": tokenizer.start_of_image,
        "end_of_image": tokenizer.end_of_image,
    }
    assert names == META["special_token_ids"]
    assert len(tokenizer) == META["tokenizer_length"]


@pytest.mark.parametrize("row", META["encode"], ids=lambda row: ascii(row["text"][:30]))
def test_encode_and_decode_match_the_record(tokenizer, row):
    assert tokenizer.encode(row["text"]) == row["ids"]
    assert tokenizer.decode(row["ids"]) == row["roundtrip"]


@pytest.mark.parametrize("row", META["decode"], ids=lambda row: str(row["ids"][:4]))
def test_decode_of_arbitrary_ids_matches_the_record(tokenizer, row):
    assert tokenizer.decode(row["ids"]) == row["text"]


def recorded_answers() -> list:
    """(generated ids, official answer) of every case that recorded both."""
    answers = []
    for path in sorted(PACK.glob("cases/*/meta.json")):
        meta = json.loads(path.read_text(encoding="utf-8"))
        texts = [output["text"] for output in meta.get("outputs", []) if "text" in output]
        for generated, text in zip(meta.get("text_generations", []), texts):  # noqa: B905 (scripted texts have no ids)
            answers.append(pytest.param(generated["returned_ids_including_start"], text, id=path.parent.name))
    return answers


@pytest.mark.parametrize("ids, text", recorded_answers())
def test_answers_match_the_record(tokenizer, ids, text):
    assert tokenizer.answer(ids) == text


# tokenizer.json ("whole") and separate files ("parts")


@given(text=texts)
def test_parts_encode_like_whole(whole, parts, text):
    assert parts.encode(text) == whole.encode(text)


def test_parts_have_the_configuration_of_whole(whole, parts):
    # The small vocabulary has few merges, which may not reveal a wrong pre-tokenization, so compare the configuration.
    first, second = (json.loads(tokenizer._backend.to_str()) for tokenizer in (whole, parts))
    assert first == second | {"post_processor": first["post_processor"]}  # affects offsets, not ids


@pytest.mark.parametrize("flag", ["special", "normalized", "single_word", "lstrip", "rstrip"])
def test_parts_and_whole_read_the_same_flags_of_added_tokens(tmp_path, flag):
    copy_files(tmp_path, [*PARTS, "tokenizer.json"])
    flip = {"special": False}.get(flag, True)
    edit(tmp_path, "tokenizer_config.json", lambda values: values["added_tokens_decoder"]["358"].update({flag: flip}))
    edit(tmp_path, "tokenizer.json", lambda values: values["added_tokens"][6].update({flag: flip}))
    whole = Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    first, second = (t._backend.get_added_tokens_decoder() for t in (whole, Tokenizer.from_folder(tmp_path)))
    assert first[358].content == "<|box_end|>" and getattr(first[358], flag) is flip
    assert {token: repr(added) for token, added in first.items()} == {t: repr(added) for t, added in second.items()}


def test_tokenizer_json_has_priority(tmp_path):
    copy_files(tmp_path, [*PARTS, "tokenizer.json"])
    (tmp_path / "vocab.json").write_text("{}")
    assert len(Tokenizer.from_folder(str(tmp_path))) == META["tokenizer_length"]


# Properties


@given(text=texts)
@example(text="e\u0301")
@example(text=END + "\u0338")  # the mark composes with the last character, so this is not a special token
def test_round_trip_returns_the_nfc_form(whole, text):
    assert whole.decode(whole.encode(text)) == unicodedata.normalize("NFC", text)


@given(ids=st.lists(st.integers(0, META["tokenizer_length"] - 1), max_size=40))
def test_decode_agrees_with_the_tokenizers_package(whole, ids):
    assert whole.decode(ids) == whole._backend.decode(ids, skip_special_tokens=False)


def test_added_token_outside_the_byte_alphabet_round_trips():
    backend = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    backend.add_tokens(["<new word>"])
    tokenizer = Tokenizer(backend, "test")
    assert tokenizer.decode(tokenizer.encode("a <new word>!")) == "a <new word>!"


def test_truncation_and_padding_of_the_file_are_ignored():
    backend = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    assert Tokenizer(backend, "test").decode(Tokenizer(backend, "test").encode("a long text")) == "a long text"


def test_post_processor_of_the_file_is_ignored():
    backend = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(f"{START} $A", special_tokens=[(START, 353)])
    assert Tokenizer(backend, "test").encode("ind") == [285]


# Errors

INVALID_CALLS = {
    "bytes-as-text": (lambda t: t.encode(b"a"), "text must be a str, got bytes"),
    "none-as-text": (lambda t: t.encode(None), "got NoneType"),
    "lone-surrogate": (lambda t: t.encode("a\ud83d"), "surrogates"),
    "id-past-the-end": (lambda t: t.decode([64, len(t)]), "token id must be below 366 and in the vocabulary, got 366"),
    "negative-id": (lambda t: t.decode([-1]), "token id must be an integer from 0 .*, got -1"),
    "string-as-ids": (lambda t: t.decode("abc"), "token id must be an integer from 0 .*, got 'a'"),
    "fractional-id-in-an-answer": (lambda t: t.answer([t.bos, 1.5]), "got 1.5"),
    "negative-id-in-a-stream": (lambda t: TextStream(t).feed(-3), "got -3"),
    "answer-without-start-token": (lambda t: t.answer([64, 65]), "must contain <|im_start|>, got 'ab'"),
}


@pytest.mark.parametrize("call, message", INVALID_CALLS.values(), ids=INVALID_CALLS)
def test_rejects_invalid_calls(whole, call, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        call(whole)


def edit(folder: Path, name: str, change) -> None:
    path = folder / name
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def no_token(table: dict) -> None:
    del table["added_tokens_decoder"]["361"]


def changed(change, message):
    """A case of DAMAGED: tokenizer.json with a change of its values."""
    return "tokenizer.json", lambda p: edit(p.parent, p.name, change), message


DAMAGED = {
    "tokenizer-json-cut-short": (
        "tokenizer.json", lambda p: p.write_bytes(p.read_bytes()[:5000]), "tokenizer.json is not JSON in UTF-8",
    ),
    "tokenizer-json-that-is-a-list": (
        "tokenizer.json", lambda p: p.write_text("[]"), "must be a JSON object, got list",
    ),
    "tokenizer-json-that-is-a-folder": (
        "tokenizer.json", lambda p: (p.unlink(), p.mkdir()), "tokenizer.json is not a file",
    ),
    "no-start-of-image-in-tokenizer-json": (
        "tokenizer.json",
        lambda p: edit(p.parent, p.name, lambda v: v["added_tokens"].pop(9)),
        r"tokenizer.json: added_tokens: the id of <\|vision_end\|> must be 361 to follow the vocabulary, got 362",
    ),
    "byte-that-no-token-spells": (
        "tokenizer.json",
        lambda p: edit(p.parent, p.name, lambda v: v["model"]["vocab"].update({"new": v["model"]["vocab"].pop("~")})),
        "tokenizer.json: tokens for 1 of the 256 bytes are missing",
    ),
    "regular-expression-of-exponential-time": changed(
        lambda v: v["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(a+)+$"),
        "pre_tokenizer must be Qwen2's: .*, got",
    ),
    "normalizer-that-grows-a-text": changed(
        lambda v: v.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x" * 99}),
        "normalizer must be null, NFC, Lowercase or a sequence of both, got .*Replace",
    ),
    "long-sequence-of-normalizers": changed(
        lambda v: v.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}),
        "normalizer must be null, NFC",
    ),
    "random-tokenization": changed(lambda v: v["model"].update(dropout=0.5), "model.dropout must be None .*, got 0.5"),
    "other-decoder": changed(lambda v: v.update(decoder={"type": "Metaspace"}), "decoder must be ByteLevel, got"),
    "word-pieces": changed(lambda v: v["model"].update(type="WordPiece"), "model must be a byte-level BPE"),
    "merge-of-unknown-tokens": changed(
        lambda v: v["model"]["merges"].append(["zz", "yy"]), "the token 'zz' of a merge is not in the vocabulary",
    ),
    "merges-that-are-a-number": changed(lambda v: v["model"].update(merges=3), "not a valid BPE"),
    "vocabulary-that-is-a-list": changed(lambda v: v["model"].update(vocab=[]), "not a valid BPE"),
    "id-of-two-tokens": changed(
        lambda v: v["model"]["vocab"].update(new=0), "ids must be different integers from 0 to 2097151",
    ),
    "id-that-is-negative": changed(lambda v: v["model"]["vocab"].update(new=-1), "ids must be different integers"),
    "id-that-is-a-fraction": changed(lambda v: v["model"]["vocab"].update(new=0.5), "ids must be different integers"),
    "id-past-every-vocabulary": changed(
        lambda v: v["model"]["vocab"].update(new=1 << 40), "ids must be different integers",
    ),
    "long-token": changed(
        lambda v: v["model"]["vocab"].update({"x" * 5000: 9999}), "a token must have at most 1024 characters",
    ),
    "long-added-token": changed(
        lambda v: v["added_tokens"][0].update(content="x" * 5000), "added_tokens must have tokens with an id",
    ),
    "added-token-with-a-flag-that-is-text": changed(
        lambda v: v["added_tokens"][0].update(lstrip="no"), "added_tokens must have tokens with an id",
    ),
    "added-tokens-that-are-text": changed(lambda v: v.update(added_tokens="x"), "must be"),
    "vocab-cut-short": (
        "vocab.json", lambda p: p.write_bytes(p.read_bytes()[:900]), "vocab.json is not JSON in UTF-8",
    ),
    "empty-vocab": ("vocab.json", lambda p: p.write_text("{}"), "vocab.json and merges.txt are not a valid BPE"),
    "merges-of-unknown-tokens": (
        "merges.txt", lambda p: p.write_text("#version: 0.2\nthe fox\n"), "merges.txt are not a valid BPE",
    ),
    "merges-of-one-word": ("merges.txt", lambda p: p.write_text("#version: 0.2\nt h\nthe\n"), "not a valid BPE"),
    "config-that-is-not-json": ("tokenizer_config.json", lambda p: p.write_text("{"), "_config.json is not JSON"),
    "config-without-added-tokens": (
        "tokenizer_config.json", lambda p: p.write_text("{}"),
        "_config.json: added_tokens_decoder must have at most 4096 tokens, got None",
    ),
    "added-token-without-an-id": (
        "tokenizer_config.json",
        lambda p: edit(p.parent, p.name, lambda v: v["added_tokens_decoder"].update(x={"content": "<x>"})),
        "added_tokens_decoder must have tokens with an id, a content of 1 to 1024 characters and flags, got",
    ),
    "added-token-without-content": (
        "tokenizer_config.json",
        lambda p: edit(p.parent, p.name, lambda v: v["added_tokens_decoder"].update({"400": {"text": "<x>"}})),
        "added_tokens_decoder must have tokens with an id, a content of 1 to 1024 characters and flags, got",
    ),
    "added-token-that-is-missing": (
        "tokenizer_config.json",
        lambda p: edit(p.parent, p.name, no_token),
        r"the id of <\|vision_end\|> must be 361 to follow the vocabulary, got 362",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name, damage, message", DAMAGED.values(), ids=DAMAGED)
def test_error_names_the_damaged_file_and_the_remedy(tmp_path, name, damage, message):
    copy_files(tmp_path, ["tokenizer.json"] if name == "tokenizer.json" else PARTS)
    damage(tmp_path / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "published" in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", *PARTS])
def test_rejects_a_large_file_unread_and_a_fifo_unopened(tmp_path, name):
    copy_files(tmp_path, ["tokenizer.json"] if name == "tokenizer.json" else PARTS)
    with open(tmp_path / name, "ab") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CheckpointError, match=f"{name} must have at most 33554432 bytes, got more"):
        Tokenizer.from_folder(tmp_path)
    if hasattr(os, "mkfifo"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name} is not a file"):
            Tokenizer.from_folder(tmp_path)


def test_lowercase_normalizer_is_used(tmp_path):
    copy_files(tmp_path, ["tokenizer.json"])
    steps = [{"type": "NFC"}, {"type": "Lowercase"}]
    edit(
        tmp_path, "tokenizer.json", lambda values: values.update(normalizer={"type": "Sequence", "normalizers": steps})
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("A LARGE Red Star É") == tokenizer.encode("a large red star é")
    assert tokenizer.encode(START) == [tokenizer.bos]


def test_length_covers_ids_beyond_a_gap(tmp_path):
    copy_files(tmp_path, ["tokenizer.json"])

    def move(values):  # special tokens into the vocabulary, before the gap
        added = {token["content"]: token["id"] for token in values["added_tokens"]}
        values["model"]["vocab"].update(added, unusual=5000)

    edit(tmp_path, "tokenizer.json", move)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert len(tokenizer) == 5001
    with pytest.raises(ValueError, match="below 5001 and in the vocabulary, got 4999"):
        tokenizer.decode([4999])


@pytest.mark.parametrize("name", PARTS)
def test_error_names_the_missing_file(tmp_path, name):
    copy_files(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"must have tokenizer.json or all of .*; missing: {name}. Download"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("backend", [
    pytest.param(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), id="word-list"),
    pytest.param(tokenizers.Tokenizer(models.BPE()), id="bpe-of-characters"),
])  # fmt: skip
def test_rejects_other_kinds_of_tokenizers(backend):
    with pytest.raises(CheckpointError, match="other.json must be a byte-level BPE tokenizer"):
        Tokenizer(backend, "other.json")
    if isinstance(backend.model, models.BPE):
        backend.decoder = decoders.ByteLevel()
        with pytest.raises(CheckpointError, match="other.json: tokens for 256 of the 256 bytes are missing"):
            Tokenizer(backend, "other.json")
