import math
from importlib import import_module

import pytest
import torch

from bagel_rt.kernels import extension, sample
from bagel_rt.kernels.sample import NOT_FINITE, philox4x32, scores_reference

op = import_module("bagel_rt.kernels.sample")  # the package has the function under this name

MASK = 0xFFFFFFFF


def int64(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


def philox_in_integers(counter, key):
    """Philox4x32-10 as published, in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def kept_by_the_book(scaled, top_k, top_p):
    """Whether each token is kept, in Python numbers."""
    lowest = sorted(scaled, reverse=True)[int(top_k) - 1] if 1 <= top_k < len(scaled) else -math.inf
    weights = [math.exp(x - max(scaled)) if x >= lowest else 0.0 for x in scaled]
    if top_p < 1:
        for tau in sorted(set(scaled), reverse=True):
            if math.fsum(w for x, w in zip(scaled, weights, strict=True) if x >= tau) >= top_p * math.fsum(weights):
                lowest = max(lowest, tau)
                break
    return [x >= lowest for x in scaled]


def by_the_book(logits, settings, seed, step):
    """Sample one row, in Python numbers."""
    temperature, top_k, top_p = settings
    scaled = [logit / temperature for logit in logits.tolist()]
    scores = []
    for column, (x, kept) in enumerate(zip(scaled, kept_by_the_book(scaled, top_k, top_p), strict=True)):
        word = philox_in_integers((column, step & MASK, 0, 0), (seed & MASK, (seed >> 32) & MASK))[0]
        u = ((word >> 9) + 0.5) / 2**23
        scores.append(x - math.log(-math.log(u)) if kept else -math.inf)
    return max(range(len(scores)), key=scores.__getitem__)


def each(rows, temperature, top_k=0.0, top_p=1.0, device="cpu"):
    """A settings tensor with the same values for all rows."""
    return torch.tensor([[temperature, top_k, top_p]], device=device).repeat(rows, 1)


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
def test_philox_matches_published_vectors(counter, key, words):
    result = philox4x32([int64(word) for word in counter], [int64(word) for word in key])
    assert tuple(int(word) for word in result) == words == philox_in_integers(counter, key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_samples_the_documented_token(dtype):
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(1)).mul(2).to(dtype)
    seeds = (0, 1, -1, MASK, 1 << 32, (1 << 63) - 1, -(1 << 63), 12345, 12345)
    steps = (0, 7, 7, MASK, 1 << 32, 3, 2, 5, 6)
    settings = each(9, 0.7)
    drawn = sample(logits, settings, int64(*seeds), int64(*steps))
    rows = zip(logits.float(), settings.tolist(), seeds, steps, strict=True)
    assert drawn.tolist() == [by_the_book(*row) for row in rows]


SETTINGS = {
    "temperature": (0.7, 0, 1),
    "top-k": (1.0, 5, 1),
    "top-p": (1.3, 0, 0.8),
    "both": (2.0, 12, 0.6),
    "one-token": (0.5, 1, 1),
    "the-largest": (3.0, 0, 0),
    "fraction-of-a-token": (1.0, 2.9, 1),
    "nearly-all": (1.0, 49, 0.9999),
    "more-tokens-than-there-are": (1.5, 99, 1.5),
    "less-than-none": (1.5, -3, 0.7),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_samples_the_documented_token_with_top_k_and_top_p(settings, dtype):
    """50 bfloat16 logits contain ties; for other dtypes the test creates them."""
    logits = torch.randn(30, 50, generator=torch.Generator().manual_seed(2)).mul(2)
    logits[:10] = logits[:10].round()
    logits, seeds, steps = logits.to(dtype), range(30), range(7, 37)
    settings = each(30, *map(float, settings))
    drawn = sample(logits, settings, int64(*seeds), int64(*steps))
    rows = zip(logits.double(), settings.tolist(), seeds, steps, strict=True)
    assert drawn.tolist() == [by_the_book(*row) for row in rows]


@pytest.mark.parametrize("top_k, top_p, kept", [(0, 1, 6), (3, 1, 4), (1, 1, 1), (2, 1, 4), (5, 1, 5), (0, 0.7, 1),
                                                (0, 0.72, 4), (4, 0.95, 4), (0, 0.995, 5), (3, 0.0, 1)])  # fmt: skip
def test_ties_are_kept_or_dropped_together(top_k, top_p, kept):
    """Probabilities are 0.705, 3 x 0.0954, 0.0077 and 0.0008."""
    logits = torch.tensor([1.0, 3.0, 1.0, -3.8, 1.0, -1.52])
    settings = each(1, 1.0, top_k, top_p)
    scores = scores_reference(logits[None], settings, int64(0), int64(0))
    assert scores.isfinite().sum() == kept == sum(kept_by_the_book(logits.tolist(), top_k, top_p))
    assert scores.isfinite()[0].tolist() == kept_by_the_book(logits.tolist(), top_k, top_p)


def test_noise_is_finite_at_extreme_words():
    """Seeds found by search: of the words at step 0, column 0, one is below 2^9, the other at least 2^32 - 2^9."""
    lowest, highest = 75465, 16390493
    words = philox4x32((0, 0, 0, 0), (int64(lowest, highest), 0))[0]
    assert (words >> 9).tolist() == [0, 2**23 - 1]
    # The noise is -2.8 at the lowest word, 16.6 at the highest; the logits of column 1 hang in between.
    for seed, logit, token in ((lowest, -20.0, 0), (lowest, 20.0, 1), (highest, 5.0, 0), (highest, 40.0, 1)):
        assert sample(torch.tensor([[0.0, logit]]), each(1, 1.0), int64(seed), int64(0)).item() == token


def chi_square(drawn, shares):
    """Chi-squared statistic over tokens expected more than 5 times; others must be rare, impossible ones absent."""
    counts, expected = drawn.cpu().bincount(minlength=len(shares)), shares * len(drawn)
    seen = expected > 5
    assert counts[shares == 0].sum() == 0 and counts[~seen].sum() <= 20
    return ((counts - expected)[seen] ** 2 / expected[seen]).sum().item()


DRAWN = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -3.0])
CHI_SQUARE = 20.5
"""Chi-squared threshold: exceeded with probability 0.001 at 5 degrees of freedom, less at fewer."""


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_tokens_follow_the_softmax(temperature):
    drawn = sample(DRAWN.expand(20000, -1), each(20000, temperature), int64(99).expand(20000), torch.arange(20000))
    assert chi_square(drawn, (DRAWN / temperature).softmax(0)) < CHI_SQUARE


def shares_kept(temperature, top_k, top_p):
    scaled = DRAWN / temperature
    return scaled.masked_fill(~torch.tensor(kept_by_the_book(scaled.tolist(), top_k, top_p)), -torch.inf).softmax(0)


@pytest.mark.parametrize("settings", [(1.0, 3, 1.0), (1.5, 0, 0.8), (2.0, 4, 0.7)], ids=["top-k", "top-p", "both"])
def test_tokens_follow_the_truncated_softmax(settings):
    drawn = sample(DRAWN.expand(20000, -1), each(20000, *settings), int64(7).expand(20000), torch.arange(20000))
    shares = shares_kept(*settings)
    assert (shares == 0).sum() >= 2
    assert chi_square(drawn, shares) < CHI_SQUARE


def test_seeds_and_steps_are_independent_streams():
    draws, flat = 4000, torch.zeros(4000, 2)
    by_seed = sample(flat, each(draws, 1.0), torch.arange(draws), int64(0).expand(draws)).double()
    by_step = sample(flat, each(draws, 1.0), int64(0).expand(draws), torch.arange(draws)).double()
    high_word = sample(flat, each(draws, 1.0), torch.arange(draws) << 32, int64(0).expand(draws)).double()
    for stream in (by_seed, by_step, high_word):
        assert abs(stream.mean() - 0.5) < 0.03
        assert abs(torch.corrcoef(torch.stack([stream[1:], stream[:-1]]))[0, 1]) < 0.06
    assert abs(torch.corrcoef(torch.stack([by_seed, by_step, high_word])) - torch.eye(3)).max() < 0.06


MIXED = torch.tensor([[0.0, 0, 1], [1.0, 0, 1], [0.7, 50, 1], [1.0, 0, 0.9], [1.5, 40, 0.8], [0.9, 0, 0.0],
                      [-1.0, 3, 0.5], [3.0, 200, 0.5]])  # fmt: skip
"""(temperature, top_k, top_p) per row."""


def check_batch(device, dtype, V=300):
    """A row of a batch gets the token that it gets alone."""
    logits = torch.randn(8, V, generator=torch.Generator().manual_seed(1)).mul(3).to(device, dtype)
    inputs = logits, MIXED.to(device), torch.arange(8, device=device) * 1000, torch.arange(8, device=device)
    together = sample(*inputs)
    alone = [sample(*(tensor[row : row + 1] for tensor in inputs)) for row in range(8)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, sample(*(tensor.flip(0) for tensor in inputs)).flip(0))
    assert together[0] == logits[0].argmax() and together[5] == logits[5].argmax() and together[6] == logits[6].argmax()


def test_row_is_independent_of_the_batch():
    check_batch("cpu", torch.float32)


def check_greedy(device):
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [-5.0, -5.0, -7.0, -5.0], [0.0, 0.0, 0.0, 1.0], [-0.0, 0.0, -1, -1]])
    settings, number = each(4, 0.0, 2, 0.5, device), int64(1, 2, 3, 4).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        x = logits.to(device, dtype)
        assert sample(x).tolist() == [1, 0, 3, 0]
        assert sample(x, settings, number, number).tolist() == [1, 0, 3, 0]


def test_greedy_takes_the_first_largest_logit():
    check_greedy("cpu")


def check_not_finite(device):
    inf, nan = torch.inf, torch.nan
    rows = [(-inf, -20.0, -inf), (0, inf, inf), (0, nan, inf), (nan, 5, 1), (-inf, -inf, -inf), (0.0, 90.0, 0.0)]
    logits, expected = torch.tensor(rows, device=device), [1, *[NOT_FINITE] * 4, 1]
    number = torch.arange(6, device=device)
    for settings in ((1.0,), (1.0, 1), (1.0, 2, 0.5), (0.01, 0, 0.5), (0.0,)):
        assert sample(logits, each(6, *settings, device=device), number, number).tolist() == expected, settings
    assert sample(logits).tolist() == expected
    small = torch.tensor([[1.0, 30.0, 20.0]], device=device)  # overflows when it is divided by the temperature
    for settings in ((1e-38,), (1e-38, 2), (1e-38, 0, 0.5)):
        assert sample(small, each(1, *settings, device=device), number[:1], number[:1]).item() in (0, 1, 2)


def test_never_samples_minus_infinity_and_reports_rows_without_a_finite_maximum():
    check_not_finite("cpu")
    logits = torch.full((1000, 3), -torch.inf)
    logits[:, 1] = -20.0
    assert (sample(logits, each(1000, 1.0), torch.arange(1000), torch.arange(1000)) == 1).all()


def check_few(device):
    number = torch.arange(2, device=device)
    for V in (1, 2):
        drawn = sample(torch.zeros(2, V, device=device), each(2, 1.0, 1, 0.5, device), number, number)
        assert drawn.tolist() == [0, 0] or (V == 2 and ((drawn == 0) | (drawn == 1)).all())
    none = torch.zeros(0, 5, device=device)
    for settings in (None, each(0, 1.0, device=device)):
        assert sample(none, settings, number[:0], number[:0]).shape == (0,)


def test_one_column_and_no_rows():
    check_few("cpu")


def check_strides(device):
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(1)).to(device)
    before, seeds, steps = logits.clone(), torch.arange(8, device=device)[::2], torch.arange(8, device=device)[1::2]
    settings = torch.tensor([[1.0, 0.8], [9.0, 5.0], [0.9, 0.7]], device=device).mT.repeat(2, 1)
    for view in (logits[:, ::3], logits[:, 1:], logits[:, :-1].mT.contiguous().mT):
        expected = sample(view.contiguous(), settings.contiguous(), seeds.clone(), steps.clone())
        assert torch.equal(sample(view, settings, seeds, steps), expected)
        assert torch.equal(sample(view), view.argmax(-1))
    assert torch.equal(logits, before)


def test_accepts_strided_arguments_and_does_not_modify_them():
    check_strides("cpu")


@pytest.fixture
def cuda_kernel(extension_device, monkeypatch):
    """The device on which the op must run the extension's kernel, not a fallback."""
    monkeypatch.setattr(op, "sample_reference", lambda *_: pytest.fail("the CUDA kernel was passed over"))
    yield extension_device
    used = extension.counters(torch.empty(0, device=extension_device), extension.COUNTERS)
    assert not used.any(), "counters are left that are not zero"


def check_drawn(device, logits, settings, seeds, steps):
    """The kernel's tokens are kept ones with the largest score, up to the last bits of a logarithm."""
    drawn = sample(*(tensor.to(device) for tensor in (logits, settings, seeds, steps))).cpu()
    scores = scores_reference(logits, settings, seeds, steps)
    found = scores.gather(1, drawn[:, None])
    assert (found >= scores.max(1, keepdim=True).values - 1e-5).all(), (drawn, scores.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 7, 31, 300, 2049, 20003])
