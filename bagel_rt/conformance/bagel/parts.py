"""Conformance of what is around the transformer: tokenizer, pixels, positions, vision tower, autoencoder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bagel_rt.conformance.compare import Comparison, agree, compare
from bagel_rt.models.bagel.embed import position_ids, sincos_table, time_embedding, time_sinusoid
from bagel_rt.models.bagel.guidance import schedule
from bagel_rt.models.bagel.images import ResizeRule, image_to_tensor, to_rgb
from bagel_rt.models.bagel.vision import connect, embed_patches, encoder_layer, vision_tower, within_images


def tokenizer_case(bagel, pack: Path, meta: dict, golden: dict) -> list[Comparison]:
    """Every text encodes to the recorded ids and back; recorded ids decode to the recorded text."""
    tokenizer = bagel.tokenizer
    special = [tokenizer.bos, tokenizer.eos, tokenizer.start_of_image, tokenizer.end_of_image]
    results = [
        agree("special token ids", special, list(meta["special_token_ids"].values())),
        agree("length", len(tokenizer), meta["tokenizer_length"]),
    ]
    for number, row in enumerate(meta["encode"]):
        results.append(agree(f"encode {number}", tokenizer.encode(row["text"]), row["ids"]))
        results.append(agree(f"roundtrip {number}", tokenizer.decode(row["ids"]), row["roundtrip"]))
    return results + [
        agree(f"decode {n}", tokenizer.decode(row["ids"]), row["text"]) for n, row in enumerate(meta["decode"])
    ]


def image_transforms_case(bagel, pack: Path, meta: dict, golden: dict) -> list[Comparison]:
    """The resize rule's sizes, and the pixels of every recorded picture."""
    results = []
    for name, table in meta["size_rules"].items():
        rule = ResizeRule(table["max_size"], table["min_size"], table["stride"], table["max_pixels"])
        for key, images in (("rows", 1), ("rows_img_num_3", 3)):
            got = [list(rule.output_size(*row["in_wh"], images)) for row in table[key]]
            results.append(agree(f"{name} {key}", got, [row["out_wh"] for row in table[key]]))
    config = bagel.model.config
    for row in meta["pixel_cases"]:
        letter = Path(row["image"]).stem
        rgb = to_rgb(Image.open(pack / row["image"]))
        for_vae = config.vae_transform.resize(rgb)
        for_vit = config.vit_transform.resize(for_vae)
        sizes = [list(for_vae.size), list(for_vit.size), list(image_to_tensor(for_vae).shape)]
        wanted = [row[k] for k in ("after_vae_resize_wh", "after_vit_resize_of_vae_resized_wh", "vae_tensor_chw")]
        results.append(agree(f"{letter} sizes", sizes, wanted))
        found = {
            f"{letter}.rgb_u8": torch.from_numpy(np.array(rgb)),
            f"{letter}.vae_resized_u8": torch.from_numpy(np.array(for_vae)),
            f"{letter}.vit_resized_u8": torch.from_numpy(np.array(for_vit)),
            f"{letter}.vit_tensor": image_to_tensor(for_vit),
        }
        results += [compare(name, tensor, golden[name]) for name, tensor in found.items() if name in golden]
    return results


