"""A model of another kind runs through the same contexts, decoding, denoising and graphs as BAGEL.

It is compared with the whole sequence recomputed at every step under a dense causal mask.
"""

import pytest
import torch
from causal_model import CausalImage, CausalModel, Flow, Tokens
from recording import Recording, dispatch_ops

from bagel_rt.runtime.context import Context, Prefill
from bagel_rt.runtime.decode import Sampling, generate_tokens
from bagel_rt.runtime.denoise import Denoiser, DenoisingTask
from bagel_rt.runtime.graphs import GraphCache

PROMPTS = [(3, 1, 4, 1, 5), (9, 2)]


@pytest.fixture(params=[False, True], ids=["eager", "captured"])
def graphs(request, monkeypatch):
    dispatch_ops(monkeypatch)
    return GraphCache(Recording if request.param else None)


def open_cache(model, graphs):
    cache = model.make_cache()
    cache.moved.append(graphs.invalidate)  # as the engine does
    return cache


def contexts_of(model, cache, capacity):
    contexts, prefill = [Context(cache, capacity) for _ in PROMPTS], Prefill(model, cache)
    for context, ids in zip(contexts, PROMPTS, strict=True):
        prefill.append(context, Tokens(ids))
    prefill.run()
    return contexts


@torch.inference_mode()
def test_draws_ids_from_two_guided_rows_and_keeps_them(graphs):
    model = CausalModel()
    cache = open_cache(model, graphs)
    noise = torch.empty(7, 1, 40).exponential_(generator=torch.Generator().manual_seed(1))
    expected, rows = [], [model.embed_tokens(torch.tensor([*ids, 7 + row])) for row, ids in enumerate(PROMPTS)]
    for q in noise:
        logits = torch.stack([model.logits(model.dense(x)[-1:])[0] for x in rows])
        expected.append(int((model.guide(logits[None]).softmax(-1) / q).argmax()))
        rows = [torch.cat([x, model.ids[expected[-1] :][:1]]) for x in rows]
    for _ in range(2):  # the second run is replayed where steps are captured
        contexts = contexts_of(model, cache, 32)
        drawn = generate_tokens(
            model, model.image, contexts, [7, 8], None, 7, [Sampling(1.0)], graphs, noise, keep=True
        )
        assert [token for _, token in drawn] == expected
        assert [context.length for context in contexts] == [12, 9]


@torch.inference_mode()
@pytest.mark.parametrize("capacity", [32, 0], ids=["behind the context", "apart from it"])
def test_denoises_a_causal_block_with_a_time_token(graphs, capacity):
    model = CausalModel()
    cache, flow = open_cache(model, graphs), Flow(model)
    noise = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    expected, prompts = noise.clone(), [model.embed_tokens(torch.tensor(ids)) for ids in PROMPTS]
    for step in range(4):
        rows, skip = flow.encode(expected, torch.tensor([step]))
        hidden = torch.cat([model.dense(torch.cat([prompt, rows]))[-6:] for prompt in prompts])
        outputs = model.norm(hidden).unflatten(0, (2, -1))[:, 1:] @ model.patch_out.T + skip
        flow.update(expected, outputs, None, None, True)
    for _ in range(2):
        task = DenoisingTask(CausalImage(5), noise, tuple(contexts_of(model, cache, capacity)))
        denoiser = Denoiser(model, cache, [task], flow, graphs)
        for step in range(len(denoiser)):
            denoiser.step(step)
        torch.testing.assert_close(denoiser.state, expected, rtol=1e-4, atol=1e-5)
        denoiser.close()
