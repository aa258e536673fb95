"""The training samples of the embedded model against the runtime, and the whole recipe at toy size."""

import json
from dataclasses import replace

import denoising
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bagel_rt import Bagel
from bagel_rt.kernels.qk_norm_rope import qk_norm_rope_reference
from bagel_rt.models.bagel.config import BagelConfig, VAEConfig
from bagel_rt.models.bagel.contents import Text
from bagel_rt.models.bagel.contexts import GuidanceContexts
from bagel_rt.models.bagel.embed import patchify
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.random_checkpoint import randomize_
from bagel_rt.models.bagel.settings import ImageSettings
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.runtime.context import Prefill
from bagel_rt.tiny import data as tiny_data
from bagel_rt.tiny.data import (
    TaskMixture,
    TaskSampler,
    ask_sample,
    edit_sample,
    encode_pool,
    generate_sample,
    pixels_of,
)
from bagel_rt.tiny.examples import make_example, make_questions, texts
from bagel_rt.tiny.language import describe
from bagel_rt.tiny.model import initialize_, tiny_config
from bagel_rt.tiny.recipe import Recipe, RecipeRun, untrained_model
from bagel_rt.tiny.render import render
from bagel_rt.tiny.scene import split_of
from bagel_rt.tiny.tokenizer import train_tokenizer, write_tokenizer
from bagel_rt.train.autoencoder import AutoencoderSettings
from bagel_rt.train.objective import training_losses
from bagel_rt.train.packing import Clean, Noised, Sample, SpecialTokens, ViT, pack
from bagel_rt.train.packing import Text as TextPart
from bagel_rt.train.trainer import TrainingSettings

VAE = VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4, scale_factor=0.8, shift_factor=0.1)
MODEL_SIZES = {"hidden": 96, "layers": 2, "vit_hidden": 64, "vit_layers": 1}
T = 0.5  # the timestep of a raw value of 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, train_tokenizer(texts(np.random.default_rng(0), 300), 320))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def model(tokenizer) -> BagelModel:
    markers = (tokenizer.start_of_image, tokenizer.end_of_image)
    model = BagelModel.allocate(
        tiny_config(len(tokenizer), VAE, **MODEL_SIZES), markers, torch.device("cpu"), torch.float32
    )
    randomize_(model)
    return model


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def open_contexts(model, tokenizer, draws: bool, noise=()) -> tuple[GuidanceContexts, Prefill]:
    """Open contexts like the engine does. Contents are written to the cache when the prefill runs."""
    prefill = Prefill(model, model.make_cache())
    return model.open_contexts(prefill, tokenizer, [], noise=list(noise), draws=draws), prefill


@torch.inference_mode()
def runtime_velocities(model, contexts: GuidanceContexts, prefill: Prefill, x: torch.Tensor):
    """(cond, no_text) velocities of the state ``x`` at T, as the runtime's denoiser computes them."""
    prefill.run()
    settings = ImageSettings(num_timesteps=3, timestep_shift=1.0, cfg_text_scale=2.0, cfg_interval=(0.0, 1.0))
    denoiser = denoising.start(model, prefill.cache, contexts.branches, x, settings, (8, 8))
    assert denoiser.guidance.timesteps[1] == T
    denoiser.state.copy_(x)
    return denoiser.branch_outputs(1)[0][:2]


@torch.inference_mode()
def trained_velocity(model, tokenizer, sample: Sample, noise: torch.Tensor) -> torch.Tensor:
    """The velocity of the noised image in a training forward at T, for noise [64, features]."""
    batch, latents = pack([sample], model.config, SpecialTokens.of(tokenizer), torch.zeros(1))
    padded = torch.cat([torch.zeros(len(latents) - len(noise), noise.shape[1]), noise])
    losses = training_losses(model, batch, latents, padded)
    velocity = F.linear(losses.last_hidden[batch.mse_loss_indexes], *model.weights.llm2vae)
    target = noise - latents[-len(noise) :]
    torch.testing.assert_close((velocity - target).square().mean(1), losses.mse_per_token)
    return velocity


