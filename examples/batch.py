"""Generate a batch with settings per prompt, show progress, and cancel a second batch halfway.

``python examples/batch.py [FOLDER]`` writes batch-1.png to batch-4.png to the folder.
"""

import sys
from pathlib import Path

from bagel_rt import Bagel, Cancelled, Progress

folder = Path(*sys.argv[1:2])
prompts = ["a red circle", "a green square", "two blue stars", "a yellow triangle on black"]


def show(progress: Progress) -> None:
    print(f"\r{progress.stage} {progress.step}/{progress.total}", end="", flush=True)


def stop_halfway(progress: Progress) -> None:
    show(progress)
    if progress.step * 2 >= progress.total:
        raise Cancelled


bagel = Bagel.from_pretrained()
results = bagel.generate(prompts, seed=[7, 8, 9, 10], cfg_text_scale=[4.0, 4.0, 2.0, 6.0], progress=show)
print()
for number, result in enumerate(results, start=1):
    result.image.save(folder / f"batch-{number}.png")

try:
    bagel.generate(prompts, progress=stop_halfway)
except Cancelled:
    print(", cancelled: the model is free for the next request")
