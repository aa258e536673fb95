"""Messages about Python arguments become messages about options."""

import logging

import pytest
import torch
from commands import run
from conftest import CHECKPOINT

from bagel_rt import Bagel
from bagel_rt.cli.parsing import name_options

FLAGS = {
    "seed": "--seed",
    "size": "--size",
    "weights": "--weights",
    "images": "--image",
    "prompt": "PROMPT",
    "graphs": "--graphs",
    "do_sample": "--do-sample",
    "top_k": "--top-k",
    "device": "--device",
    "max_think_token_n": "--max-think-token-n",
}


@pytest.mark.parametrize(
    "message, expected",
    [
        ("seed must be an integer, got -1.", "--seed must be an integer, got -1."),
        ("prompt must not be empty.", "PROMPT must not be empty."),
        ("Shorten the prompt or lower max_think_token_n.", "Shorten the prompt or lower --max-think-token-n."),
        ("images of 512x512: 3.0 GB less", "images of 512x512: 3.0 GB less"),
        ("max_think_token_n=256: 3.0 GB less", "--max-think-token-n 256: 3.0 GB less"),
        ("use do_sample=False, or do_sample=True.", "use --no-do-sample, or --do-sample."),
        ("graphs=False, slower", "--no-graphs, slower"),
        ("Use device='cpu', or install torch", "Use --device cpu, or install torch"),
        ("Give its name as `weights`.", "Give its name as --weights."),
        ("the weights and the size of a seed", "the weights and the size of a seed"),
        ("/top_k/model: no such folder", "/top_k/model: no such folder"),
        ("top_k.png: cannot be read", "top_k.png: cannot be read"),
        ("my_top_k must", "my_top_k must"),
    ],
)
def test_arguments_are_named_as_options(message, expected):
    assert name_options(message, FLAGS) == expected


def test_errors_of_the_library_name_options(monkeypatch):
    def fail(*_, **__):
        raise ValueError("top_k must be an integer. Lower max_think_token_n or use do_sample=False.")

    monkeypatch.setenv("BAGEL_RT_MODEL", str(CHECKPOINT))
    monkeypatch.setattr(Bagel, "stream", fail)
    result = run("chat", "x")
    assert result.exit_code == 2 and result.stderr == (
        "bagel-rt: error: --top-k must be an integer. Lower --max-think-token-n or use --no-do-sample.\n"
    )


def test_out_of_memory_error_keeps_its_advice(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError(
            "no memory\nto reduce it:\n- max_think_token_n=256: 1 GB less\n- graphs=False, slower"
        )

    monkeypatch.setenv("BAGEL_RT_MODEL", str(CHECKPOINT))
    monkeypatch.setattr(Bagel, "stream", fail)
    result = run("chat", "x")
    assert result.exit_code == 1 and result.stderr.endswith(
        "no memory\nto reduce it:\n- --max-think-token-n 256: 1 GB less\n- --no-graphs, slower\n"
    )


def test_warnings_are_one_line_and_name_options(monkeypatch):
    def stream(*_, **__):
        logging.getLogger("bagel_rt.test").warning("%s: to choose, give a file name as `weights`", "model")
        yield "done"

    monkeypatch.setenv("BAGEL_RT_MODEL", str(CHECKPOINT))
    monkeypatch.setattr(Bagel, "stream", stream)
    monkeypatch.setattr(logging.getLogger("bagel_rt"), "propagate", False)  # pytest's handlers are on the root
    result = run("chat", "x")
    assert (result.stdout, result.stderr) == (
        "done\n",
        "bagel-rt: warning: model: to choose, give a file name as --weights\n",
    )
