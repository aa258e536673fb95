"""Packing of samples: the official batches, dropped conditions, filling a batch, and validation."""

import json

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, PACK
from safetensors.torch import load_file

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.train.packing import (
    Clean,
    Dropped,
    DropRates,
    Noised,
    Sample,
    SpecialTokens,
    Text,
    ViT,
    drop_conditions,
    fill_batch,
    noised_splits,
    pack,
)

CONFIG = BagelConfig.from_folder(CHECKPOINT)
TOKENS = SpecialTokens(353, 354, 361, 362)
DROPPED = {"edit_all_conditions_dropped": {0, 1, 2}, "edit_vit_dropped": {1}}  # sample -> parts that were dropped


def latents(rows=2, columns=3):
    return torch.randn(rows * columns, CONFIG.latent_features), rows, columns


def patches(rows=2, columns=3):
    return torch.randn(rows * columns, CONFIG.patch_features), rows, columns


# The official packing


def grids_of(ids, lengths, side):
    """(rows, columns) of each image of a batch, from its flattened positions."""
    return [(int(image[-1]) // side + 1, int(image[-1]) % side + 1) for image in ids.split(lengths)]


def recorded_samples(packing, golden):
    """The samples of a recorded batch, with random image contents."""
    bos, eos = np.array(TOKENS)[:2]
    ids = golden["batch.packed_text_ids"].numpy()
    frames = zip(np.flatnonzero(ids == bos), np.flatnonzero(ids == eos), strict=True)
    texts = iter([ids[start + 1 : end].tolist() for start, end in frames])
    for_vae = iter(packing["patchified_vae_latent_shapes"])
    vit_ids = golden["batch.packed_vit_position_ids"]
    for_vit = iter(grids_of(vit_ids, golden["batch.vit_token_seqlens"].tolist(), CONFIG.vit.max_patches_per_side))
    samples = []
    for sample in packing["samples"]:
        parts = []
        for number, item in enumerate(sample["plan"]):
            droppable, delta = bool(item["enable_cfg"]), item.get("frame_delta")
            if number in DROPPED.get(sample["name"], ()):
                assert droppable
                parts += [] if item["type"] == "text" else [Dropped()]
            elif item["type"] == "text":
                parts.append(Text(next(texts), bool(item["loss"]), droppable))
            elif item["type"] == "vit_image":
                parts.append(ViT(*patches(*next(for_vit)), droppable))
            elif item["loss"]:
                parts.append(Noised(*latents(*next(for_vae)), delta))
            else:
                parts.append(Clean(*latents(*next(for_vae)), droppable, delta))
        samples.append(Sample(parts))
    return samples


@pytest.mark.parametrize("case", ["60_train_packed", "61_train_video_shift3"])
def test_packs_like_the_official_loader(case):
    folder = PACK / "cases" / case
    packing, golden = (
        json.loads((folder / "meta.json").read_text())["packing"],
        load_file(folder / "tensors.safetensors"),
    )
    samples = recorded_samples(packing, golden)
    raw = golden["batch.packed_timesteps"]
    raws = torch.tensor(list(dict.fromkeys(raw[raw > -torch.inf].tolist())))  # one per split, all distinct
    batch, clean = pack(samples, CONFIG, TOKENS, raws)
    assert len(batch) == packing["sequence_length"]
    assert batch.sample_lens == packing["sample_lens_with_pad"][:-1]
    assert batch.split_lens == packing["split_lens_with_pad"][: len(batch.split_lens)]
    assert batch.attn_modes == packing["attn_modes_with_pad"][: len(batch.attn_modes)]
    assert batch.vit_token_seqlens == golden["batch.vit_token_seqlens"].tolist()
    for name, expected in golden.items():
        if name.startswith("batch.") and name != "batch.vit_token_seqlens":
            got = getattr(batch, name.removeprefix("batch."))
            assert torch.equal(got.to(expected.dtype), expected), name
    images = [part for sample in samples for part in sample.parts if isinstance(part, Clean | Noised)]
    assert torch.equal(clean, torch.cat([part.latents for part in images]))


# Parts and positions


def test_noised_image_and_its_clean_copy_share_a_position():
    sample = Sample([Text([7]), Noised(*latents(1, 1)), Clean(*latents(1, 1)), Text([8])])
    batch, _ = pack([sample], CONFIG, TOKENS, torch.zeros(1))
    assert batch.packed_position_ids.tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3, 4, 5, 6]
    assert batch.attn_modes == ["causal", "noise", "full", "causal"]
    assert len(sample) == len(batch)


def test_text_with_loss_predicts_its_ids_and_eos():
    batch, _ = pack([Sample([Text([7]), Text([8, 9], loss=True)])], CONFIG, TOKENS, torch.zeros(0))
    assert batch.ce_loss_indexes.tolist() == [3, 4, 5]
    assert batch.packed_label_ids.tolist() == [8, 9, TOKENS.eos]
    assert batch.ce_loss_weights.tolist() == pytest.approx([3**-0.5] * 3)


def test_noised_images_have_their_own_timesteps():
    sample = Sample([Noised(*latents(1, 2)), Clean(*latents(1, 1)), Noised(*latents(1, 1))])
    assert noised_splits([sample]) == 2
    batch, _ = pack([sample], CONFIG, TOKENS, torch.tensor([0.5, -1.0]))
    assert batch.packed_timesteps.tolist() == [0.5, 0.5, -torch.inf, -1.0]


def test_frames_of_a_noised_video_share_a_timestep():
    video = [Noised(*latents(1, 1), frame_delta=2), Noised(*latents(1, 1))]
    batch, _ = pack([Sample([*video, Noised(*latents(1, 1))])], CONFIG, TOKENS, torch.tensor([0.5, -1.0]))
    assert batch.packed_timesteps.tolist() == [0.5, 0.5, -1.0]
    assert batch.split_lens == [6, 3]
    assert batch.packed_position_ids.tolist() == [0] * 3 + [2] * 6


def test_no_samples_make_an_empty_batch():
    batch, clean = pack([], CONFIG, TOKENS, torch.zeros(0))
    assert len(batch) == len(clean) == 0


# Dropping conditions, filling batches


def edit():
    conditions = [Clean(*latents(), droppable=True), ViT(*patches(), droppable=True), Text([5, 6], droppable=True)]
    return Sample([*conditions, Noised(*latents())])


def test_droppable_parts_are_dropped_at_rate_one():
    dropped = drop_conditions(edit(), DropRates(1, 1, 1), np.random.default_rng(0))
    assert [type(part) for part in dropped.parts] == [Dropped, Dropped, Noised]
    batch, _ = pack([dropped], CONFIG, TOKENS, torch.zeros(1))
    assert set(batch.packed_position_ids.tolist()) == {2}


def test_other_parts_are_kept_at_rate_one():
    sample = Sample([Clean(*latents()), ViT(*patches()), Text([5, 6]), Noised(*latents())])
    assert drop_conditions(sample, DropRates(1, 1, 1), np.random.default_rng(0)).parts == sample.parts


def test_parts_are_dropped_independently_at_their_rates():
    rng, rates = np.random.default_rng(0), DropRates(0.1, 0.5, 0.3)
    sample, counts, pairs = edit(), np.zeros(3), 0
    for _ in range(4000):
        kinds = [type(part) for part in drop_conditions(sample, rates, rng).parts]
        gone = np.array([kinds[0] is Dropped, kinds[1] is Dropped, Text not in kinds])
        counts += gone
        pairs += gone[0] and gone[1]
    assert counts / 4000 == pytest.approx([0.3, 0.5, 0.1], abs=0.03)
    assert pairs / 4000 == pytest.approx(0.15, abs=0.03)


def test_fill_batch_stops_at_the_first_sample_that_reaches_the_tokens():
    samples = fill_batch(
        lambda rng: Sample([Text([1] * int(rng.integers(1, 9)))]), DropRates(), 50, np.random.default_rng(0)
    )
    rows = [len(sample) for sample in samples]
    assert sum(rows[:-1]) < 50 <= sum(rows)


# Validation


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: Sample([Clean(torch.zeros(5, 64), 2, 3)]),
            r"part 0, Clean, must be .* got \(5, 64\) for 2 rows and 3 columns",
        ),
        (lambda: Sample([Text([1]), ViT(torch.zeros(0, 12), 0, 3)]), "part 1, ViT, .* for 0 rows and 3 columns"),
        (lambda: Sample(["a text"]), "part 0 must be a Text, ViT, Clean, Noised or Dropped .* got a str"),
        (
            lambda: Sample([Noised(*latents(), frame_delta=1), Text([1])]),
            "frame_delta of part 0 must be None, got 1. .*same kind",
        ),
        (
            lambda: Sample([Clean(*latents(), frame_delta=-1), Clean(*latents())]),
            "frame_delta of part 0 must be an integer >= 0, got -1",
        ),
        (
            lambda: Sample([Clean(*latents(), True, 1), Clean(*latents())]),
            "frame_delta of part 0 must be None, got 1. .*droppable",
        ),
        (
            lambda: pack([edit()], CONFIG, TOKENS, torch.zeros(2)),
            r"must be of shape \(1,\), one per noised split, got \(2,\)",
        ),
        (
            lambda: pack([edit(), Sample([Dropped()])], CONFIG, TOKENS, torch.zeros(1)),
            "sample 1 must have at least 1 row",
        ),
        (
            lambda: fill_batch(lambda rng: Sample([]), DropRates(), 5, np.random.default_rng(0)),
            "a sample must have at least 1 row",
        ),
        (lambda: fill_batch(lambda rng: edit(), DropRates(), 0, np.random.default_rng(0)), "tokens must be an integer"),
        (lambda: pack([Sample([Noised(torch.zeros(17, 64), 17, 1)])], CONFIG, TOKENS, torch.zeros(1)), "got 1x17"),
    ],
    ids=[
        "tensor of another grid",
        "empty grid",
        "not a part",
        "video without a next frame",
        "negative frame_delta",
        "droppable frame",
        "too many timesteps",
        "empty sample",
        "empty drawn sample",
        "zero tokens",
        "image larger than the table",
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()