def test_generate_sample_matches_runtime_velocity(model, tokenizer):
    image, noise = normal(1, 64, 16), normal(2, 64, 16)
    text = "two green squares above a red circle"
    contexts, prefill = open_contexts(model, tokenizer, True)
    contexts.add_text(text)
    expected, without_text = runtime_velocities(model, contexts, prefill, (1 - T) * image + T * noise)
    sample = generate_sample(tokenizer.encode(text), image)
    torch.testing.assert_close(trained_velocity(model, tokenizer, sample, noise), expected, rtol=1e-4, atol=1e-5)
    dropped = Sample(sample.parts[1:])
    torch.testing.assert_close(trained_velocity(model, tokenizer, dropped, noise), without_text, rtol=1e-4, atol=1e-5)
    assert (expected - without_text).abs().max() > 0.01


def test_edit_sample_matches_runtime_velocity(model, tokenizer):
    example = make_example(np.random.default_rng(3), "edit", "train")
    before, eps, after, noise = render(example.before), normal(4, 1, 4, 16, 16), normal(5, 64, 16), normal(6, 64, 16)
    contexts, prefill = open_contexts(model, tokenizer, True, [eps])
    with torch.inference_mode():
        contexts.add_image(before)
        contexts.add_text(example.text)
    expected, without_text = runtime_velocities(model, contexts, prefill, (1 - T) * after + T * noise)
    pixels = pixels_of(example.before)
    with torch.inference_mode():
        clean = patchify(model.vae.encode(pixels[None], eps)[0], 2)
    sample = edit_sample(clean, patchify(pixels, 16), tokenizer.encode(example.text), after)
    torch.testing.assert_close(trained_velocity(model, tokenizer, sample, noise), expected, rtol=1e-4, atol=1e-5)
    batch, latents = pack(
        [edit_sample(clean, patchify(pixels, 16), tokenizer.encode(example.text), after, noised_copies=2)],
        model.config,
        SpecialTokens.of(tokenizer),
        torch.tensor([0.0, 2.0]),
    )
    with torch.inference_mode():  # the second copy, at another timestep, does not affect the first
        hidden = training_losses(model, batch, latents, torch.cat([0 * clean, noise, normal(7, 64, 16)])).last_hidden
        velocity = F.linear(hidden[batch.mse_loss_indexes], *model.weights.llm2vae)
    assert len(velocity) == 128
    torch.testing.assert_close(velocity[:64], expected, rtol=1e-4, atol=1e-5)
    dropped = Sample([*sample.parts[:2], sample.parts[3]])
    torch.testing.assert_close(trained_velocity(model, tokenizer, dropped, noise), without_text, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_description_after_an_edit_is_independent_of_noised_images(model, tokenizer):
    example = make_example(np.random.default_rng(3), "edit", "train")
    patches, ids = patchify(pixels_of(example.before), 16), tokenizer.encode(describe(example.after))

    def losses(instruction: str, seed: int, description: list[int]):
        text, before = tokenizer.encode(instruction), normal(4, 64, 16)
        sample = edit_sample(before, patches, text, normal(seed, 64, 16), 2, description)
        batch, latents = pack([sample], model.config, SpecialTokens.of(tokenizer), torch.tensor([0.0, 2.0]))
        result = training_losses(model, batch, latents, normal(9, *latents.shape))
        return result.ce_per_token, result.mse_per_token

    ce, mse = losses(example.text, 5, ids)
    assert len(ce) == len(ids) + 1 and len(mse) == 128
    torch.testing.assert_close(losses(example.text, 6, ids)[0], ce, rtol=1e-4, atol=1e-5)  # another noised image
    torch.testing.assert_close(losses(example.text, 5, [])[1], mse, rtol=1e-4, atol=1e-5)
    assert (losses("remove the star", 5, ids)[0] - ce).abs().max() > 0.01


@torch.inference_mode()
def test_ask_sample_matches_runtime_logits(model, tokenizer):
    """For the first question and for a later one about the same image."""
    scene, questions = make_questions(np.random.default_rng(7), "train", 3)
    questions = [(text, "two red things") for text, _ in questions]
    contexts, prefill = open_contexts(model, tokenizer, False)
    contexts.add_image(render(scene))
    expected = []
    for text, answer in questions:
        contexts.add_text(text)
        prefill.run()
        ids = tokenizer.encode(answer)  # the runtime decodes token by token; one forward of all tokens is equivalent
        prefill.append(contexts.cond, Text((tokenizer.bos, *ids, tokenizer.eos)))
        hidden, plan = prefill.run()
        logits = model.logits(hidden[torch.from_numpy(np.argsort(plan.order))])[:-1]
        expected.append(F.cross_entropy(logits, torch.tensor([*ids, tokenizer.eos]), reduction="none"))
    encoded = [(tokenizer.encode(text), tokenizer.encode(answer)) for text, answer in questions]
    sample = ask_sample(patchify(pixels_of(scene), 16), encoded)
    batch, latents = pack([sample], model.config, SpecialTokens.of(tokenizer), torch.empty(0))
    ce = training_losses(model, batch, latents, latents).ce_per_token
    torch.testing.assert_close(ce, torch.cat(expected), rtol=1e-4, atol=1e-5)


# The pool and the samples drawn from it


@pytest.fixture(scope="module")
def pool(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_data, "_SHARD_SIZE", 4)
        assert not encode_pool(model.vae, folder, 6, 0, seconds=-1, progress=False)
        assert encode_pool(model.vae, folder, 6, 0, progress=False)
        first = sorted(file.stat().st_mtime_ns for file in folder.iterdir())
        assert encode_pool(model.vae, folder, 6, 0, progress=False)
        assert sorted(file.stat().st_mtime_ns for file in folder.iterdir()) == first and len(first) == 2
        yield folder


def parts_of(sample: Sample) -> list:
    return [type(part) for part in sample.parts]


def test_tasks_follow_the_mixture(model, tokenizer, pool):
    kinds = {
        "generate": [TextPart, Noised],
        "edit": [Clean, ViT, TextPart, Noised, Noised, Noised, TextPart],
        "ask": [ViT, *[TextPart, TextPart] * 7],
        "describe": [ViT, TextPart, TextPart],
        "predict_edit": [ViT, TextPart, TextPart],
    }
    for task, kind in kinds.items():
        mixture = TaskMixture(**{name: float(name == task) for name in kinds})
        sampler = TaskSampler(model.config, tokenizer, pool, 6, 0, mixture)
        rng = np.random.default_rng(0)
        assert all(parts_of(sampler.draw(rng)) == kind for _ in range(20))
    sampler, rng = TaskSampler(model.config, tokenizer, pool, 6, 0, TaskMixture(text_only=1)), np.random.default_rng(0)
    text_only = [parts_of(sampler.draw(rng)) for _ in range(60)]
    assert {len(parts) for parts in text_only} == {2, 3, 13} and all(set(parts) == {TextPart} for parts in text_only)
    sampler = TaskSampler(model.config, tokenizer, pool, 6, 0, TaskMixture(1, 1, 2))
    rng = np.random.default_rng(0)
    samples = [parts_of(sampler.draw(rng)) for _ in range(400)]
    assert 170 < samples.count(kinds["ask"]) < 230 and 70 < samples.count(kinds["edit"]) < 130


def test_predict_edit_describes_the_image_after_the_edit(model, tokenizer, pool):
    sampler = TaskSampler(model.config, tokenizer, pool, 6, 0, TaskMixture(predict_edit=1))
    for seed in range(20):
        image, instruction, description = sampler.draw(np.random.default_rng(seed)).parts
        again = np.random.default_rng(seed)
        again.random()  # the choice of the task
        example = make_example(again, "edit", "train")
        assert torch.equal(image.patches, patchify(pixels_of(example.before), 16))
        assert (tokenizer.decode(instruction.ids), instruction.loss) == (example.text, False)
        assert (tokenizer.decode(description.ids), description.loss) == (describe(example.after), True)


def test_samples_are_deterministic(model, tokenizer, pool):
    sampler = TaskSampler(model.config, tokenizer, pool, 6, 0, TaskMixture(6, 2, 3))
    for seed in range(10):
        one, two = (sampler.draw(np.random.default_rng(seed)) for _ in range(2))
        for first, second in zip(one.parts, two.parts, strict=True):
            for name, value in vars(first).items():
                assert torch.equal(value, vars(second)[name]) if isinstance(value, torch.Tensor) else True
        assert str(one.parts[-1])[:20] == str(two.parts[-1])[:20]


def test_latents_are_sampled_from_the_posterior(model, tokenizer, pool):
    sampler = TaskSampler(model.config, tokenizer, pool, 6, 0, TaskMixture(6, 2, 3))
    rng = np.random.default_rng(1)
    sampled = torch.stack([sampler.edit(rng).parts[3].latents for _ in range(400)])
    expected = []
    for index in (1, 2, 4, 5):  # the edits
        scene = tiny_data.pool_example(0, index).after
        assert split_of(scene) == "train"
        with torch.inference_mode():
            mean, logvar = model.vae.moments(pixels_of(scene)[None])
        expected.append((patchify((mean[0] - 0.1) * 0.8, 2), patchify(torch.exp(logvar[0] / 2) * 0.8, 2)))
    means, deviations = (torch.stack(parts) for parts in zip(*expected, strict=True))
    distances = ((sampled[:, None] - means) / deviations).square().mean((2, 3))
    assert (distances.min(1).values - 1).abs().max() < 0.2  # chi-squared of 1024 numbers
    assert set(distances.argmin(1).tolist()) == {0, 1, 2, 3}


def test_rejects_folder_of_another_pool(model, tokenizer, pool):
    with pytest.raises(ValueError, match="must have [0-9]+ posteriors, for 5 examples of seed 0, got 10"):
        TaskSampler(model.config, tokenizer, pool, 5, 0, TaskMixture(6, 2, 3))


# The recipe

TOY = Recipe(
    texts=300,
    vocabulary=320,
    vae=replace(VAE, scale_factor=1.0, shift_factor=0.0),
    autoencoder=AutoencoderSettings(steps=3, warmup_steps=1),
    eval_images=2,
    pool=6,
    model_sizes=MODEL_SIZES,
    understanding=TrainingSettings(steps=2, tokens=400, warmup_steps=1),
    understanding_mixture=TaskMixture(ask=1, describe=1),
    training=TrainingSettings(steps=3, tokens=400, warmup_steps=1),
    training_mixture=TaskMixture(generate=1, edit=1, ask=1),
)
DONE = (
    "tokenizer",
    "autoencoder",
    "latents",
    "understanding",
    "training",
)  # write nothing when run again


@pytest.mark.slow
def test_recipe_writes_a_working_model_folder(tmp_path):
    assert not RecipeRun(tmp_path, TOY, progress=False).run(seconds=0)
    assert (tmp_path / "tokenizer" / "vocab.json").exists() and not (tmp_path / "autoencoder" / "ae.json").exists()
    assert RecipeRun(tmp_path, TOY, progress=False).run()
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["seconds"]) == {"tokenizer", "autoencoder", "latents", "understanding", "training", "model"}
    assert report["bytes"]["ema.safetensors"] > 0 and {"psnr", "agreement"} < set(report["autoencoder"])
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.width > 500
    config = BagelConfig.from_folder(tmp_path / "model")
    assert config.vae.scale_factor == pytest.approx(report["autoencoder"]["scale_factor"])
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*") if path.parent.name in DONE}
    assert RecipeRun(tmp_path, TOY, progress=False).run()
    assert len(done) > 8 and all(path.stat().st_mtime_ns == changed for path, changed in done.items())
    bagel = Bagel.from_pretrained(tmp_path / "model", device="cpu")
    assert bagel.generate("a red circle", num_timesteps=3).image.size == (128, 128)
    image = Image.new("RGB", (128, 128), "red")
    assert isinstance(bagel.chat("what color is the circle", image, max_think_token_n=3), str)
    assert bagel.edit(image, "make the circle blue", num_timesteps=3).image.size == (128, 128)


