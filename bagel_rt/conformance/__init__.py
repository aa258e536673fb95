"""Comparison of the runtime with recorded behaviour of the official code ("conformance packs").

A pack is a folder with a checkpoint in the official format, pictures, and cases: inputs, hyper-parameters and every
tensor worth checking, recorded from the official code in float32.
"""

import json
import math
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from bagel_rt.conformance.bagel import parts
from bagel_rt.conformance.bagel.recorded import Replay
from bagel_rt.conformance.bagel.requests import request_case
from bagel_rt.conformance.bagel.training import run_training_case
from bagel_rt.conformance.compare import Comparison, agree
from bagel_rt.errors import CheckpointError
from bagel_rt.pipeline import Bagel

# Which function checks a case is told by what the case recorded.
_PARTS = {
    "encode": parts.tokenizer_case,
    "size_rules": parts.image_transforms_case,
    "position_id_rows": parts.positions_case,
    "patch_grid_hw": parts.vit_case,
}


@dataclass
class CaseReport:
    """One case: what was compared, or why nothing was."""

    case: str
    comparisons: list[Comparison]
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Nothing failed; a skipped case has not passed."""
        return not self.skipped and bool(self.comparisons) and all(c.passed for c in self.comparisons)

    @property
    def worst(self) -> Comparison | None:
        """A failed comparison if there is one; else the one closest to its tolerance, tensors before pictures."""

        def rank(comparison):
            relative = comparison.tolerance < 1
            error = math.inf if math.isnan(comparison.error) else comparison.error
            closeness = error / comparison.tolerance if comparison.tolerance else error
            return (not comparison.passed, relative, closeness)

        compared = [item for item in self.comparisons if not (item.passed and math.isnan(item.error))]
        return max(compared, key=rank, default=None)


def find_cases(pack: Path) -> list[Path]:
    """The case folders of a pack, in order.

    Raises:
        CheckpointError: the folder is no pack.
    """
    cases = sorted(path.parent for path in (pack / "cases").glob("*/meta.json"))
    if not cases or not (pack / "checkpoint").is_dir():
        raise CheckpointError(
            f"{pack}: no conformance pack; it has a folder 'checkpoint' and folders 'cases/<name>/meta.json'"
        )
    return cases


@torch.inference_mode()
def run_case(bagel: Bagel, pack: Path, case: Path) -> CaseReport:
    """Check one case. An exception inside it is a failed comparison with its traceback as the note."""
    try:
        meta = json.loads((case / "meta.json").read_text("utf-8"))
        if meta.get("inputs", {}).get("hyper", {}).get("enable_taylorseer"):
            return CaseReport(case.name, [], "TaylorSeer step caching is not supported")
        golden = {} if "encode" in meta else load_file(case / "tensors.safetensors")  # the tokenizer has no tensors
        return CaseReport(case.name, _check(bagel, pack, case, meta, golden))
    except Exception as error:  # a crash in one case must not hide the others
        note = "".join(traceback.format_exception(error))
        return CaseReport(case.name, [Comparison(f"{type(error).__name__}: {error}", 1.0, 0.0, False, note)])


def _check(bagel: Bagel, pack: Path, case: Path, meta: dict, golden: dict) -> list[Comparison]:
    for key, check in _PARTS.items():
        if key in meta:
            return check(bagel, pack, meta, golden)
    if "packing" in meta:
        return run_training_case(bagel, pack, case)
    if "padded_images" in meta["inputs"]:
        return parts.vae_case(bagel, pack, meta, golden)
    replay = Replay(bagel, pack, case, meta, golden)
    results = replay.run()
    if "interleave_inputs" in meta["inputs"]:
        results += request_case(bagel, pack, case, meta, golden)
    inputs = {name for name in golden if name.endswith((".eps", ".init_noise"))}
    missing = sorted(set(golden) - {result.name for result in results} - inputs)
    return results + [agree("every recorded tensor was compared", missing, [])]