def test_cuda_kernel_matches_the_reference(cuda_kernel, V, dtype):
    """20003 columns need several blocks per row; odd widths misalign the rows."""
    for seed in range(2):
        logits = torch.randn(8, V, generator=torch.Generator().manual_seed(seed)).mul(1 + 2 * seed).to(dtype)
        check_drawn(cuda_kernel, logits, MIXED, torch.arange(8) * 77 + seed, torch.arange(8) + 5)
        assert torch.equal(sample(logits.to(cuda_kernel)).cpu(), logits.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_cuda_kernel_matches_the_reference_at(cuda_kernel, settings, dtype):
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(3)).mul(2)
    logits[:8] = logits[:8].round()
    check_drawn(cuda_kernel, logits.to(dtype), each(16, *settings), torch.arange(16), torch.arange(16) * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_kernel_samples_from_bagel_vocabulary(cuda_kernel, dtype):
    logits = torch.randn(4, 152064, generator=torch.Generator().manual_seed(4)).mul(3).to(dtype)
    settings = torch.tensor([[1.0, 0, 1], [0.7, 50, 0.9], [1.2, 0, 0.95], [1.0, 1000, 1]])
    check_drawn(cuda_kernel, logits, settings, torch.arange(4), torch.arange(4) + 9)
    assert torch.equal(sample(logits[:2].to(cuda_kernel)).cpu(), logits[:2].argmax(-1))


FLAT = {"all-equal": lambda V: torch.zeros(V), "two-values": lambda V: torch.arange(V) % 2 * 0.5,
        "rising": lambda V: torch.arange(V) / V, "falling": lambda V: -torch.arange(V) / 1000.0}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("row", FLAT.values(), ids=FLAT)
def test_cuda_kernel_finds_kth_largest_without_a_short_candidate_list(cuda_kernel, row):
    """k above the number of warps, thousands of ties, and all large logits in a few warps."""
    settings = torch.tensor([[1.0, k, p] for k in (1, 2, 600, 4500, 5998) for p in (1, 0.5)])
    logits = row(6001).float().expand(10, -1).contiguous()
    check_drawn(cuda_kernel, logits, settings, torch.arange(10), torch.arange(10))


def test_cuda_kernel_breaks_ties_across_blocks(cuda_kernel):
    logits = torch.zeros(3, 20003)
    logits[0, [7, 9000, 20002]] = 1.0
    logits[1, [8192, 20002]] = 1.0
    logits[2, 20002] = torch.nan  # in another block than most
    for dtype in (torch.float32, torch.bfloat16):
        assert sample(logits.to(cuda_kernel, dtype)).tolist() == [7, 8192, NOT_FINITE]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (1.5, 0, 0.8), (2.0, 4, 0.7)], ids=["all", "top-p", "both"])
