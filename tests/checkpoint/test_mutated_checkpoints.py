"""A damaged model folder is refused with a short message, or loads."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import CHECKPOINT

pytest.importorskip("resource", reason="this platform cannot limit the memory of a process")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 400, 100))
def test_damaged_folders_give_a_clear_error_within_time_and_memory(first):
    script = Path(__file__).with_name("mutation.py")
    command = [sys.executable, str(script), str(CHECKPOINT), str(first), str(first + 99)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 100, done.stderr[-2000:]
    wrong = [case for case in cases if case["outcome"] not in ("loaded", "refused") or case["seconds"] > 5]
    wrong += [case for case in cases if len(case["message"].splitlines()) > 21 or len(case["message"]) > 5000]
    assert wrong == []
    assert min(Counter(case["outcome"] for case in cases).values()) > 10
