"""The official interface over this runtime, against what the official code was recorded to compute through it."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT
from official_modules import OfficialScript, SlowTokenizer, levels_apart, load_official, open_parts
from PIL import Image
from safetensors.torch import load_file

from bagel_rt import Bagel
from bagel_rt.compat import InterleaveInferencer, accelerate
from bagel_rt.compat.adopt import adopt_tokenizer
from bagel_rt.conformance.requests import _draws
from bagel_rt.prompts import THINK_BEFORE_IMAGE
from bagel_rt.tokenizer import Tokenizer

PACK = CHECKPOINT.parent
REQUESTS = sorted(
    case.name
    for case in (PACK / "cases").iterdir()
    if case.name[0] in "1234" and "batch2" not in case.name and "thinkmorph" not in case.name
)
GUIDANCE = ("cfg_text_scale", "cfg_img_scale", "cfg_interval", "cfg_renorm_min", "cfg_renorm_type")


class Case:
    """A recorded request: inputs, hyper-parameters, outputs and draws."""

    def __init__(self, name: str):
        self.folder = PACK / "cases" / name
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.hyper = self.meta["inputs"]["hyper"]
        self.parts = open_parts(PACK, self.meta["inputs"]["interleave_inputs"])
        golden = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            golden |= load_file(file)
        self.golden = golden
        self.draws = [] if self.hyper["understanding_output"] else _draws(self.meta, golden)

    def feed(self, monkeypatch) -> None:
        """Let torch.randn give the recorded draws, in order, and nothing after them."""
        draws = iter(self.draws)

        def randn(*shape, **_):
            drawn = next(draws)
            assert tuple(drawn.shape) in (shape, *shape)
            return drawn.clone()

        monkeypatch.setattr(torch, "randn", randn)

    def check(self, outputs: list) -> None:
        assert len(outputs) == len(self.meta["outputs"])
        for output, wanted in zip(outputs, self.meta["outputs"], strict=True):
            if isinstance(output, str):
                assert output == wanted["text"]
            else:
                assert levels_apart(output, Image.open(self.folder / wanted["image"])) <= 1


@pytest.fixture
def official():
    return load_official(CHECKPOINT)


def inferencer(official) -> InterleaveInferencer:
    return InterleaveInferencer(
        official.model, official.vae_model, official.tokenizer, official.vae_transform, official.vit_transform,
        official.new_token_ids,
    )  # fmt: skip


# The inferencer


@pytest.mark.parametrize("name", REQUESTS)
def test_the_inferencer_gives_what_the_official_one_gave(name, official, monkeypatch):
    case = Case(name)
    case.feed(monkeypatch)
    case.check(inferencer(official).interleave_inference(case.parts, **case.hyper))


def test_a_call_returns_picture_and_text_by_name(official, monkeypatch):
    case = Case("40_think_t2i")
    case.feed(monkeypatch)
    output = inferencer(official)(text=case.parts[0], **case.hyper)
    case.check([output["text"], output["image"]])
    assert inferencer(load_official(CHECKPOINT))() == {"image": None, "text": None}


@pytest.mark.parametrize("name", ["13_t2i_channel", "20_edit_text_channel", "41_think_edit"])
def test_contexts_that_a_script_arranges_itself(name, official, monkeypatch):
    case, runtime = Case(name), inferencer(official)
    case.feed(monkeypatch)
    hyper, outputs = case.hyper, []
    gen, no_img = runtime.init_gen_context(), runtime.init_gen_context()
    no_text, size = deepcopy(gen), tuple(hyper["image_shapes"])
    if hyper["think"]:
        gen = runtime.update_context_text(THINK_BEFORE_IMAGE, gen)
        no_img = runtime.update_context_text(THINK_BEFORE_IMAGE, no_img)
    for part in case.parts:
        if isinstance(part, str):
            no_text = deepcopy(gen)
            gen, no_img = runtime.update_context_text(part, gen), runtime.update_context_text(part, no_img)
        else:
            resized = official.ours.vae_transform.resize(part.convert("RGB"))
            gen = runtime.update_context_image(resized, gen)
            no_text, size = deepcopy(gen), resized.size[::-1]
    if hyper["think"]:
        outputs.append(runtime.gen_text(gen, max_length=hyper["max_think_token_n"], do_sample=False))
        gen = runtime.update_context_text(outputs[0], gen)
    settings = {name: hyper[name] for name in (*GUIDANCE, "num_timesteps", "timestep_shift")}
    outputs.append(runtime.gen_image(size, gen, cfg_text_precontext=no_text, cfg_img_precontext=no_img, **settings))
    case.check(outputs)


def test_the_seed_of_torch_decides_the_picture(official):
    runtime = inferencer(official)

    def drawn(seed):
        torch.manual_seed(seed)
        return runtime(text="a cat", image_shapes=(48, 32), num_timesteps=4)["image"]

    first = drawn(3)
    assert first.size == (32, 48)
    assert levels_apart(first, drawn(3)) == 0 and levels_apart(first, drawn(4)) > 8


def test_a_loaded_bagel_can_stand_behind_it(bagel):
    torch.manual_seed(7)
    drawn = InterleaveInferencer(bagel)(text="a cat", image_shapes=(32, 32), num_timesteps=4)["image"]
    wanted = bagel.generate("a cat", size=(32, 32), num_timesteps=4, seed=7, cfg_text_scale=3.0)
    assert levels_apart(drawn, wanted.image) == 0


# The accelerated module


def run_script(case: Case, official, vae_model) -> tuple[list[str], torch.Tensor | None]:
    """What the official inferencer does for a request, in its own calls: texts, and the final latent."""
    script, hyper, texts = OfficialScript(official), case.hyper, []
    gen, no_img, size = script.context(), script.context(), None
    no_text = script.context()
    for part in case.parts:
        if isinstance(part, str):
            no_text = deepcopy(gen)
            script.add_text(gen, part)
            script.add_text(no_img, part)
        else:
            resized = official.ours.vae_transform.resize(part.convert("RGB"))
            if not hyper["understanding_output"]:
                script.add_vae(gen, resized, vae_model)
            script.add_vit(gen, resized)
            no_text, size = deepcopy(gen), resized.size[::-1]
    if hyper["understanding_output"]:
        return [script.write(gen, hyper["max_think_token_n"])], None
    settings = {name: hyper[name] for name in (*GUIDANCE, "num_timesteps", "timestep_shift")}
    noise, size = case.draws[-1], size or tuple(hyper["image_shapes"])
    return texts, script.draw(size, noise, gen, no_text, no_img, **settings)


@pytest.mark.parametrize("name", ["12_t2i_app_default", "17_t2i_interval_boundary", "20_edit_text_channel"])
def test_the_accelerated_module_draws_what_the_official_one_drew(name, official, monkeypatch):
    case = Case(name)
    accelerate(official.model, official.vae_model)
    case.feed(monkeypatch)
    _, latent = run_script(case, official, official.vae_model)
    [wanted] = [tensor for name, tensor in case.golden.items() if name.endswith(".final_latent")]
    assert (latent - wanted).abs().max() <= 5e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", ["30_und_basic", "31_und_two_images", "34_und_eos"])
def test_the_accelerated_module_answers_what_the_official_one_answered(name, official):
    case = Case(name)
    accelerate(official.model)
    texts, _ = run_script(case, official, None)
    case.check(texts)
    images = [official.ours.vae_transform.resize(part.convert("RGB")) for part in case.parts[:-1]]
    marks, transform = official.new_token_ids, official.vit_transform
    length = case.hyper["max_think_token_n"]
    case.check([official.model.chat(official.tokenizer, marks, transform, images, case.parts[-1], length)])


def test_a_batch_of_samples_is_as_each_alone(official):
    accelerate(official.model)
    script = OfficialScript(official)
    one, two = script.context(), script.context()
    script.add_text(one, "a cat")
    script.add_text(two, "two dogs in a park")
    lengths = [*one["kv_lens"], *two["kv_lens"]]
    both = official.model.forward_cache_update_text(
        past_key_values=type(one["past_key_values"])([]),
        packed_text_ids=torch.tensor(
            [id for c in (one, two) for id in c["past_key_values"].contexts[0].history[0].ids]
        ),
        packed_text_position_ids=torch.cat([torch.arange(length) for length in lengths]),
        text_token_lens=torch.tensor(lengths),
        key_values_lens=torch.tensor([0, 0]),
    )
    ids = official.model.generate_text(
        past_key_values=both,
        packed_start_tokens=torch.tensor([official.new_token_ids["bos_token_id"]] * 2),
        packed_query_position_ids=torch.tensor(lengths),
        key_values_lens=torch.tensor(lengths),
        max_length=8,
    )
    assert ids.shape == (8, 2)
    assert [script.write(c, 8) for c in (one, two)] == [
        official.tokenizer.decode(ids[:, column]).split("<|im_end|>")[0].split("<|im_start|>")[1] for column in (0, 1)
    ]


def test_weights_are_shared_and_the_module_is_restored(official):
    model, before = official.model, {name: p.clone() for name, p in official.model.named_parameters()}
    x = torch.randn(3, official.ours.llm.hidden_size)
    mlp = model.language_model.model.layers._modules["0"].mlp
    wanted = torch.nn.functional.linear(x, mlp.gate_proj.weight)
    acceleration = accelerate(model, official.vae_model)
    weights = acceleration.entry_points.model.weights
    for name, place in weights.destinations(official.ours).items():
        parameter = model.get_parameter(name)
        assert parameter.untyped_storage().data_ptr() == place.view.untyped_storage().data_ptr(), name
        assert torch.equal(parameter, before[name])
    autoencoder = dict(acceleration.entry_points.model.vae.named_parameters())
    for name, parameter in official.vae_model.named_parameters():
        assert parameter.data_ptr() == autoencoder[name].data_ptr()
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)
    with torch.no_grad():
        assert torch.equal(torch.nn.functional.linear(x, mlp.gate_proj.weight), wanted)
    acceleration.restore()
    assert not [name for name in vars(model) if name.startswith(("forward_cache", "generate", "chat", "_bagel_rt"))]
    with pytest.raises(AssertionError, match="the official forward ran"):
        model.generate_image()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    accelerate(model).restore()


# What is refused


def test_a_module_of_another_kind_is_refused_and_left_alone(official):
    with pytest.raises(TypeError, match="is no official Bagel module: it lacks language_model"):
        accelerate(torch.nn.Linear(2, 2))
    model = official.model
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    layer = model.language_model.model.layers._modules["1"]
    kept, layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data, layer.mlp.up_proj.weight.data.half()
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight is torch.float16 .* load the module unquantised"):
        accelerate(model)
    layer.mlp.up_proj.weight = torch.nn.Parameter(kept.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="up_proj.weight is on meta, embed_tokens on cpu: load the whole module"):
        accelerate(model)
    layer.mlp.up_proj.weight = torch.nn.Parameter(kept, requires_grad=False)
    del layer.mlp._modules["down_proj"]
    with pytest.raises(ValueError, match="the module lacks language_model.model.layers.1.mlp.down_proj.weight"):
        accelerate(model)
    assert all(parameter.data_ptr() == pointers[name] for name, parameter in model.named_parameters())
    model.config.llm_config.layer_module = "Qwen2MoEDecoderLayer"
    with pytest.raises(ValueError, match="layer_module is 'Qwen2MoEDecoderLayer'"):
        accelerate(model)


def test_a_cache_that_does_not_fit_the_arguments_is_refused(official):
    accelerate(official.model)
    script = OfficialScript(official)
    context = script.context()
    script.add_text(context, "a cat")
    with pytest.raises(ValueError, match=r"key_values_lens is \[3\], but the contexts hold"):
        script.add_text({**context, "kv_lens": [3]}, "a dog")
    filled = script.context()
    filled["past_key_values"].seq_lens = 5
    with pytest.raises(TypeError, match="a NaiveCache with keys in it: begin with an empty cache"):
        script.add_text(filled, "a dog")
    settings = {"num_timesteps": 4, "cfg_text_scale": 4.0}
    noise = torch.zeros(4, official.ours.latent_features)
    with pytest.raises(ValueError, match="enable_taylorseer is True"):
        script.draw((32, 32), noise, context, context, context, enable_taylorseer=True, **settings)
    with pytest.raises(ValueError, match="the cache of its branch is None"):
        script.draw((32, 32), noise, context, {**context, "past_key_values": None}, context, **settings)


def test_arguments_of_the_inferencer_are_checked(official):
    with pytest.raises(TypeError, match="give all six arguments"):
        InterleaveInferencer(official.model, official.vae_model)
    ids = official.new_token_ids | {"eos_token_id": 3}
    with pytest.raises(ValueError, match="new_token_ids has {'eos_token_id': 3}"):
        adopt_tokenizer(official.tokenizer, ids)
    with pytest.raises(TypeError, match="a str is no Qwen2 tokenizer"):
        adopt_tokenizer("gpt2", ids)
    runtime = inferencer(official)
    for options, message in (
        ({"enable_taylorseer": True}, "enable_taylorseer is True"),
        ({"cfg_renorm_type": "local"}, "'local'"),
        ({"image_shapes": (50, 50)}, "size is"),
        ({"num_timesteps": 1}, "num_timesteps is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime(text="a cat", **{"image_shapes": (32, 32), **options})
    with pytest.raises(ValueError, match="Unsupported input type"):
        runtime.interleave_inference(["a cat", Path("cat.png")])


def test_the_slow_tokenizer_is_read_as_well(official):
    slow, ours = adopt_tokenizer(SlowTokenizer(CHECKPOINT), official.new_token_ids), Tokenizer.from_folder(CHECKPOINT)
    for text in ("a red circle", "naïve  Käfig 🦊\n<|im_end|> x", ""):
        assert slow.encode(text) == ours.encode(text)
    assert len(slow) == len(ours)


def test_it_needs_no_checkpoint_folder(official, tmp_path):
    assert isinstance(inferencer(official).bagel, Bagel)
