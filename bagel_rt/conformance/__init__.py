"""Conformance: compare the runtime with recordings of the official code.

A conformance pack is a folder with a checkpoint in the official format, images, and cases. A case holds the inputs, the
hyper-parameters and the intermediate and final tensors of one run of the official code in float32.
"""

import json
import math
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from bagel_rt.conformance.bagel import components
from bagel_rt.conformance.bagel.case_runner import CaseRunner
from bagel_rt.conformance.bagel.end_to_end import run_request_case
from bagel_rt.conformance.bagel.training import run_training_case
from bagel_rt.conformance.compare import Comparison, Meta, Tensors, compare_values
from bagel_rt.errors import CheckpointError
from bagel_rt.pipeline import Bagel

# Key of meta.json that only cases of one component have -> the function that checks them.
_COMPONENT_CASES = {
    "encode": components.run_tokenizer_case,
    "size_rules": components.run_image_transforms_case,
    "position_id_rows": components.run_positions_case,
    "patch_grid_hw": components.run_vit_case,
}


@dataclass
class CaseReport:
    """The comparisons of one case, or the reason why it was skipped."""

    case: str
    comparisons: list[Comparison]
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Whether there were comparisons and all passed; False for a skipped case."""
        return not self.skipped and bool(self.comparisons) and all(c.passed for c in self.comparisons)

    @property
    def worst(self) -> Comparison | None:
        """The comparison to report: failed before passed, tensors before images, then by error over tolerance."""

        def rank(comparison: Comparison) -> tuple[bool, bool, float]:
            relative = comparison.tolerance < 1  # the tolerance of an image is one of 256 levels
            error = math.inf if math.isnan(comparison.error) else comparison.error
            closeness = error / comparison.tolerance if comparison.tolerance else error
            return (not comparison.passed, relative, closeness)

        return max(self.comparisons, key=rank, default=None)


def find_cases(pack: Path) -> list[Path]:
    """The case folders of a pack, sorted by name.

    Raises:
        CheckpointError: the folder is not a conformance pack.
    """
    cases = sorted(path.parent for path in (pack / "cases").glob("*/meta.json"))
    if not cases or not (pack / "checkpoint").is_dir():
        raise CheckpointError(
            f"{pack} is not a conformance pack. Give a folder with checkpoint/ and cases/<name>/meta.json."
        )
    return cases


@torch.inference_mode()
def run_case(bagel: Bagel, pack: Path, case: Path) -> CaseReport:
    """Run one case. An exception in it becomes a failed comparison whose note is the traceback."""
    try:
        meta = json.loads((case / "meta.json").read_text("utf-8"))
        if meta.get("inputs", {}).get("hyper", {}).get("enable_taylorseer"):
            return CaseReport(case.name, [], "TaylorSeer step caching is not supported")
        golden = {} if "encode" in meta else load_file(case / "tensors.safetensors")  # the tokenizer has no tensors
        return CaseReport(case.name, _run(bagel, pack, case, meta, golden))
    except Exception as error:  # a crash in one case must not hide the results of the others
        note = "".join(traceback.format_exception(error))
        return CaseReport(case.name, [Comparison(f"{type(error).__name__}: {error}", 1.0, 0.0, False, note)])


def _run(bagel: Bagel, pack: Path, case: Path, meta: Meta, golden: Tensors) -> list[Comparison]:
    for key, run_component_case in _COMPONENT_CASES.items():
        if key in meta:
            return run_component_case(bagel, pack, meta, golden)
    if "packing" in meta:
        return run_training_case(bagel, pack, case)
    if "padded_images" in meta["inputs"]:
        return components.run_vae_case(bagel, pack, meta, golden)
    comparisons = CaseRunner(bagel, pack, case, meta, golden).run()
    if "interleave_inputs" in meta["inputs"]:
        comparisons += run_request_case(bagel, pack, case, meta, golden)
    noise = {name for name in golden if name.endswith((".eps", ".init_noise"))}  # inputs of the case
    not_compared = sorted(set(golden) - {item.name for item in comparisons} - noise)
    return comparisons + [compare_values("tensors that were not compared", not_compared, [])]
