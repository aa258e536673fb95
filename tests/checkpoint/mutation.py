"""Damage the files of a model folder at random, as downloads, disks, converters and attackers do, and load them.

    python tests/checkpoint/mutation.py FOLDER FIRST_SEED LAST_SEED

prints a JSON object for each seed. The process may use 500 MB more than one load of the undamaged folder.
"""

import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bagel_rt import Bagel, CheckpointError

_MEMORY = 500 << 20

VALUES: list[Any] = [
    None, True, -1, 0, 1, 3.5, 1e300, 2**31, 2**70, "", "x" * 2000, "\ud800", "é", [], {}, [[]], [1, 2, 3], {"a": 1},
    "bfloat16", "I64", [0, 1 << 62], [1 << 40, 1 << 40],
]  # fmt: skip

CONTENTS = [b"", b"{}", b"[]", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 99]


def mutate(source: Path, folder: Path, seed: int) -> str:
    """Copy ``source`` to ``folder`` and damage one file. Returns what was done."""
    rng = random.Random(seed)
    shutil.copytree(source, folder)
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    kind = rng.choice(["values", "values", "values", "cut", "bytes", "replace"])
    if kind == "values" and path.suffix in (".json", ".safetensors"):
        _mutate_values(path, rng)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    elif kind == "replace":
        path.write_bytes(rng.choice(CONTENTS))
    else:
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(min(len(data), rng.choice([16, 1000, len(data)])))] = rng.randrange(256)
        path.write_bytes(data)
    return f"{path.name}: {kind}"


def _mutate_values(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    if path.suffix == ".json":
        path.write_text(json.dumps(_mutated(json.loads(data), rng)), "utf-8")
        return
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(_mutated(json.loads(data[8 : 8 + length]), rng)).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def _mutated(values: Any, rng: random.Random) -> Any:
    for _ in range(rng.randint(1, 3)):
        place = values
        while True:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.8:
                place = place[key]
                continue
            break
        if rng.random() < 0.3:
            del place[key]
        else:
            place[key] = rng.choice(VALUES)
        if not values:
            break
    return values


def load(folder: Path) -> tuple[str, str]:
    """(what happened, message): "loaded", "refused", or the name of an exception that should not occur."""
    try:
        Bagel.from_pretrained(folder, device="cpu")
    except (CheckpointError, FileNotFoundError) as error:
        return "refused", str(error)
    except Exception as error:
        return type(error).__name__, str(error)
    return "loaded", ""


def main() -> None:
    """Load every mutation."""
    source, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    assert load(source)[0] == "loaded"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for seed in range(first, last + 1):
        with tempfile.TemporaryDirectory() as parent:
            what, begun = mutate(source, Path(parent) / "model", seed), time.process_time()
            outcome, message = load(Path(parent) / "model")
        seconds = time.process_time() - begun
        print(json.dumps({"what": what, "outcome": outcome, "message": message, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
