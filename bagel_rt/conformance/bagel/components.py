"""Cases of single components: tokenizer, image transforms, positions, vision tower, autoencoder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bagel_rt.conformance.compare import Comparison, Meta, Tensors, compare_tensors, compare_values
from bagel_rt.models.bagel.embed import position_ids, sincos_table, time_embedding, time_sinusoid
from bagel_rt.models.bagel.guidance import schedule
from bagel_rt.models.bagel.images import ResizeRule, image_to_tensor, official_rgb
from bagel_rt.models.bagel.vision import connect, embed_patches, encoder_layer, image_attention_plan, vision_tower
from bagel_rt.pipeline import Bagel


def run_tokenizer_case(bagel: Bagel, pack: Path, meta: Meta, golden: Tensors) -> list[Comparison]:
    """Compare special tokens, encoded texts and their roundtrips, and decoded ids."""
    tokenizer = bagel.tokenizer
    special = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "start_of_image": tokenizer.start_of_image,
        "end_of_image": tokenizer.end_of_image,
    }
    comparisons = [
        compare_values("special token ids", special, meta["special_token_ids"]),
        compare_values("length", len(tokenizer), meta["tokenizer_length"]),
    ]
    for index, row in enumerate(meta["encode"]):
        comparisons.append(compare_values(f"encode {index}", tokenizer.encode(row["text"]), row["ids"]))
        comparisons.append(compare_values(f"roundtrip {index}", tokenizer.decode(row["ids"]), row["roundtrip"]))
    for index, row in enumerate(meta["decode"]):
        comparisons.append(compare_values(f"decode {index}", tokenizer.decode(row["ids"]), row["text"]))
    return comparisons


def run_image_transforms_case(bagel: Bagel, pack: Path, meta: Meta, golden: Tensors) -> list[Comparison]:
    """Compare the output sizes of the resize rules, and the pixels of every recorded image."""
    comparisons = []
    for name, table in meta["size_rules"].items():
        rule = ResizeRule(table["max_size"], table["min_size"], table["stride"], table["max_pixels"])
        for key, img_num in (("rows", 1), ("rows_img_num_3", 3)):
            sizes = [list(rule.output_size(w, h, img_num)) for w, h in (row["in_wh"] for row in table[key])]
            comparisons.append(compare_values(f"{name} {key}", sizes, [row["out_wh"] for row in table[key]]))
    config = bagel.model.config
    for row in meta["pixel_cases"]:
        letter = Path(row["image"]).stem
        rgb = official_rgb(Image.open(pack / row["image"]))
        for_vae = config.vae_transform.resize(rgb)
        for_vit = config.vit_transform.resize(for_vae)
        sizes = [list(for_vae.size), list(for_vit.size), list(image_to_tensor(for_vae).shape)]
        recorded = [row[k] for k in ("after_vae_resize_wh", "after_vit_resize_of_vae_resized_wh", "vae_tensor_chw")]
        comparisons.append(compare_values(f"{letter} sizes", sizes, recorded))
        tensors = {
            f"{letter}.rgb_u8": torch.from_numpy(np.array(rgb)),
            f"{letter}.vae_resized_u8": torch.from_numpy(np.array(for_vae)),
            f"{letter}.vit_resized_u8": torch.from_numpy(np.array(for_vit)),
            f"{letter}.vit_tensor": image_to_tensor(for_vit),
        }
        for name, tensor in tensors.items():
            if name in golden:
                comparisons.append(compare_tensors(name, tensor, golden[name]))
    return comparisons


def run_positions_case(bagel: Bagel, pack: Path, meta: Meta, golden: Tensors) -> list[Comparison]:
    """Compare position ids, sin-cos tables, time embeddings, rotary tables and timestep schedules."""
    weights, tensors = bagel.model.weights, {}
    for row in meta["position_id_rows"]:
        grid = (row["img_h"] // row["patch"], row["img_w"] // row["patch"], row["max_num_patches_per_side"])
        tensors[f"extrapolate_{row['index']}"] = position_ids(*grid)
        tensors[f"interpolate_{row['index']}"] = position_ids(*grid, interpolate=True)
    cos, sin = bagel.model.rope(golden["rope_pos"])
    # The official tables repeat the frequencies for both halves of a head; ours hold them once.
    tensors |= {"rope_cos": torch.cat([cos, cos], 1), "rope_sin": torch.cat([sin, sin], 1)}
    t = golden["t"].to(bagel.model.device)
    tensors["t_sinusoid256"] = time_sinusoid(t)
    tensors["t_embed"] = time_embedding(weights.time_embedder, t)
    tensors["t_embed_int_zero"] = time_embedding(weights.time_embedder, torch.zeros_like(t[:1]))
    for name in golden:
        if name.startswith("sincos"):
            dim, side = (int(part.removeprefix("dim").removeprefix("grid")) for part in name.split("_")[1:])
            tensors[name] = sincos_table(dim, side)
        elif name.startswith("sched"):
            num_timesteps, shift = name.split("_")[1:]
            tensors[name] = schedule(int(num_timesteps[1:]), float(shift.removeprefix("shift")))
    return _compare_all(golden, tensors, inputs=("rope_pos", "t"))


def run_vit_case(bagel: Bagel, pack: Path, meta: Meta, golden: Tensors) -> list[Comparison]:
    """Compare the vision tower on packed images, layer by layer."""
    model = bagel.model
    config, weights = model.config, model.weights
    resize = config.vit_transform.resize
    images = [model.encode_patches(resize(official_rgb(Image.open(pack / path)))) for path in meta["images"]]
    lengths = [image.grid_h * image.grid_w for image in images]
    max_side = config.vit.max_patches_per_side
    ids = torch.cat([position_ids(image.grid_h, image.grid_w, max_side, config.interpolate_pos) for image in images])
    ids = ids.to(model.device)
    patches = torch.cat([image.patches for image in images]).to(model.device, model.dtype)
    hidden = [embed_patches(weights.vit, patches, ids)]  # the embeddings, then every layer's output
    limits, blocks = image_attention_plan(lengths, patches.device)
    for layer in weights.vit.layers:
        hidden.append(encoder_layer(layer, config.vit, hidden[-1], limits, blocks))
    output = vision_tower(weights.vit, config.vit, patches, ids, lengths)
    tensors = {
        "patches": patches,
        "pos_ids": ids,
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)]),
        "embeddings": hidden[0],
        "vit_out": output,
        "connector_out": connect(weights.connector, output),
        "llm_input": torch.cat(model.embed_patches(images)),
    }
    tensors |= {f"layer{index:02d}": states for index, states in enumerate(hidden[1:])}
    return _compare_all(golden, tensors)


def run_vae_case(bagel: Bagel, pack: Path, meta: Meta, golden: Tensors) -> list[Comparison]:
    """Compare the autoencoder: encoding one image, encoding two on a zero-padded canvas, decoding."""
    model, vae, inputs = bagel.model, bagel.model.vae, meta["inputs"]

    def load_pixels(path: str) -> torch.Tensor:
        return image_to_tensor(model.config.vae_transform.resize(official_rgb(Image.open(pack / path))))

    def on_device(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(model.device)

    pixels = on_device(load_pixels(inputs["image"])[None])
    mean, logvar = vae.moments(pixels)
    latent = vae.encode(pixels, on_device(golden["eps"]))
    canvas = torch.zeros(len(inputs["padded_images"]), 3, *inputs["padded_canvas_hw"])
    for index, path in enumerate(inputs["padded_images"]):
        image = load_pixels(path)
        canvas[index, :, : image.shape[1], : image.shape[2]] = image
    tensors = {
        "pixels": pixels,
        "mean": mean,
        "logvar": logvar,
        "latent": latent,
        "recon": vae.decode(latent),
        "random_latent_decoded": vae.decode(on_device(golden["random_latent"])),
        "padded_latent": vae.encode(on_device(canvas), on_device(golden["padded_eps"])),
    }
    return _compare_all(golden, tensors, inputs=("eps", "random_latent", "padded_eps"))


def _compare_all(golden: Tensors, tensors: Tensors, inputs: tuple[str, ...] = ()) -> list[Comparison]:
    """Compare every recorded tensor but the inputs; one that was not computed fails."""
    absent = torch.empty(0)
    return [
        compare_tensors(name, tensors.get(name, absent), recorded)
        for name, recorded in golden.items()
        if name not in inputs
    ]
