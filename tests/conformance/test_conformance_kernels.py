"""Conformance cases with the Triton kernels, on a GPU or in Triton's interpreter.

The interpreter takes a minute per case, so there is one case of each kind, and the slowest kernel, the autoencoder's
GroupNorm, runs in the first case only.
"""

from importlib import import_module

import pytest
import torch
from conftest import DEVICE, PACK

from bagel_rt import Bagel
from bagel_rt.conformance import run_case
from bagel_rt.kernels.backend import choose_backend

CASES = ["10_t2i_nocfg_shift1", "11_t2i_cfg_global", "20_edit_text_channel", "30_und_basic", "60_train_packed"]


@pytest.fixture(scope="module")
def bagel():
    allow_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # the recordings are full float32
    yield Bagel.from_pretrained(PACK / "checkpoint", device=DEVICE, dtype=torch.float32, backend="triton")
    choose_backend(None)
    torch.backends.cudnn.allow_tf32 = allow_tf32


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_case_passes(bagel, case, monkeypatch):
    if DEVICE.type == "cpu" and case != CASES[0]:
        monkeypatch.setattr(import_module("bagel_rt.kernels.group_norm"), "runs_kernel", lambda *_: False)
    report = run_case(bagel, PACK, PACK / "cases" / case)
    failed = [f"{c.name}: {c.error:.1e} > {c.tolerance:.0e} {c.note}" for c in report.comparisons if not c.passed]
    assert report.comparisons and not failed, "\n".join(failed)
