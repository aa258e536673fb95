"""bfloat16 is as close to the float32 goldens as the official bfloat16 run on the same models."""

import json

import pytest
import torch
from conftest import CHECKPOINT, PACK
from safetensors.torch import load_file

from bagel_rt import Bagel
from bagel_rt.conformance.bagel.case_runner import CaseRunner

# Relative L2 distance of the official code under bfloat16 autocast on these cases: the maximum of each kind.
BUDGET = {"hidden": 1.8e-2, "k": 1.8e-2, "v": 1.8e-2, "velocity": 4.1e-2, "final_latent": 1.7e-2, "logits": 1.9e-2}
CASES = ["05_text_prefill_layers", "06_image_prefill_layers", "11_t2i_cfg_global", "18_t2i_n50", "20_edit_text_channel",
         "21_edit_global", "23_multi_image", "30_und_basic"]  # fmt: skip


class Distances(CaseRunner):
    """Runs a case and records the relative L2 distance of every tensor of a kind in ``BUDGET``."""

    def __init__(self, *args):
        super().__init__(*args)
        self.distances = {}

    def _compare_tensor(self, name, got, rows=None):
        kind = name.split(".")[-1].removesuffix("_last").removeprefix("first_").removeprefix("last_")
        kind = "velocity" if kind in ("v_cond", "v_no_text", "v_no_img") or (kind == "v" and "step" in name) else kind
        if name in self.golden and kind in BUDGET:
            actual, expected = (got if rows is None else got[rows]).double(), self.golden[name].double()
            self.distances[name] = ((actual - expected).norm() / expected.norm()).item(), BUDGET[kind]


@pytest.fixture(scope="module")
def bagel():
    return Bagel.from_pretrained(CHECKPOINT, device="cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_distance_to_the_goldens_is_within_the_official_one(bagel, name):
    case = PACK / "cases" / name
    meta = json.loads((case / "meta.json").read_text("utf-8"))
    meta["text_generations"] = []  # greedy ids may differ in bfloat16
    runner = Distances(bagel, PACK, case, meta, load_file(case / "tensors.safetensors"))
    with torch.inference_mode():
        runner.run()
    assert runner.distances
    assert not {name: distance for name, (distance, budget) in runner.distances.items() if distance > budget}


def test_every_task_runs_in_bfloat16(bagel):
    result = bagel.generate("a boat", size=(32, 48), seed=0, num_timesteps=4)
    assert result.latents.dtype == torch.float32 and result.image.size == (48, 32)
    assert bagel.edit(result.image, "red", seed=0, num_timesteps=3).image.size
    assert isinstance(bagel.chat("what?", result.image, max_think_token_n=5), str)
