"""Rotary tables hold the positions in use, not all that a model allows."""

import pytest
import torch

from bagel_rt.runtime.batch import Rope, table_size


def test_table_holds_the_positions_in_use():
    rope = Rope(128, 1e6, 1 << 24, torch.device("cpu"))
    table = rope.table(100)
    assert table.shape == (2, 4096, 64)
    assert rope.table(4096) is table  # captured steps read it
    cos, sin = rope(torch.tensor([0, 7, 4095]))
    assert torch.equal(table[:, [0, 7, 4095]], torch.stack([cos, sin]))


def test_longer_texts_get_a_larger_table_and_keep_the_smaller_one():
    rope = Rope(8, 1e4, 1 << 24, torch.device("cpu"))
    small, large = rope.table(100), rope.table(4097)
    assert large.shape[1] == 8192 and rope.table(100) is small and torch.equal(large[:, :4096], small)


def test_rejects_positions_beyond_the_model():
    rope = Rope(8, 1e4, 5000, torch.device("cpu"))
    assert rope.table(5000).shape[1] == 8192
    with pytest.raises(ValueError, match="must end by position 5000, got 5001"):
        rope.table(5001)


@pytest.mark.parametrize("positions, size", [(1, 4096), (4096, 4096), (4097, 8192), (32768, 32768), (32769, 65536)])
def test_table_size_is_a_power_of_two(positions, size):
    assert table_size(positions) == size
