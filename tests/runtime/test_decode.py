"""Texts decoded one token at a time: together as alone, and through the CUDA kernels as through the references."""

from dataclasses import replace

import pytest
import torch
from conftest import PACK

from bagel_rt import Bagel
from bagel_rt.conformance import run_case
from bagel_rt.kernels.backend import choose_backend
from bagel_rt.models.bagel.contents import Text
from bagel_rt.runtime.context import Context, DecodedText, Prefill
from bagel_rt.runtime.decode import Sampling, generate_tokens

TEXTS = [(1, 2, 3), (9,), tuple(range(40, 90)), (7, 7)]
LENGTH = 4  # of texts in the emulation, which takes a second for a token
SAMPLED = [Sampling(1.0, seed=5), Sampling(1.5, top_k=9, seed=6), Sampling(0.0), Sampling(2.0, top_p=0.7, seed=8)]


def contexts_of(bagel, texts):
    prefill = Prefill(bagel.model, bagel.cache)
    contexts = [Context(bagel.cache) for _ in texts]
    for context, ids in zip(contexts, texts, strict=True):
        prefill.append(context, Text(ids))
    prefill.run()
    return contexts


def decode(bagel, contexts, sampling=None, stop=-1, length=12, **options):
    """The tokens of every text."""
    texts = [[] for _ in contexts]
    with torch.inference_mode():
        for number, token in generate_tokens(
            bagel.model, bagel.model.text, contexts, bagel.tokenizer.bos, stop, length, sampling, **options
        ):
            texts[number].append(token)
    return texts


@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["most likely", "sampled"])
def test_batched_texts_match_separate_texts(bagel, sampling):
    with torch.inference_mode():
        contexts = contexts_of(bagel, TEXTS)
    together = decode(bagel, contexts, sampling)
    for number, context in enumerate(contexts):
        assert decode(bagel, [context], sampling and [sampling[number]]) == [together[number]]
    assert [len(text) for text in together] == [11] * 4 and len(set(map(tuple, together))) == 4


def test_text_ends_at_its_stop_token_and_others_continue(bagel):
    with torch.inference_mode():
        contexts = contexts_of(bagel, TEXTS)
    whole = decode(bagel, contexts, SAMPLED)
    stop = whole[1][4]
    cut = [text[: text.index(stop)] if stop in text else text for text in whole]
    assert decode(bagel, contexts, SAMPLED, stop) == cut and max(map(len, cut)) > len(cut[1])


def test_decoding_does_not_change_contexts(bagel):
    with torch.inference_mode():
        contexts = contexts_of(bagel, TEXTS)
    before = [(context.length, context.position, context.history) for context in contexts]
    free = bagel.cache.free_slots
    decode(bagel, contexts)
    assert [(context.length, context.position, context.history) for context in contexts] == before
    assert bagel.cache.free_slots == free