@pytest.mark.slow
def test_training_starts_from_the_understanding_stage(tmp_path):
    run = RecipeRun(tmp_path, replace(TOY, training=replace(TOY.training, learning_rate=1e-12)), progress=False)
    assert run.run()
    understanding, trained = (run.trainer(stage).averaged().weights for stage in ("understanding", "training"))
    start = untrained_model(TOY, Tokenizer.from_folder(tmp_path / "tokenizer"), tmp_path / "autoencoder").weights
    assert not torch.equal(understanding.layers[0].qkv.und, start.layers[0].qkv.und)
    assert torch.equal(understanding.layers[0].qkv.gen, start.layers[0].qkv.gen)  # this stage generates no images
    torch.testing.assert_close(trained.layers[0].qkv.und, understanding.layers[0].qkv.und, rtol=0, atol=1e-8)


def test_initialization_has_the_documented_scales(model):
    start = BagelModel.allocate(model.config, model.markers, torch.device("cpu"), torch.float32)
    initialize_(start, 0)
    assert (start.weights.llm2vae.weight == 0).all() and (start.weights.norm.gen == 1).all()
    assert start.weights.layers[0].qkv.gen.std() == pytest.approx(96**-0.5, rel=0.05)
    assert start.weights.layers[0].down.und.std() == pytest.approx((2 * 2 * 192) ** -0.5, rel=0.05)
    assert not torch.equal(start.weights.layers[0].qkv.gen, start.weights.layers[0].qkv.und)
    torch.testing.assert_close(start.weights.latent_positions / 3, model.weights.latent_positions, rtol=0, atol=0.004)


