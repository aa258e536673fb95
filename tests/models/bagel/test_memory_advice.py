"""The memory report of a request: parts, advice, errors, and the command ``bagel-rt memory``."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from commands import good, run
from conftest import CHECKPOINT

from bagel_rt.models.bagel.config import BAGEL_7B_MOT
from bagel_rt.models.bagel.memory import RUNTIME, expected_memory, explain
from bagel_rt.models.bagel.settings import TASKS


def test_published_model_generates_an_image_within_36_gb():
    estimate = expected_memory(BAGEL_7B_MOT)
    assert estimate.workload.drawn == (1024, 1024) and estimate.workload.branches == 2
    assert 29e9 < estimate.weights < estimate.total <= 36e9
    assert estimate.fits(estimate.total) and not estimate.fits(estimate.total - 1)


LARGER = {
    "float32": {"dtype": torch.float32},
    "batch": {"batch": 2},
    "thinking": {"max_think_token_n": 1024},
    "edit": {"task": "edit"},
    "edit of two images": {"task": "edit", "images": [(1024, 1024)] * 2},
    "graphs": {"graphs": True},
}


@pytest.mark.parametrize("larger", LARGER.values(), ids=LARGER)
def test_estimate_grows_with_the_request(larger):
    request = {"graphs": False, "size": (768, 768)}
    assert expected_memory(BAGEL_7B_MOT, **request | larger).total > expected_memory(BAGEL_7B_MOT, **request).total


def test_advice_states_the_savings_in_descending_order():
    request = {"dtype": torch.float32, "task": "edit", "images": [(1024, 1024)] * 2, "max_think_token_n": 2048}
    estimate, available = expected_memory(BAGEL_7B_MOT, batch=3, **request), int(45e9)
    advice = estimate.advice(available)
    saved = [float(re.search(r": (-?[\d.]+) GB less, ([\d.]+) GB in total", line)[1]) for line in advice]
    assert saved[:-1] == sorted(saved[:-1], reverse=True) and saved[-1] == max(saved)
    for advised, change in {
        "bfloat16 weights": {"dtype": torch.bfloat16},
        "one request at a time": {"batch": 1},
        "only the last input image": {"images": [(1024, 1024)]},
        "images of 512x512": {"images": [(512, 512)] * 2},
        "max_think_token_n=256": {"max_think_token_n": 256},
        "all of these": {
            "dtype": torch.bfloat16,
            "batch": 1,
            "images": [(512, 512)],
            "max_think_token_n": 256,
            "graphs": False,
            "settings": replace(TASKS["edit"].image, cfg_img_scale=1.0),
        },
    }.items():
        [line] = [line for line in advice if line.startswith(advised)]
        changed = expected_memory(BAGEL_7B_MOT, **{"batch": 3} | request | change)
        verdict = "fits" if changed.total <= available else "still too much"
        assert (
            f"{(estimate.total - changed.total) / 1e9:.1f} GB less, {changed.total / 1e9:.1f} GB in total, {verdict}"
            in line
        )
    assert advice[-1].endswith("fits")


def test_advice_says_that_the_weights_alone_do_not_fit():
    [advice] = expected_memory(BAGEL_7B_MOT, dtype=torch.float32).advice(int(24e9))
    assert re.fullmatch(r"no request fits: the weights alone need 29\.6 GB\. Use a GPU with at least 3\d GB\.", advice)
    text = explain(BAGEL_7B_MOT, torch.bfloat16, available=int(24e9))
    assert "no request fits: " in text and "to reduce it" not in text and " less, " not in text
    assert not any("24" in line or ", fits" in line for line in expected_memory(BAGEL_7B_MOT).advice())


def test_advice_lists_no_savings_that_are_not_enough():
    least = expected_memory(BAGEL_7B_MOT, size=(512, 512), batch=1, graphs=False).total  # what all changes lead to
    estimate = expected_memory(BAGEL_7B_MOT, batch=16)
    [advice] = estimate.advice(least - 1)
    assert advice.startswith(f"a smaller request would still need {least / 1e9:.1f} GB. Use a GPU with at least ")
    assert len(estimate.advice(least)) > 1


def test_explanation_lists_parts_and_remedies():
    text = explain(BAGEL_7B_MOT, torch.bfloat16, task="edit", available=int(32e9))
    estimate = expected_memory(BAGEL_7B_MOT, task="edit")
    assert f"about {estimate.total / 1e9:.1f} GB in total; the device has 32.0 GB" in text
    assert re.search(r"\nweights +29\.55 GB\n", text) and "\n- images of 512x512" in text
    assert "free memory used by other programs" not in text
    assert "free memory used by other programs" in explain(BAGEL_7B_MOT, torch.bfloat16, available=int(80e9))


def test_parts_sum_to_the_total():
    estimate = expected_memory(BAGEL_7B_MOT, task="edit", batch=2)
    parts = (estimate.weights, estimate.kv_cache, estimate.buffers, estimate.graphs, estimate.phases[estimate.phase])
    assert estimate.total == sum(parts) + RUNTIME
    lines = [float(line.split()[-2]) for line in str(estimate).splitlines()]
    assert sum(lines[:-1]) == pytest.approx(lines[-1], abs=0.05)


@pytest.mark.parametrize(
    "workload, graphs, phase",
    [
        ({"graphs": False}, None, "decoding images"),
        ({}, "denoising", "decoding images"),  # while the first image is decoded, before its decoding is captured
        ({"task": "edit"}, "decoding images", "encoding images"),  # from the second request on
        ({"task": "chat"}, "decoding text", "prefill"),
        ({"batch": 64}, None, "growing the KV cache"),  # before anything is captured
    ],
    ids=["no graphs", "image", "edit", "question", "many images"],
)
def test_graph_memory_counts_during_other_phases(workload, graphs, phase):
    estimate = expected_memory(BAGEL_7B_MOT, **workload)
    assert estimate.phase == phase and estimate.graphs == (estimate.phases[graphs] if graphs else 0)


@pytest.mark.parametrize(
    "workload, message",
    [
        ({"task": "draw"}, "task must be generate, edit or chat, got 'draw'"),
        ({"dtype": torch.float64}, "dtype must be .* got torch.float64"),
        ({"size": (1000, 1024)}, "multiples of 16 from 16 to 1024, got 1024x1000"),
        ({"size": (2048, 1024)}, "from 16 to 1024"),
        ({"images": [(64, 64)]}, "none to generate, got 1"),
        ({"task": "edit", "images": []}, "at least one entry for an edit"),
        ({"task": "edit", "images": [(64, 0)]}, "of at least 1, got"),
        ({"batch": 0}, "batch must be an integer from 1 to 64, got 0"),
        ({"text_tokens": 0}, "text_tokens must be .* got 0"),
        ({"max_think_token_n": 40000}, "max_think_token_n must be .* got 40000"),
    ],
)
def test_rejects_invalid_requests(workload, message):
    with pytest.raises(ValueError, match=message):
        expected_memory(BAGEL_7B_MOT, **workload)


# The command


def test_command_reports_whether_the_request_fits():
    output = good("memory", "--available", 80)
    estimate = expected_memory(BAGEL_7B_MOT)
    assert f"total {estimate.total / 1e9:38.2f} GB\nfits in 80.0 GB" in output
    result = run("memory", "--available", 32, "--batch", 4)
    assert result.exit_code == 1
    output = result.stdout
    assert "\ndoes not fit in 32.0 GB\nto reduce it:\n" in output and "\n- one request at a time: " in output
    assert "\n- --no-graphs, slower: " in output and "\n- --cfg-img-scale" not in output


def test_command_names_the_request():
    assert good("memory").startswith("BAGEL-7B-MoT: generate, 1024x1024, bfloat16\n")
    output = good("memory", "--task", "edit", "--image", "640x480", "--image", "1024x768", "--dtype", "float32")
    assert output.startswith("BAGEL-7B-MoT: edit, 1024x768, from 640x480 and 1024x768, float32\n")
    output = good("memory", "--task", "chat", "--batch", 2, "--max-think-token-n", 100)
    assert output.startswith("BAGEL-7B-MoT: chat, batch of 2, up to 100 generated tokens, bfloat16\n")


@pytest.mark.parametrize("short, dtype", [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_command_accepts_short_names_of_dtypes(short, dtype):
    assert good("memory", "--dtype", short).startswith(f"BAGEL-7B-MoT: generate, 1024x1024, {dtype}\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_command_fails_if_the_request_does_not_fit(as_json):
    result = run("memory", "--available", 24, "--dtype", "float32", *["--json"] * as_json)
    assert (result.exit_code, result.stderr) == (1, "")
    assert "no request fits: the weights alone need 29.6 GB. Use a GPU with at least" in result.stdout
    assert " less, " not in result.stdout
    result = run("memory", "--available", 32, "--task", "edit", "--max-think-token-n", 2000, *["--json"] * as_json)
    assert result.exit_code == 1
    assert "--max-think-token-n 256: " in result.stdout and "--no-graphs, slower: " in result.stdout
    assert "=" not in result.stdout and "_n " not in result.stdout


def test_command_prints_json():
    arguments = ("--task", "edit", "--image", "640x480", "--image", "1024x768", "--cfg-img-scale", 1, "--no-graphs")
    report = json.loads(run("memory", *arguments, "--json", "--available", 20).stdout)
    settings = replace(TASKS["edit"].image, cfg_img_scale=1.0)
    estimate = expected_memory(
        BAGEL_7B_MOT, task="edit", images=[(480, 640), (768, 1024)], settings=settings, graphs=False
    )
    assert report == {"model": "BAGEL-7B-MoT"} | json.loads(json.dumps(estimate.as_dict(int(20e9))))
    assert report["total"] == estimate.total and report["fits"] is False and report["graphs"] == 0


def test_command_reads_a_folder_without_weights(tmp_path, bagel):
    for file in CHECKPOINT.glob("*.json"):
        shutil.copy(file, tmp_path)
    report = json.loads(good("memory", "--model", tmp_path, "--dtype", "float32", "--size", "96x64", "--json"))
    estimate = expected_memory(bagel.model.config, dtype=torch.float32, size=(64, 96))
    assert report["total"] == estimate.total and report["model"] == tmp_path.name
    assert ("fits" in report) == torch.cuda.is_available()


@pytest.mark.parametrize(
    "arguments, message",
    [(("--size", "1024"), "1024x768"), (("--batch", 65), "from 1 to 64"), (("--image", "9x9"), "Use --task edit.")],
)
def test_command_rejects_invalid_options(arguments, message):
    result = run("memory", *arguments)
    assert result.exit_code == 2 and message in result.stderr
