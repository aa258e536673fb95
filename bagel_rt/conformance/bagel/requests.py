"""Conformance of whole requests: inputs and hyper-parameters in, texts and pictures out, through the pipeline."""

import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bagel_rt.conformance.compare import Comparison, agree, compare
from bagel_rt.engine import Engine
from bagel_rt.models.bagel.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE, THINK_INTERLEAVED
from bagel_rt.models.bagel.settings import ImageSettings, TextSettings
from bagel_rt.pipeline import Bagel
from bagel_rt.request import ImageResult, Request

FED_BACK = 3e-3  # a generated picture that is quantised and shown to the model again may differ by single levels


class _Scripted(Engine):
    """An engine whose texts are given: random weights never ask for an image."""

    def __init__(self, engine: Engine, script: list[str]):
        super().__init__(engine.model, engine.tokenizer)
        self._script = iter(script)

    def _stream_text(self, *_):
        yield next(self._script)


def request_case(bagel: Bagel, pack: Path, case: Path, meta: dict, golden: dict) -> list[Comparison]:
    """Run the recorded request with the recorded noise; compare every output and every final latent."""
    inputs, hyper = meta["inputs"], meta["inputs"]["hyper"]
    parts = [Image.open(pack / part) if os.path.isfile(pack / part) else part for part in inputs["interleave_inputs"]]
    image = ImageSettings(**{field.name: hyper[field.name] for field in fields(ImageSettings)})
    text = TextSettings(**{field.name: hyper[field.name] for field in fields(TextSettings) if field.name in hyper})
    answers, interleaves = hyper["understanding_output"], "thinkmorph" in meta["case"]
    prompt = THINK_INTERLEAVED if interleaves else THINK_BEFORE_ANSWER if answers else THINK_BEFORE_IMAGE
    noise = None if answers else _draws(meta, golden)
    system = prompt if hyper["think"] else None
    request = Request(
        parts, tuple(hyper["image_shapes"]), 0, image, text, noise, system, rounds=3 if interleaves else None
    )
    engine, tolerance = bagel.engine, {}
    if interleaves:
        if "scripted_gen_text" in inputs:
            engine, tolerance = _Scripted(engine, inputs["scripted_gen_text"]), {"tolerance": FED_BACK}
        outputs = engine.run_interleaved(request)
    elif answers:
        outputs = ["".join(engine.run_answer(request))]
    else:
        [result] = engine.run_images([request])
        outputs = [result] if result.thought is None else [result.thought, result]
    results = [
        agree("request.outputs", [_kind(output) for output in outputs], [next(iter(o)) for o in meta["outputs"]])
    ]
    latents = iter(sorted(name for name in golden if name.endswith(".final_latent")))
    for number, (output, want) in enumerate(zip(outputs, meta["outputs"], strict=False)):
        if isinstance(output, str):
            results.append(agree(f"request.text {number}", output, want.get("text")))
            continue
        results.append(compare(name := next(latents), output.latents, golden[name], **tolerance, note="request"))
        recorded = np.array(Image.open(case / want["image"]).convert("RGB"), dtype=int)
        picture = np.array(output.image, dtype=int)
        same_size = picture.shape == recorded.shape
        levels = int(np.abs(picture - recorded).max()) if same_size else 255
        results.append(Comparison(want["image"], levels, 1, levels <= 1, "levels" if same_size else "another size"))
    return results


def _draws(meta: dict, golden: dict) -> list[torch.Tensor]:
    """The recorded noise in the order of drawing: an encoding stands where its update begins, a picture where the
    context it is drawn from ends."""
    places = [
        (update["kv_len_before"][0], 1, golden[f"u{update['index']:02d}_vae.eps"])
        for update in meta["updates"]
        if update["kind"] == "vae"
    ] + [
        (image["contexts"]["gen"]["kv_len"][0], 0, golden[f"i{image['index']:02d}.init_noise"])
        for image in meta.get("image_generations", ())
    ]
    return [noise for _, _, noise in sorted(places, key=lambda place: place[:2])]


def _kind(output) -> str:
    return "image" if isinstance(output, ImageResult) else "text"
