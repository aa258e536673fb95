"""The small model's data against the runtime that the model is for, and its whole recipe at toy size."""

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
from bagel_rt.tiny.data import Shares, World, ask_sample, edit_sample, encode_pool, generate_sample, pixels_of
from bagel_rt.tiny.examples import make_example, make_questions, texts
from bagel_rt.tiny.language import describe
from bagel_rt.tiny.model import initialize_, tiny_config
from bagel_rt.tiny.recipe import Recipe, Run, untrained_model
from bagel_rt.tiny.render import render
from bagel_rt.tiny.scene import split_of
from bagel_rt.tiny.tokenizer import learn_tokenizer, write_tokenizer
from bagel_rt.train.autoencoder import AutoencoderSettings
from bagel_rt.train.objective import training_losses
from bagel_rt.train.packing import Clean, Noised, Sample, SpecialTokens, ViT, pack
from bagel_rt.train.packing import Text as TextPart
from bagel_rt.train.trainer import TrainingSettings

VAE = VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4, scale_factor=0.8, shift_factor=0.1)
WIDTHS = {"hidden": 96, "layers": 2, "vit_hidden": 64, "vit_layers": 1}
T = 0.5  # the timestep of a raw draw of 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, learn_tokenizer(texts(np.random.default_rng(0), 300), 320))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def model(tokenizer) -> BagelModel:
    markers = (tokenizer.start_of_image, tokenizer.end_of_image)
    model = BagelModel.allocate(tiny_config(len(tokenizer), VAE, **WIDTHS), markers, torch.device("cpu"), torch.float32)
    randomize_(model)
    return model


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def open_contexts(model, tokenizer, draws: bool, noise=()) -> tuple[GuidanceContexts, Prefill]:
    """As the engine opens them; contents reach the cache when the prefill is run."""
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
    """The velocity of the noised picture in a training forward at T; noise [64, features]."""
    batch, latents = pack([sample], model.config, SpecialTokens.of(tokenizer), torch.zeros(1))
    padded = torch.cat([torch.zeros(len(latents) - len(noise), noise.shape[1]), noise])
    losses = training_losses(model, batch, latents, padded)
    velocity = F.linear(losses.last_hidden[batch.mse_loss_indexes], *model.weights.llm2vae)
    target = noise - latents[-len(noise) :]
    torch.testing.assert_close((velocity - target).square().mean(1), losses.mse_per_token)
    return velocity


def test_a_caption_and_its_picture_are_what_the_runtime_denoises(model, tokenizer):
    picture, noise = normal(1, 64, 16), normal(2, 64, 16)
    text = "two green squares above a red circle"
    talk, prefill = open_contexts(model, tokenizer, True)
    talk.add_text(text)
    want, without_text = runtime_velocities(model, talk, prefill, (1 - T) * picture + T * noise)
    sample = generate_sample(tokenizer.encode(text), picture)
    torch.testing.assert_close(trained_velocity(model, tokenizer, sample, noise), want, rtol=1e-4, atol=1e-5)
    dropped = Sample(sample.parts[1:])
    torch.testing.assert_close(trained_velocity(model, tokenizer, dropped, noise), without_text, rtol=1e-4, atol=1e-5)
    assert (want - without_text).abs().max() > 0.01


