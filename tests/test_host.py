"""The operator calls of a step and of a token stay under a quarter of the official code's. Times are not asserted."""

import pytest
import torch

from bagel_rt import Bagel
from bagel_rt.kernels import rms_norm, sample
from benchmarks.host import OFFICIAL, calls, measure, table


def test_operator_calls_are_under_a_quarter_of_the_official_code():
    results = measure(Bagel.from_pretrained(device="cpu"), repeats=3)
    assert list(results) == list(OFFICIAL)
    print(table(results))  # pytest -s shows it
    for name, (count, _) in results.items():
        official = OFFICIAL[name][0]
        assert official is None or 0 < count < official / 4, name


@pytest.mark.parametrize(
    "work, count",
    [
        (lambda x: x + 1, 1),
        (lambda x: x.view(4).t(), 0),
        (lambda x: x.add_(1).mul_(2), 2),
        (lambda x: torch.add(x, 1, out=x), 1),
        (lambda x: sample(x), 1),
        (lambda x: rms_norm(x, None, x[0], x[0], 1, 1e-6), 3),
    ],
    ids=["an operator", "views", "in place", "out=", "inside an op", "several inside an op"],
)
def test_calls_are_counted(work, count):
    with torch.inference_mode():
        x = torch.ones(2, 2)
        assert calls(lambda: work(x)) == count