def test_cuda_kernel_follows_the_truncated_softmax(cuda_kernel, settings):
    draws = 4000 if cuda_kernel.type == "cuda" else 120  # the emulation takes 50 ms for one
    logits, number = DRAWN.to(cuda_kernel).expand(draws, -1), torch.arange(draws, device=cuda_kernel)
    drawn = sample(logits, each(draws, *settings, device=cuda_kernel), number * 0 + 5, number)
    assert chi_square(drawn, shares_kept(*settings)) < CHI_SQUARE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_kernel_row_is_independent_of_the_batch(cuda_kernel, dtype):
    check_batch(cuda_kernel, dtype, 9001)


def test_cuda_kernel_matches_the_reference_on_special_values(cuda_kernel):
    check_greedy(cuda_kernel)
    check_not_finite(cuda_kernel)
    check_few(cuda_kernel)
    check_strides(cuda_kernel)


@pytest.mark.slow
def test_cuda_kernel_is_deterministic_under_any_schedule(emulated_extension):
    logits = torch.randn(8, 20003, generator=torch.Generator().manual_seed(1)).mul(2)
    inputs = logits, MIXED, torch.arange(8), torch.arange(8)
    expected = op._run_extension(*inputs)
    for seed in range(1, 4):
        emulated_extension.set_schedule(seed)
        assert torch.equal(op._run_extension(*inputs), expected)