def test_latent_tokens_attend_to_their_own_position_at_initialization(model):
    """In one query head of each KV head."""
    fresh = BagelModel.allocate(model.config, model.markers, torch.device("cpu"), torch.float32)
    initialize_(fresh, 0)
    llm = model.config.llm
    places = F.rms_norm(fresh.weights.latent_positions, (llm.hidden_size,))
    for layer in fresh.weights.layers:
        q, k, _ = layer.qkv.gen.unflatten(0, (-1, llm.head_dim)).split((llm.num_heads, *[llm.num_kv_heads] * 2))
        own = []
        for head in range(llm.num_heads):
            query, key = (F.rms_norm(places @ w.T, (llm.head_dim,)) for w in (q[head], k[head // 3]))
            own.append(((query @ key.T).argmax(dim=1) == torch.arange(64)).float().mean().item())
        assert own[::3] == [1.0] * llm.num_kv_heads and max(own[1:3]) < 0.5


def test_previous_token_head_at_initialization(model):
    """In the first head of the first two layers of the understanding expert, for random inputs."""
    config = tiny_config(320, VAE, **MODEL_SIZES | {"layers": 3})
    fresh = BagelModel.allocate(config, model.markers, torch.device("cpu"), torch.float32)
    initialize_(fresh, 0)
    llm, weights = config.llm, fresh.weights
    words, heads = F.rms_norm(normal(1, 40, llm.hidden_size), (llm.hidden_size,)), llm.num_heads + llm.num_kv_heads
    cos, sin = model.rope(torch.arange(40))
    for number, layer in enumerate(weights.layers):
        qkv = F.linear(words, layer.qkv.und, layer.qkv_bias.und)
        cache = torch.zeros(40, llm.num_kv_heads, llm.head_dim)
        norms = torch.ones(heads, llm.head_dim)
        q = qk_norm_rope_reference(qkv, norms, norms, cos, sin, torch.arange(40), cache, cache.clone(), 0, 1e-6)
        scores = q[:, 0] @ cache[:, 0].T / llm.head_dim**0.5
        probabilities = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(1)
        back = probabilities.diagonal(-1).mean()
        assert back > 0.4 if number < 2 else back < 0.2


def test_vision_tower_distinguishes_positions_at_initialization(model):
    fresh = BagelModel.allocate(model.config, model.markers, torch.device("cpu"), torch.float32)
    initialize_(fresh, 0)
    table = fresh.weights.vit.position_embedding
    assert torch.cdist(table, table).add(torch.eye(64)).min() > 0.5 and table.square().mean().sqrt() > 1
    patches = torch.from_numpy(np.stack([np.full(768, level, np.float32) for level in (-1, 1)]))
    outputs = F.linear(patches, *fresh.weights.vit.patch_embedding)
    assert outputs.square().mean().sqrt() > 3 * table.square().mean().sqrt()  # content has a larger scale than position