def test_rejects_mismatched_arguments(bagel):
    model, contexts = bagel.model, [Context(bagel.cache)] * 3
    pairs = replace(model.text, key="pairs", group=2)
    for mode, arguments, message in [
        (model.text, ([], 0, 1, 4), "contexts must be a positive multiple of 1, got 0"),
        (pairs, (contexts, 0, 1, 4), "contexts must be a positive multiple of 2, got 3"),
        (model.text, (contexts, [0], 1, 4), "start must have 3 entries, got 1"),
        (model.text, (contexts, 0, 1, 4, [Sampling()]), "sampling must have 3 entries, got 1"),
        (model.text, (contexts, 0, 1, 4, None, None, torch.ones(4, 2, 9)), r"noise must have shape \[4, 3, V\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(generate_tokens(model, mode, *arguments))


def test_more_than_eight_rows_decode_the_same_texts(bagel):
    texts = [(number + 1, number + 2) for number in range(20)]
    with torch.inference_mode():
        contexts = contexts_of(bagel, texts)
    together = decode(bagel, contexts, length=5)
    assert together == [decode(bagel, [context], length=5)[0] for context in contexts]


def test_text_of_fixed_length_has_every_drawn_token(bagel):
    with torch.inference_mode():
        contexts = contexts_of(bagel, TEXTS[:2])
    assert decode(bagel, contexts, stop=None, length=5) == decode(bagel, contexts, length=6)


def test_each_row_starts_with_its_own_token(bagel):
    with torch.inference_mode():
        contexts = contexts_of(bagel, [TEXTS[0], TEXTS[0]])
        run = generate_tokens(bagel.model, bagel.model.text, contexts, [5, bagel.tokenizer.bos], -1, 6)
        tokens = list(run)
    assert [token for number, token in tokens if number == 1] == decode(bagel, contexts[1:], length=6)[0]
    assert [token for number, token in tokens if number == 0] != [token for number, token in tokens if number == 1]


def test_kept_texts_equal_prefilled_texts(bagel):
    with torch.inference_mode():
        kept, other = contexts_of(bagel, [TEXTS[0], TEXTS[1]])
        fresh = kept.clone()
        [written, _] = decode(bagel, [kept, other], keep=True)
        fed = (bagel.tokenizer.bos, *written)
        prefill = Prefill(bagel.model, bagel.cache)
        prefill.append(fresh, Text(fed))
        prefill.run()
    assert kept.history[-1] == DecodedText(fed)
    assert (kept.length, kept.position) == (fresh.length, fresh.position)
    for buffer in (bagel.cache.k, bagel.cache.v):
        a, b = (buffer[:, one.key_start : one.key_start + one.length] for one in (kept, fresh))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert decode(bagel, [kept], length=5) == decode(bagel, [fresh], length=5)


def test_kept_texts_that_are_closed_early_contain_only_fed_tokens(bagel):
    with torch.inference_mode():
        kept, other = contexts_of(bagel, [TEXTS[0], TEXTS[1]])
        length = kept.length
        [first, second] = decode(bagel, [kept.clone(), other.clone()])
        tokens = generate_tokens(bagel.model, bagel.model.text, [kept, other], bagel.tokenizer.bos, None, 12, keep=True)
        for _ in range(5):  # two tokens of each text and the third of the first
            next(tokens)
        tokens.close()
    assert kept.history[-1] == DecodedText((bagel.tokenizer.bos, *first[:2])) and kept.length == length + 3
    assert other.history[-1] == DecodedText((bagel.tokenizer.bos, *second[:2]))
    assert decode(bagel, [kept], length=3)  # it can be continued


def test_masked_ids_are_never_drawn(bagel):
    with torch.inference_mode():
        contexts = contexts_of(bagel, TEXTS[:1])
    [text] = decode(bagel, contexts)
    mask = torch.zeros(bagel.model.config.llm.vocab_size)
    mask[text] = -torch.inf
    mode = replace(bagel.model.text, key="masked", mask=mask)
    with torch.inference_mode():
        tokens = [t for _, t in generate_tokens(bagel.model, mode, contexts, bagel.tokenizer.bos, None, 12)]
    assert not set(tokens) & set(text)


def test_injected_noise_selects_the_token_of_the_largest_quotient(bagel):
    with torch.inference_mode():
        contexts = contexts_of(bagel, TEXTS[:2])
        vocab = bagel.model.config.llm.vocab_size
        noise = torch.empty(3, 2, vocab).exponential_(generator=torch.Generator().manual_seed(1))
        logits = []
        mode = replace(
            bagel.model.text, key="noise", logits=lambda x: logits.append(bagel.model.logits(x)) or logits[-1]
        )
        sampling = [Sampling(0.7), Sampling(1.3)]
        drawn = list(generate_tokens(bagel.model, mode, contexts, bagel.tokenizer.bos, None, 3, sampling, noise=noise))
    temperatures = torch.tensor([[0.7], [1.3]])
    expected = [
        (row, int(token))
        for x, q in zip(logits, noise, strict=True)
        for row, token in enumerate(((x / temperatures).softmax(-1) / q).argmax(-1))
    ]
    assert drawn == expected


def test_rejects_text_beyond_the_positions_of_the_model(bagel):
    length = bagel.model.config.llm.max_position_embeddings + 1
    with pytest.raises(ValueError, match=f"must end by position {length - 1}, got {length}"):
        next(generate_tokens(bagel.model, bagel.model.text, [Context(bagel.cache)], 0, 1, length))


# The CUDA kernels, emulated on the CPU


@pytest.fixture
def counted(emulated_extension, monkeypatch):
    """How often each CUDA kernel was launched."""
    counts = dict.fromkeys(("decode_qkv", "decode_attention", "decode_linear", "sample"), 0)

    def counting(name, run):
        def launch(*arguments):
            counts[name] += 1
            run(*arguments)

        return launch

    for name in counts:
        monkeypatch.setattr(emulated_extension, name, counting(name, getattr(emulated_extension, name)))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["most likely", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_kernels_decode_the_same_texts(counted, dtype, sampling):
    choose_backend("reference")
    bagel = Bagel.from_pretrained(PACK / "checkpoint", device="cpu", dtype=dtype)
    with torch.inference_mode():
        contexts = contexts_of(bagel, TEXTS)
    expected = decode(bagel, contexts, sampling, length=LENGTH)
    assert not any(counted.values())
    choose_backend("triton")
    found = decode(bagel, contexts, sampling, length=LENGTH)
    linears = 3 * bagel.model.config.llm.num_layers + 1
    assert [counted[name] for name in ("decode_linear", "sample")] == [LENGTH * linears, LENGTH]
    assert counted["decode_qkv"] == counted["decode_attention"] == LENGTH * bagel.model.config.llm.num_layers
    if dtype == torch.float32:
        assert found == expected
    else:  # rounded elsewhere: logits that nearly tie may change places, after which texts have nothing in common
        assert sum(a[:2] == b[:2] for a, b in zip(found, expected, strict=True)) >= 3
    alone = decode(bagel, contexts[1:2], sampling and sampling[1:2], length=LENGTH)
    assert alone == found[1:2]


@pytest.mark.slow
def test_cuda_kernels_match_a_recorded_official_answer(counted):
    bagel = Bagel.from_pretrained(PACK / "checkpoint", device="cpu", dtype=torch.float32, backend="triton")
    report = run_case(bagel, PACK, PACK / "cases" / "32_und_text_only")
    failed = [f"{c.name}: {c.error:.1e} > {c.tolerance:.0e} {c.note}" for c in report.comparisons if not c.passed]
    assert report.comparisons and not failed, "\n".join(failed)
    assert all(counted.values())