def test_an_edit_is_what_the_runtime_denoises(model, tokenizer):
    example = make_example(np.random.default_rng(3), "edit", "train")
    before, eps, after, noise = render(example.before), normal(4, 1, 4, 16, 16), normal(5, 64, 16), normal(6, 64, 16)
    talk, prefill = open_contexts(model, tokenizer, True, [eps])
    with torch.inference_mode():
        talk.add_image(before)
        talk.add_text(example.text)
    want, without_text = runtime_velocities(model, talk, prefill, (1 - T) * after + T * noise)
    pixels = pixels_of(example.before)
    with torch.inference_mode():
        shown = patchify(model.vae.encode(pixels[None], eps)[0], 2)
    sample = edit_sample(shown, patchify(pixels, 16), tokenizer.encode(example.text), after)
    torch.testing.assert_close(trained_velocity(model, tokenizer, sample, noise), want, rtol=1e-4, atol=1e-5)
    batch, latents = pack(
        [edit_sample(shown, patchify(pixels, 16), tokenizer.encode(example.text), after, noised=2)],
        model.config,
        SpecialTokens.of(tokenizer),
        torch.tensor([0.0, 2.0]),
    )
    with torch.inference_mode():  # the second picture, at another timestep, changes nothing for the first
        hidden = training_losses(model, batch, latents, torch.cat([0 * shown, noise, normal(7, 64, 16)])).last_hidden
        velocity = F.linear(hidden[batch.mse_loss_indexes], *model.weights.llm2vae)
    assert len(velocity) == 128
    torch.testing.assert_close(velocity[:64], want, rtol=1e-4, atol=1e-5)
    dropped = Sample([*sample.parts[:2], sample.parts[3]])
    torch.testing.assert_close(trained_velocity(model, tokenizer, dropped, noise), without_text, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_description_after_an_edit_and_the_noised_pictures_do_not_see_each_other(model, tokenizer):
    example = make_example(np.random.default_rng(3), "edit", "train")
    patches, said = patchify(pixels_of(example.before), 16), tokenizer.encode(describe(example.after))

    def losses(instruction: str, seed: int, description: list[int]):
        text, shown = tokenizer.encode(instruction), normal(4, 64, 16)
        sample = edit_sample(shown, patches, text, normal(seed, 64, 16), 2, description)
        batch, latents = pack([sample], model.config, SpecialTokens.of(tokenizer), torch.tensor([0.0, 2.0]))
        found = training_losses(model, batch, latents, normal(9, *latents.shape))
        return found.ce_per_token, found.mse_per_token

    ce, mse = losses(example.text, 5, said)
    assert len(ce) == len(said) + 1 and len(mse) == 128
    torch.testing.assert_close(losses(example.text, 6, said)[0], ce, rtol=1e-4, atol=1e-5)  # another picture after it
    torch.testing.assert_close(losses(example.text, 5, [])[1], mse, rtol=1e-4, atol=1e-5)
    assert (losses("remove the star", 5, said)[0] - ce).abs().max() > 0.01


@torch.inference_mode()
def test_an_answer_is_what_the_runtime_would_write(model, tokenizer):
    """The first one, and a later one about the same picture."""
    scene, questions = make_questions(np.random.default_rng(7), "train", 3)
    questions = [(text, "two red things") for text, _ in questions]
    talk, prefill = open_contexts(model, tokenizer, False)
    talk.add_image(render(scene))
    want = []
    for text, answer in questions:
        talk.add_text(text)
        prefill.run()
        ids = tokenizer.encode(answer)  # token by token in the runtime; a forward of all is the same
        prefill.append(talk.cond, Text((tokenizer.bos, *ids, tokenizer.eos)))
        hidden, plan = prefill.run()
        logits = model.logits(hidden[torch.from_numpy(np.argsort(plan.order))])[:-1]
        want.append(F.cross_entropy(logits, torch.tensor([*ids, tokenizer.eos]), reduction="none"))
    encoded = [(tokenizer.encode(text), tokenizer.encode(answer)) for text, answer in questions]
    sample = ask_sample(patchify(pixels_of(scene), 16), encoded)
    batch, latents = pack([sample], model.config, SpecialTokens.of(tokenizer), torch.empty(0))
    found = training_losses(model, batch, latents, latents).ce_per_token
    torch.testing.assert_close(found, torch.cat(want), rtol=1e-4, atol=1e-5)


# The pool and the samples drawn from it


@pytest.fixture(scope="module")
def pool(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_data, "_SHARD", 4)
        assert not encode_pool(model.vae, folder, 6, 0, seconds=-1, progress=False)
        assert encode_pool(model.vae, folder, 6, 0, progress=False)
        first = sorted(file.stat().st_mtime_ns for file in folder.iterdir())
        assert encode_pool(model.vae, folder, 6, 0, progress=False)
        assert sorted(file.stat().st_mtime_ns for file in folder.iterdir()) == first and len(first) == 2
        yield folder


def parts_of(sample: Sample) -> list:
    return [type(part) for part in sample.parts]


def test_tasks_are_drawn_by_their_shares(model, tokenizer, pool):
    kinds = {
        "generate": [TextPart, Noised],
        "edit": [Clean, ViT, TextPart, Noised, Noised, Noised, TextPart],
        "ask": [ViT, *[TextPart, TextPart] * 7],
        "describe": [ViT, TextPart, TextPart],
        "foresee": [ViT, TextPart, TextPart],
    }
    for task, kind in kinds.items():
        shares = Shares(**{name: float(name == task) for name in kinds})
        world = World(model.config, tokenizer, pool, 6, 0, shares)
        rng = np.random.default_rng(0)
        assert all(parts_of(world.draw(rng)) == kind for _ in range(20))
    world, rng = World(model.config, tokenizer, pool, 6, 0, Shares(read=1)), np.random.default_rng(0)
    read = [parts_of(world.draw(rng)) for _ in range(60)]
    assert {len(parts) for parts in read} == {2, 3, 13} and all(set(parts) == {TextPart} for parts in read)
    world = World(model.config, tokenizer, pool, 6, 0, Shares(1, 1, 2))
    rng = np.random.default_rng(0)
    drawn = [parts_of(world.draw(rng)) for _ in range(400)]
    assert 170 < drawn.count(kinds["ask"]) < 230 and 70 < drawn.count(kinds["edit"]) < 130


def test_what_is_foreseen_is_the_picture_after_the_edit(model, tokenizer, pool):
    world = World(model.config, tokenizer, pool, 6, 0, Shares(foresee=1))
    for seed in range(20):
        shown, told, said = world.draw(np.random.default_rng(seed)).parts
        again = np.random.default_rng(seed)
        again.random()  # which task
        example = make_example(again, "edit", "train")
        assert torch.equal(shown.patches, patchify(pixels_of(example.before), 16))
        assert (tokenizer.decode(told.ids), told.loss) == (example.text, False)
        assert (tokenizer.decode(said.ids), said.loss) == (describe(example.after), True)


def test_a_sample_is_a_function_of_the_generator(model, tokenizer, pool):
    world = World(model.config, tokenizer, pool, 6, 0, Shares(6, 2, 3))
    for seed in range(10):
        one, two = (world.draw(np.random.default_rng(seed)) for _ in range(2))
        for first, second in zip(one.parts, two.parts, strict=True):
            for name, value in vars(first).items():
                assert torch.equal(value, vars(second)[name]) if isinstance(value, torch.Tensor) else True
        assert str(one.parts[-1])[:20] == str(two.parts[-1])[:20]


def test_latents_are_samples_of_the_pictures_posterior(model, tokenizer, pool):
    world = World(model.config, tokenizer, pool, 6, 0, Shares(6, 2, 3))
    rng = np.random.default_rng(1)
    drawn = torch.stack([world.edit(rng).parts[3].latents for _ in range(400)])
    wanted = []
    for index in (1, 2, 4, 5):  # the edits
        scene = tiny_data.pool_example(0, index).after
        assert split_of(scene) == "train"
        with torch.inference_mode():
            mean, logvar = model.vae.moments(pixels_of(scene)[None])
        wanted.append((patchify((mean[0] - 0.1) * 0.8, 2), patchify(torch.exp(logvar[0] / 2) * 0.8, 2)))
    means, deviations = (torch.stack(parts) for parts in zip(*wanted, strict=True))
    distances = ((drawn[:, None] - means) / deviations).square().mean((2, 3))
    assert (distances.min(1).values - 1).abs().max() < 0.2  # chi-squared of 1024 numbers
    assert set(distances.argmin(1).tolist()) == {0, 1, 2, 3}


def test_a_folder_of_another_pool_is_refused(model, tokenizer, pool):
    with pytest.raises(ValueError, match="10 posteriors, but 5 examples of seed 0 have"):
        World(model.config, tokenizer, pool, 5, 0, Shares(6, 2, 3))


# The recipe

TOY = Recipe(
    texts=300,
    vocabulary=320,
    vae=replace(VAE, scale_factor=1.0, shift_factor=0.0),
    autoencoder=AutoencoderSettings(steps=3, warmup_steps=1),
    measured=2,
    pool=6,
    widths=WIDTHS,
    sight=TrainingSettings(steps=2, tokens=400, warmup_steps=1),
    sight_shares=Shares(ask=1, describe=1),
    training=TrainingSettings(steps=3, tokens=400, warmup_steps=1),
    training_shares=Shares(generate=1, edit=1, ask=1),
)
DONE = ("tokenizer", "autoencoder", "latents", "sight", "training")  # nothing is written by these once they are done


@pytest.mark.slow
def test_the_recipe_makes_a_model_folder_that_draws(tmp_path):
    assert not Run(tmp_path, TOY, progress=False).run(seconds=0)
    assert (tmp_path / "tokenizer" / "vocab.json").exists() and not (tmp_path / "autoencoder" / "ae.json").exists()
    assert Run(tmp_path, TOY, progress=False).run()
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["seconds"]) == {"tokenizer", "autoencoder", "latents", "sight", "training", "model"}
    assert report["bytes"]["ema.safetensors"] > 0 and {"psnr", "agreement"} < set(report["autoencoder"])
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.width > 500
    config = BagelConfig.from_folder(tmp_path / "model")
    assert config.vae.scale_factor == pytest.approx(report["autoencoder"]["scale_factor"])
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*") if path.parent.name in DONE}
    assert Run(tmp_path, TOY, progress=False).run()
    assert len(done) > 8 and all(path.stat().st_mtime_ns == changed for path, changed in done.items())
    bagel = Bagel.from_pretrained(tmp_path / "model", device="cpu")
    assert bagel.generate("a red circle", num_timesteps=3).image.size == (128, 128)
    picture = Image.new("RGB", (128, 128), "red")
    assert isinstance(bagel.chat("what color is the circle", picture, max_think_token_n=3), str)
    assert bagel.edit(picture, "make the circle blue", num_timesteps=3).image.size == (128, 128)


