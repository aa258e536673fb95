"""Sources and documents use the terms of the field.

Each marker is a phrase for which the field has another.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUFFIXES = (".py", ".md", ".cu", ".h", ".cpp")
# Prompts in the language of the embedded model, which was trained on the word.
PROMPT = re.compile(r"what is in the picture|describe the picture|\"a picture( of)?\"|\"picture\"")

MARKERS = {  # phrase: what to write instead
    r"allowed are": "X must be A or B, got Y. <remedy>.",
    r"whoever|somebody": "name the caller, the client or the thread",
    r"giv(es?|en|ing) back|given up": "release, free, drop, cancel",
    r"pictures?\b": "image",
    r"that hurt": "edge case",
    r"beside whom": "correctness and speed against each peer",
    r"as (it|they) stands?\b": "unchanged",
    r"is expected to take": "needs about",
    r"(is|are) told (?!apart)|what (is|was|can be) (said|told|given|taken)": "name the thing",
    r"cannot be listened": "cannot bind",
    r"under way|at hand": "running; available",
    r"thrice": "three times",
    r"anew": "again",
    r"seldom": "rarely",
    r"\d+ x \d+ (pixels|images?)": "WIDTHxHEIGHT",
    r"[a-z]*(normal|initial|quant|token|serial|special|minim|maxim|synchron|optim|material|organ|recogn|util|random)"
    r"is(e[ds]?|ing|ation)\b|(colour|behaviour|neighbour|favour)\w*|centre\b|labelled": "American spelling",
}
EXCEPT = {"tests/conformance/bagel/README.md"}  # part of a recorded pack, with a checksum


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every tracked file, by path."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.split("\0") if name.endswith(SUFFIXES) and (ROOT / name).exists()]
    names = set(names) - EXCEPT - {Path(__file__).relative_to(ROOT).as_posix()}
    return {name: PROMPT.sub("", (ROOT / name).read_text(encoding="utf-8")) for name in names}


@pytest.mark.parametrize("marker", MARKERS)
def test_phrase_is_not_used(marker, texts):
    pattern = re.compile(rf"(?<![A-Za-z])({marker})".replace(" ", r"[\s#/*]+"), re.IGNORECASE)
    found = {name: match[0] for name, text in texts.items() if (match := pattern.search(text))}
    assert not found, f"write instead: {MARKERS[marker]}"