def positions_case(bagel, pack: Path, meta: dict, golden: dict) -> list[Comparison]:
    """Position ids, sin-cos tables, time embedding, rotary tables, schedules."""
    weights, found = bagel.model.weights, {}
    for row in meta["position_id_rows"]:
        grid = (row["img_h"] // row["patch"], row["img_w"] // row["patch"], row["max_num_patches_per_side"])
        found[f"extrapolate_{row['index']}"] = position_ids(*grid)
        found[f"interpolate_{row['index']}"] = position_ids(*grid, interpolate=True)
    cos, sin = bagel.model.rope(golden["rope_pos"])
    found |= {"rope_cos": torch.cat([cos, cos], 1), "rope_sin": torch.cat([sin, sin], 1)}
    t = golden["t"].to(bagel.model.device)
    found["t_sinusoid256"] = time_sinusoid(t)
    found["t_embed"] = time_embedding(weights.time_embedder, t)
    found["t_embed_int_zero"] = time_embedding(weights.time_embedder, torch.zeros_like(t[:1]))
    for name in golden:
        if name.startswith("sincos"):
            dim, grid = (int(part.removeprefix("dim").removeprefix("grid")) for part in name.split("_")[1:])
            found[name] = sincos_table(dim, grid)
        elif name.startswith("sched"):
            points, shift = name.split("_")[1:]
            found[name] = schedule(int(points[1:]), float(shift.removeprefix("shift")))
    return _all_of(golden, found, inputs=("rope_pos", "t"))


def vit_case(bagel, pack: Path, meta: dict, golden: dict) -> list[Comparison]:
    """The vision tower over packed images, layer by layer."""
    model = bagel.model
    config, weights = model.config, model.weights
    images = []
    for path in meta["images"]:
        images.append(model.encode_patches(config.vit_transform.resize(to_rgb(Image.open(pack / path)))))
    lengths = [image.grid_h * image.grid_w for image in images]
    side = config.vit.max_patches_per_side
    ids = torch.cat([position_ids(image.grid_h, image.grid_w, side, config.interpolate_pos) for image in images])
    ids = ids.to(model.device)
    patches = torch.cat([image.patches for image in images]).to(model.device, model.dtype)
    layers = [embed_patches(weights.vit, patches, ids)]
    limits, blocks = within_images(lengths, patches.device)
    for layer in weights.vit.layers:
        layers.append(encoder_layer(layer, config.vit, layers[-1], limits, blocks))
    out = vision_tower(weights.vit, config.vit, patches, ids, lengths)
    found = {
        "patches": patches,
        "pos_ids": ids,
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)]),
        "embeddings": layers[0],
        "vit_out": out,
        "connector_out": connect(weights.connector, out),
        "llm_input": torch.cat(model.embed_patches(images)),
    }
    found |= {f"layer{index:02d}": layer for index, layer in enumerate(layers[1:])}
    return _all_of(golden, found)


def vae_case(bagel, pack: Path, meta: dict, golden: dict) -> list[Comparison]:
    """Encoding (one image, and two on a zero-padded canvas) and decoding."""
    model, vae, inputs = bagel.model, bagel.model.vae, meta["inputs"]

    def pixels_of(path):
        return image_to_tensor(model.config.vae_transform.resize(to_rgb(Image.open(pack / path))))

    def on_device(tensor):
        return tensor.to(model.device)

    pixels = on_device(pixels_of(inputs["image"])[None])
    mean, logvar = vae.moments(pixels)
    latent = vae.encode(pixels, on_device(golden["eps"]))
    canvas = torch.zeros(len(inputs["padded_images"]), 3, *inputs["padded_canvas_hw"])
    for index, path in enumerate(inputs["padded_images"]):
        picture = pixels_of(path)
        canvas[index, :, : picture.shape[1], : picture.shape[2]] = picture
    found = {
        "pixels": pixels,
        "mean": mean,
        "logvar": logvar,
        "latent": latent,
        "recon": vae.decode(latent),
        "random_latent_decoded": vae.decode(on_device(golden["random_latent"])),
        "padded_latent": vae.encode(on_device(canvas), on_device(golden["padded_eps"])),
    }
    return _all_of(golden, found, inputs=("eps", "random_latent", "padded_eps"))


def _all_of(golden: dict, found: dict, inputs: tuple[str, ...] = ()) -> list[Comparison]:
    """Compare every golden tensor; one that nothing was computed for fails."""
    nothing = torch.empty(0)
    return [compare(name, found.get(name, nothing), want) for name, want in golden.items() if name not in inputs]
