"""Cases as whole requests: from inputs, hyper-parameters and recorded noise to texts and images, through the engine."""

import os
from collections.abc import Generator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bagel_rt.conformance.compare import Comparison, Meta, Tensors, compare_tensors, compare_values
from bagel_rt.engine import Engine
from bagel_rt.models.bagel.images import official_rgb
from bagel_rt.models.bagel.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE, THINK_INTERLEAVED
from bagel_rt.models.bagel.settings import ImageSettings, TextSettings
from bagel_rt.pipeline import Bagel
from bagel_rt.request import ImageRequest, ImageResult, InterleavedRequest, Request

# A generated image is quantized before the model sees it again, and may differ from the recorded one by a level.
_FEEDBACK_TOLERANCE = 3e-3


class _ScriptedEngine(Engine):
    """An engine that returns recorded texts, because random weights never request an image."""

    def __init__(self, engine: Engine, texts: list[str]):
        super().__init__(engine.model, engine.tokenizer)
        self._texts = iter(texts)

    def _stream_text(self, *_: object) -> Generator[str, None, None]:
        yield next(self._texts)


def run_request_case(bagel: Bagel, pack: Path, case: Path, meta: Meta, golden: Tensors) -> list[Comparison]:
    """Run the recorded request with the recorded noise; compare every output and every final latent."""
    inputs, hyper = meta["inputs"], meta["inputs"]["hyper"]
    understanding, interleaved = hyper["understanding_output"], "thinkmorph" in meta["case"]
    system = THINK_INTERLEAVED if interleaved else THINK_BEFORE_ANSWER if understanding else THINK_BEFORE_IMAGE
    common: dict[str, Any] = {
        "inputs": load_inputs(pack, meta),
        "seed": 0,
        "text": TextSettings(**{item.name: hyper[item.name] for item in fields(TextSettings) if item.name in hyper}),
        "system": system if hyper["think"] else None,
    }
    images: dict[str, Any] = {
        "size": tuple(hyper["image_shapes"]),
        "image": ImageSettings(**{item.name: hyper[item.name] for item in fields(ImageSettings)}),
        "noise": None if understanding else recorded_noise(meta, golden),
    }
    engine, tolerance = bagel.engine, {}
    outputs: list[str | ImageResult]
    if interleaved:
        if "scripted_gen_text" in inputs:
            engine, tolerance = _ScriptedEngine(engine, inputs["scripted_gen_text"]), {"tolerance": _FEEDBACK_TOLERANCE}
        outputs = engine.run_interleaved(InterleavedRequest(**common, **images, rounds=3))
    elif understanding:
        outputs = ["".join(engine.run_answer(Request(**common)))]
    else:
        [result] = engine.run_images([ImageRequest(**common, **images)])
        outputs = [result] if result.thought is None else [result.thought, result]
    kinds = ["image" if isinstance(output, ImageResult) else "text" for output in outputs]
    recorded_kinds = ["image" if "image" in output else "text" for output in meta["outputs"]]
    comparisons = [compare_values("request.outputs", kinds, recorded_kinds)]
    latents = iter(sorted(name for name in golden if name.endswith(".final_latent")))
    for index, (output, recorded) in enumerate(zip(outputs, meta["outputs"], strict=False)):
        if isinstance(output, str):
            comparisons.append(compare_values(f"request.text {index}", output, recorded.get("text")))
            continue
        name = next(latents)
        comparisons.append(compare_tensors(name, output.latents, golden[name], **tolerance, note="request"))
        comparisons.append(_compare_image(recorded["image"], output.image, Image.open(case / recorded["image"])))
    return comparisons


def _compare_image(name: str, actual: Image.Image, recorded: Image.Image) -> Comparison:
    """Compare images within one of 256 levels, because the official code truncates levels and does not round them."""
    if actual.size != recorded.size:
        note = "size {}x{}, recorded {}x{}".format(*actual.size, *recorded.size)
        return Comparison(name, 255, 1, False, note)
    levels = np.array(actual, dtype=int) - np.array(recorded.convert("RGB"), dtype=int)
    error = int(np.abs(levels).max())
    return Comparison(name, error, 1, error <= 1, "levels")


def load_inputs(pack: Path, meta: Meta) -> list[str | Image.Image]:
    """The recorded texts and images of a request; an image is recorded as its path in the pack."""
    inputs = meta["inputs"]["interleave_inputs"]
    return [official_rgb(Image.open(pack / part)) if os.path.isfile(pack / part) else part for part in inputs]


def recorded_noise(meta: Meta, golden: Tensors) -> list[torch.Tensor]:
    """The recorded noise in the order in which the official code drew it: by length of the context at that time.

    At the same length, a generated image comes before an encoded one: it is encoded there when it is fed back.
    """
    draws = [
        (update["kv_len_before"][0], 1, golden[f"u{update['index']:02d}_vae.eps"])
        for update in meta["updates"]
        if update["kind"] == "vae"
    ] + [
        (image["contexts"]["gen"]["kv_len"][0], 0, golden[f"i{image['index']:02d}.init_noise"])
        for image in meta.get("image_generations", ())
    ]
    return [noise for _, _, noise in sorted(draws, key=lambda draw: draw[:2])]