def test_unsupported_inputs_fall_back(extension_device, monkeypatch):
    monkeypatch.setattr(op, "_run_extension", lambda *_: pytest.fail("the CUDA kernel cannot take this"))
    for dtype in (torch.float16, torch.float64):
        assert sample(torch.tensor([[0.0, 2.0, 1.0]], dtype=dtype, device=extension_device)).item() == 1
    monkeypatch.setattr(op, "MAX_COLUMNS", 2)
    assert sample(torch.tensor([[0.0, 2.0, 1.0]], device=extension_device)).item() == 1


@pytest.mark.parametrize("B", [1, 8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_with_injected_exponential_noise(extension_device, B, dtype):
    generator = torch.Generator().manual_seed(B)
    logits = (3 * torch.randn(B, 97, generator=generator)).to(extension_device, dtype)
    noise = torch.empty(B, 97).exponential_(generator=generator).to(extension_device)
    settings, number = (
        each(B, 0.8, top_k=20, device=extension_device),
        torch.zeros(B, dtype=torch.int64).to(noise.device),
    )
    scaled = logits.double() / settings[:, :1].double()
    kept = scaled >= scaled.topk(20).values[:, -1:]
    expected = (scaled.masked_fill(~kept, -torch.inf).softmax(-1) / noise.double()).argmax(-1)
    assert torch.equal(sample(logits, settings, number, number, noise), expected)


def test_rejects_mismatched_argument():
    logits, number, settings = torch.zeros(2, 5), int64(0, 0), each(2, 1.0)
    with pytest.raises(ValueError, match=r"settings must be \(2, 3\) torch.float32.*got \(1, 3\) torch.float32"):
        sample(logits, each(1, 1.0), number, number)
    with pytest.raises(ValueError, match=r"settings must be \(2, 3\) torch.float32.*got \(2, 3\) torch.float64"):
        sample(logits, settings.double(), number, number)
    with pytest.raises(ValueError, match=r"seed must be \(2,\) torch.int64.*got None"):
        sample(logits, settings)
    with pytest.raises(ValueError, match=r"step must be \(2,\) torch.int64.*got \(2,\) torch.int32"):
        sample(logits, settings, number, number.int())
    with pytest.raises(ValueError, match=r"noise must be \(2, 5\) torch.float32, got \(2, 4\) torch.float32"):
        sample(logits, settings, number, number, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"seed must be \(2,\).*got \(1,\) torch.int64"):
        sample(logits, settings, number[:1], number)
    with pytest.raises(ValueError, match="step must be on cpu like logits, got meta"):
        sample(logits, settings, number, number.to("meta"))
    with pytest.raises(ValueError, match=r"logits must have at least one column, got \(\d+, 0\)"):
        sample(torch.zeros(2, 0))
