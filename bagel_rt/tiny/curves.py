"""Loss curves as a PNG. Needs matplotlib, from the extra ``[docs]``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    raise ModuleNotFoundError("loss curves need matplotlib: pip install 'bagel_rt[docs]'") from None

_POINTS = 200  # maximum per curve; each point is the mean of neighboring steps


def draw_curves(path: Path | str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Write a PNG with one panel per curve, in two columns, with a logarithmic y axis.

    Args:
        path: the output file.
        curves: title -> [(step, positive value), ...] in the order of steps; empty curves are skipped.
    """
    nonempty = {title: np.array(points) for title, points in curves.items() if len(points)}
    rows = max(1, -(-len(nonempty) // 2))
    figure = Figure(figsize=(10.4, 2.6 * rows), layout="constrained")
    for number, (title, points) in enumerate(nonempty.items(), start=1):
        means = [part.mean(0) for part in np.array_split(points, min(len(points), _POINTS))]
        axes = figure.add_subplot(rows, 2, number, title=title, yscale="log")
        axes.plot(*np.transpose(means), ".-", markersize=2)  # markers show a curve of a single point
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png")
