import math

import pytest
import torch

from bagel_rt.kernels import sample
from bagel_rt.kernels.sample import philox4x32

MASK = 0xFFFFFFFF


def int64(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


def philox_in_integers(counter, key):
    """Philox4x32-10 as published, on Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def by_the_book(logits, temperature, seed, step):
    """One row, in Python numbers."""
    scores = []
    for column, logit in enumerate(logits.tolist()):
        word = philox_in_integers((column, step & MASK, 0, 0), (seed & MASK, (seed >> 32) & MASK))[0]
        u = ((word >> 9) + 0.5) / 2**23
        scores.append(logit / temperature - math.log(-math.log(u)))
    return max(range(len(scores)), key=scores.__getitem__)


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "digits-of-pi"],
)
def test_philox_gives_the_published_words(counter, key, words):
    given = philox4x32([int64(word) for word in counter], [int64(word) for word in key])
    assert tuple(int(word) for word in given) == words == philox_in_integers(counter, key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_draws_the_documented_token(dtype):
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(1)).mul(2).to(dtype)
    seeds = (0, 1, -1, MASK, 1 << 32, (1 << 63) - 1, -(1 << 63), 12345, 12345)
    steps = (0, 7, 7, MASK, 1 << 32, 3, 2, 5, 6)
    drawn = sample(logits, 0.7, int64(*seeds), int64(*steps))
    assert drawn.tolist() == [by_the_book(*row) for row in zip(logits.float(), [0.7] * 9, seeds, steps, strict=True)]


def test_noise_is_finite_at_both_ends():
    """Seeds found by search: of the words at step 0, column 0, one is below 2^9, the other at least 2^32 - 2^9."""
    lowest, highest = 75465, 16390493
    words = philox4x32((0, 0, 0, 0), (int64(lowest, highest), 0))[0]
    assert (words >> 9).tolist() == [0, 2**23 - 1]
    # The noise is -2.8 at the lowest word, 16.6 at the highest; the logits of column 1 hang in between.
    for seed, logit, token in ((lowest, -20.0, 0), (lowest, 20.0, 1), (highest, 5.0, 0), (highest, 40.0, 1)):
        assert sample(torch.tensor([[0.0, logit]]), 1.0, int64(seed), int64(0)).item() == token


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_tokens_follow_the_softmax(temperature):
    logits, draws = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -3.0]), 20000
    drawn = sample(logits.expand(draws, -1), temperature, int64(99).expand(draws), torch.arange(draws))
    expected = (logits / temperature).softmax(0) * draws
    seen = expected > 5
    counts = drawn.bincount(minlength=6)
    chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    assert chi_square < 20.5, f"{counts.tolist()} drawn, {expected.tolist()} expected"  # p = 0.001 at 5 degrees
    assert counts[~seen].sum() <= 20


def test_seeds_and_steps_are_independent_streams():
    draws, flat = 4000, torch.zeros(4000, 2)
    by_seed = sample(flat, 1.0, torch.arange(draws), int64(0).expand(draws)).double()
    by_step = sample(flat, 1.0, int64(0).expand(draws), torch.arange(draws)).double()
    high_word = sample(flat, 1.0, torch.arange(draws) << 32, int64(0).expand(draws)).double()
    for stream in (by_seed, by_step, high_word):
        assert abs(stream.mean() - 0.5) < 0.03
        assert abs(torch.corrcoef(torch.stack([stream[1:], stream[:-1]]))[0, 1]) < 0.06
    assert abs(torch.corrcoef(torch.stack([by_seed, by_step, high_word])) - torch.eye(3)).max() < 0.06


def test_a_row_does_not_depend_on_its_neighbours():
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(1))
    seeds, steps = torch.arange(8) * 1000, torch.arange(8)
    together = sample(logits, 1.0, seeds, steps)
    alone = [sample(logits[row : row + 1], 1.0, seeds[row : row + 1], steps[row : row + 1]) for row in range(8)]
    backwards = sample(logits.flip(0), 1.0, seeds.flip(0), steps.flip(0))
    assert torch.equal(together, torch.cat(alone)) and torch.equal(together, backwards.flip(0))


def test_temperature_zero_takes_the_first_largest_logit_and_needs_no_seed():
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [-5.0, -5.0, -7.0, -5.0], [0.0, 0.0, 0.0, 1.0]])
    assert sample(logits, 0.0).tolist() == [1, 0, 3]
    assert sample(logits.bfloat16(), 0, int64(1, 2, 3), int64(0, 0, 0)).tolist() == [1, 0, 3]


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1000, 3), -torch.inf)
    logits[:, 1] = -20.0
    assert (sample(logits, 1.0, torch.arange(1000), torch.arange(1000)) == 1).all()


def test_one_column_and_no_rows_work():
    assert sample(torch.zeros(2, 1), 1.0, int64(0, 1), int64(0, 0)).tolist() == [0, 0]
    assert sample(torch.zeros(0, 5), 1.0, int64(), int64()).shape == (0,)
    assert sample(torch.zeros(0, 5), 0.0).shape == (0,)


def test_logits_need_not_be_contiguous_and_are_left_alone():
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(1))
    strided, before = logits[:, ::3], logits.clone()
    seeds, steps = torch.arange(8)[::2], torch.arange(8)[1::2]
    assert torch.equal(sample(strided, 1.0, seeds, steps), sample(strided.contiguous(), 1.0, seeds, steps))
    assert torch.equal(logits, before)


def test_names_the_argument_that_does_not_fit():
    logits, number = torch.zeros(2, 5), int64(0, 0)
    with pytest.raises(ValueError, match="temperature=-1.0; use 0 for the most likely token or a positive number"):
        sample(logits, -1.0, number, number)
    for temperature in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"temperature={temperature}"):
            sample(logits, temperature, number, number)
    with pytest.raises(ValueError, match=r"seed is None, expected \(2,\) torch.int64"):
        sample(logits, 1.0)
    with pytest.raises(ValueError, match=r"step is \(2,\) torch.int32, expected \(2,\) torch.int64"):
        sample(logits, 1.0, number, number.int())
    with pytest.raises(ValueError, match=r"seed is \(1,\) torch.int64, expected \(2,\)"):
        sample(logits, 1.0, number[:1], number)
    with pytest.raises(ValueError, match="no columns"):
        sample(torch.zeros(2, 0), 0.0)
