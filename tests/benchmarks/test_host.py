"""Operator calls per step and per token are at most a quarter of the official code's. Times are not asserted."""

from dataclasses import replace

import pytest
import torch
from conftest import CHECKPOINT

from bagel_rt.kernels import rms_norm, sample
from bagel_rt.models.bagel.config import BagelConfig
from benchmarks.host import OFFICIAL, calls, measure, recorded_model, table
from benchmarks.random_model import THREE_LAYERS


def test_model_has_the_recorded_shapes():
    recorded = BagelConfig.from_folder(CHECKPOINT)
    assert replace(THREE_LAYERS, llm=replace(THREE_LAYERS.llm, vocab_size=recorded.llm.vocab_size)) == recorded


def test_operator_calls_are_under_a_quarter_of_the_official_code():
    results = measure(recorded_model(), repeats=3)
    assert list(results) == list(OFFICIAL)
    print(table(results))  # visible with pytest -s
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
        (lambda x: sample(x), 3),
        (lambda x: rms_norm(x, None, x[0], x[0], 1, 1e-6), 3),
    ],
    ids=["operator", "views", "in place", "out=", "sample", "norm"],
)
def test_operator_calls_are_counted(work, count):
    with torch.inference_mode():
        x = torch.ones(2, 2)
        assert calls(lambda: work(x)) == count