@pytest.mark.slow
def test_training_goes_on_from_sight(tmp_path):
    run = Run(tmp_path, replace(TOY, training=replace(TOY.training, learning_rate=1e-12)), progress=False)
    assert run.run()
    sight, trained = (run.trainer(stage).averaged().weights for stage in ("sight", "training"))
    start = untrained_model(TOY, Tokenizer.from_folder(tmp_path / "tokenizer"), tmp_path / "autoencoder").weights
    assert not torch.equal(sight.layers[0].qkv.und, start.layers[0].qkv.und)
    assert torch.equal(sight.layers[0].qkv.gen, start.layers[0].qkv.gen)  # no picture was drawn
    torch.testing.assert_close(trained.layers[0].qkv.und, sight.layers[0].qkv.und, rtol=0, atol=1e-8)


def test_the_model_starts_from_the_usual_values(model):
    start = BagelModel.allocate(model.config, model.markers, torch.device("cpu"), torch.float32)
    initialize_(start, 0)
    assert (start.weights.llm2vae.weight == 0).all() and (start.weights.norm.gen == 1).all()
    assert start.weights.layers[0].qkv.gen.std() == pytest.approx(96**-0.5, rel=0.05)
    assert start.weights.layers[0].down.und.std() == pytest.approx((2 * 2 * 192) ** -0.5, rel=0.05)
    assert not torch.equal(start.weights.layers[0].qkv.gen, start.weights.layers[0].qkv.und)
    torch.testing.assert_close(start.weights.latent_positions / 3, model.weights.latent_positions, rtol=0, atol=0.004)


def test_a_latent_token_looks_at_its_own_place_first(model):
    """In one of the query heads of each key head."""
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


def test_a_word_looks_at_the_one_before_it(model):
    """In the first head of the first two layers of the understanding expert, whatever the words are."""
    config = tiny_config(320, VAE, **WIDTHS | {"layers": 3})
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
        seen = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(1)
        back = seen.diagonal(-1).mean()
        assert back > 0.4 if number < 2 else back < 0.2


def test_sight_begins_with_a_place_for_every_patch(model):
    fresh = BagelModel.allocate(model.config, model.markers, torch.device("cpu"), torch.float32)
    initialize_(fresh, 0)
    table = fresh.weights.vit.position_embedding
    assert torch.cdist(table, table).add(torch.eye(64)).min() > 0.5 and table.square().mean().sqrt() > 1
    patches = torch.from_numpy(np.stack([np.full(768, level, np.float32) for level in (-1, 1)]))
    seen = F.linear(patches, *fresh.weights.vit.patch_embedding)
    assert seen.square().mean().sqrt() > 3 * table.square().mean().sqrt()  # what is seen is louder than where
