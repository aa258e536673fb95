"""Checkpoints as users have them: harmless differences load, and errors name other formats in one sentence."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import CONFORMANCE, FILE, assert_rejected, make_slots

from bagel_rt.checkpoint.read import WeightSlot, load_weights
from bagel_rt.errors import CheckpointError
from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.model import IGNORED_TENSORS, BagelModel


def save(folder, tensors):
    """Write ema.safetensors; safetensors does not write one tensor under two names."""
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "ema.safetensors")


DOWNLOAD = "Download the published weights: hf download ByteDance-Seed/BAGEL-7B-MoT --local-dir"
FP8 = torch.ones(2, 3).to(torch.float8_e4m3fn)
BYTES = torch.ones(6, 1, dtype=torch.uint8)
FORMATS = {
    "plain-fp8": ({"a": FP8, "b": torch.ones(4)}, "is quantized (fp8), which is not supported."),
    "scaled-fp8": (FILE | {"a": FP8, "a_scale": torch.ones(1)}, "is quantized (fp8, scaled), which is not"),
    "comfyui-fp8": (FILE | {"a": FP8, "scaled_fp8": torch.ones(1)}, "is quantized (fp8, scaled), which is not"),
    "nf4": (FILE | {"a": BYTES, "a.quant_state.bitsandbytes__nf4": BYTES}, "is quantized (bitsandbytes, NF4)"),
    "fp4": (FILE | {"a": BYTES, "a.quant_state.bitsandbytes__fp4": BYTES}, "is quantized (bitsandbytes, FP4)"),
    "nf4-without-state": (FILE | {"a": BYTES, "a.absmax": BYTES}, "is quantized (bitsandbytes, 4 bits)"),
    "bitsandbytes-int8": (FILE | {"a": FP8.to(torch.int8), "SCB": BYTES, "a.SCB": BYTES}, "(bitsandbytes, INT8)"),
    "int8": (FILE | {"a": torch.ones(2, 3).to(torch.int8)}, "is quantized (INT8), which is not supported."),
    "gptq": ({"b": FILE["b"], "a.qweight": BYTES.int(), "a.qzeros": BYTES}, "is quantized (GPTQ or AWQ)"),
    "quanto": ({"b": FILE["b"], "a._data": BYTES.to(torch.int8), "a._scale": torch.ones(1)}, "is quantized (INT8)"),
    "df11": ({"b": FILE["b"], "a.encoded_exponent": BYTES, "a.sign_mantissa": BYTES}, "is compressed (DFloat11, DF11)"),
    "lora": ({"x.lora_A.weight": torch.ones(2, 3)}, "contains an adapter (LoRA) instead of whole weights"),
    "diffusers": ({"encoder.down_blocks.0.w": torch.ones(1)}, "an autoencoder with the names of diffusers"),
}


@pytest.mark.parametrize("tensors, cause", FORMATS.values(), ids=FORMATS)
def test_error_names_the_format_of_unsupported_weights(tmp_path, tensors, cause):
    save(tmp_path, tensors)
    for other in ("ema_bf16", "ema-00001-of-00002", "ae"):  # two of them have a purpose of their own
        (tmp_path / f"{other}.safetensors").touch()
    message = assert_rejected(tmp_path / "ema.safetensors", make_slots(FILE), cause, f"{DOWNLOAD} {tmp_path}")
    assert message.splitlines()[-1] == "  Other weight files there: ema_bf16.safetensors."


@pytest.fixture(scope="module")
def weights():
    return load_file(CONFORMANCE / "ema.safetensors")


def load_into_model(folder, tensors, dtype=torch.bfloat16):
    """Load these tensors as ema.safetensors of the conformance model."""
    save(folder, tensors)
    slots = BagelModel.allocate(BagelConfig.from_folder(CONFORMANCE), (0, 0), "cpu", dtype).weight_slots()["ema"]
    load_weights(folder / "ema.safetensors", slots, IGNORED_TENSORS, progress=False)
    return slots


HARMLESS = {
    "module-prefix": lambda w: {f"module.{name}": tensor for name, tensor in w.items()},
    "model-prefix": lambda w: {f"model.{name}": tensor for name, tensor in w.items()},
    "nested-prefix": lambda w: {f"_orig_mod.module.{name}": tensor for name, tensor in w.items()},
    "averaged-model": lambda w: {f"module.{n}": t for n, t in w.items()} | {"n_averaged": torch.tensor(3)},
    "inverse-frequencies": lambda w: w | {"language_model.model.rotary_emb.inv_freq": torch.ones(4)},
    "siglip-pooling-head": lambda w: w | {"vit_model.vision_model.head.probe": torch.ones(1, 1, 4)},
    "no-position-tables": lambda w: {name: tensor for name, tensor in w.items() if not name.endswith("pos_embed")},
    "prefix-and-no-tables": lambda w: {f"module.{n}": t for n, t in w.items() if not n.endswith("pos_embed")},
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_harmless_differences_load(tmp_path, weights, change):
    for name, slot in load_into_model(tmp_path, change(weights)).items():
        expected = weights[name].to(slot.view.dtype)
        if name.endswith("pos_embed"):  # stored in float32 here, and computed in float64 and rounded to bfloat16
            assert (slot.view - expected).abs().max() <= 2**-8, name
        else:
            assert torch.equal(slot.view, expected.expand_as(slot.view)), name


def test_computed_position_tables_are_rounded_as_the_published_ones(tmp_path, weights):
    tensors = {name: tensor for name, tensor in weights.items() if not name.endswith("pos_embed")}
    table = load_into_model(tmp_path, tensors, torch.float32)["latent_pos_embed.pos_embed"].view
    assert torch.equal(table, table.bfloat16().float()) and table.abs().max() == 1


LACKING = {
    "no-vision-tower": (("vit_model.",), "has no vision tower, but the whole model is needed."),
    "no-vision-at-all": (
        ("vit_model.", "connector.", "vit_pos"),
        "has no vision connector and no vision tower, but the",
    ),
    "language-model-alone": (
        ("vit_model.", "connector.", "vae2llm", "llm2vae", "time_embedder", "_moe_gen."),
        "has no image generation expert and no image generation layers and no vision connector and no vision",
    ),
    "missing-layer": (("language_model.model.layers.1.",), "has only 109 of the 137 tensors of the model."),
}


@pytest.mark.parametrize("parts, cause", LACKING.values(), ids=LACKING)
def test_error_names_the_missing_part_of_the_model(tmp_path, weights, parts, cause):
    rest = {name: tensor for name, tensor in weights.items() if not any(part in name for part in parts)}
    with pytest.raises(CheckpointError) as error:
        load_into_model(tmp_path, rest)
    assert f"ema.safetensors {cause}" in str(error.value)
    assert len(str(error.value).splitlines()) <= 10


def test_names_that_collide_without_their_prefix_are_rejected(tmp_path):
    save(tmp_path, FILE | {f"module.{name}": tensor for name, tensor in FILE.items()})
    assert_rejected(tmp_path / "ema.safetensors", make_slots(FILE), "unexpected tensor module.a of shape [2, 3]")


# Values


@pytest.mark.parametrize("stored, value", [(torch.float32, 1e6), (torch.bfloat16, -1e6), (torch.float64, 65520.0)])
def test_rejects_values_that_overflow_the_dtype(tmp_path, stored, value):
    save_file(
        {"a": FILE["a"].to(stored), "b": torch.tensor([1, 2, value, 3], dtype=stored)}, tmp_path / "ema.safetensors"
    )
    slots = make_slots(FILE, torch.float16)
    with pytest.raises(
        CheckpointError, match=r"values of b must be from -65504 to 65504 .*float16, got .* Use dtype bf"
    ):
        load_weights(tmp_path / "ema.safetensors", slots, progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "stored, dtype",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
    ids=str,
)
def test_rejects_nan_and_infinity_where_values_are_converted(tmp_path, stored, dtype, value):
    save_file(
        {"a": FILE["a"].to(stored), "b": torch.tensor([1, value, 2, 3], dtype=stored)}, tmp_path / "ema.safetensors"
    )
    with pytest.raises(CheckpointError, match="ema.safetensors: b contains NaN or infinity"):
        load_weights(tmp_path / "ema.safetensors", make_slots(FILE, dtype), progress=False)


def test_checks_values_of_strided_and_broadcast_slots(tmp_path):
    save_file({"norm": torch.tensor([1, 1e6]), "gate": torch.ones(2, 3)}, tmp_path / "ema.safetensors")
    heads, fused = torch.zeros(3, 2, dtype=torch.float16), torch.zeros(4, 3, dtype=torch.float16)
    slots = {"norm": WeightSlot(heads, (2,)), "gate": WeightSlot(fused[::2], (2, 3))}
    with pytest.raises(CheckpointError, match="values of norm must be"):
        load_weights(tmp_path / "ema.safetensors", slots, progress=False)
