"""Detects the things in an image of the world, by color segmentation and shape matching. NumPy only, deterministic.

The image border gives the background color. Pixels that are nearer to the color of a thing than to the background
form connected components. The color of a component is the median of its interior. Its shape is the outline with the
highest overlap (IoU) at the same area and centroid; an outline is stored as a radius per direction, since all are
star-shaped about their centroids. This tolerates the blur and noise of a small autoencoder. A component that matches no
outline is a blob without a shape. Visible patches that are too faint for a thing, such as the remains of an incomplete
removal, are blobs without a color.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from bagel_rt.tiny.render import OUTLINES
from bagel_rt.tiny.scene import BACKGROUNDS, COLORS

_SIDE = 128  # images of other sizes are resized
_BORDER = 2  # pixels at the image edge that no thing reaches
_MIN_PIXELS = 40  # smaller components are noise (the smallest thing, a small star, has 375 pixels)
_COLOR_DISTANCE = 60.0  # maximum Euclidean distance in 8-bit RGB; the nearest two colors, pink and beige, are 87 apart
_MIN_COLOR_FRACTION = 0.25  # a second color with at least this share of a component's interior is a second thing
# Minimum IoU with an outline. Blur removes the tips of small stars. For comparison: a circle and a square of the same
# area have an IoU of 0.83, a star and any other shape at most 0.75.
_MIN_IOU = {"circle": 0.88, "square": 0.88, "triangle": 0.82, "star": 0.8}
_RADII = {"small": (0.07, 0.115), "large": (0.135, 0.19)}  # a radius outside both has no size
_FAINT_DISTANCE = 50.0  # minimum distance from the background color of a visible patch
_NUM_ANGLES = 720
_WORLD_NAMES = (*BACKGROUNDS, *COLORS)
_WORLD_COLORS = np.array([*BACKGROUNDS.values(), *COLORS.values()], dtype=np.float32)


@dataclass(frozen=True)
class DetectedThing:
    """A detected thing. Shape, color or size is None if it matches nothing in the world.

    (x, y) is the center and ``box`` the left, top, right and bottom, as fractions of the image side.
    """

    shape: str | None
    color: str | None
    size: str | None
    x: float
    y: float
    box: tuple[float, float, float, float]

    def __str__(self) -> str:
        return " ".join([self.size or "odd-sized", self.color or "odd-colored", self.shape or "blob"])


@dataclass(frozen=True)
class DetectedScene:
    """The background of an image (None if it matches nothing in the world) and the things on it."""

    background: str | None
    things: tuple[DetectedThing, ...]


@dataclass(frozen=True, eq=False)
class _Component:
    """A connected component: the mask of its bounding box, and the position of the box."""

    left: int
    top: int
    mask: np.ndarray

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom as fractions of the image side."""
        rows, columns = self.mask.shape
        return self.left / _SIDE, self.top / _SIDE, (self.left + columns) / _SIDE, (self.top + rows) / _SIDE

    def window(self, image: np.ndarray) -> np.ndarray:
        """Crop an array [128, 128, ...] to the bounding box."""
        rows, columns = self.mask.shape
        return image[self.top : self.top + rows, self.left : self.left + columns]

    def inside(self, image: np.ndarray) -> np.ndarray:
        """The values of an array in the component, without a margin of two pixels, where colors mix.

        A component that is too small for the margin is used in full.
        """
        inner = _erode(_erode(np.pad(self.mask, 2)))
        return self.window(image)[inner if inner.any() else self.mask]


def detect(image: Image.Image) -> DetectedScene:
    """Detect the background and all things in an image of any size and mode."""
    image = image.convert("RGB")
    if image.size != (_SIDE, _SIDE):
        shrinks = min(image.size) >= _SIDE
        image = image.resize((_SIDE, _SIDE), Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32)
    edges = pixels[:_BORDER], pixels[-_BORDER:], pixels[:, :_BORDER], pixels[:, -_BORDER:]
    ground = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    nearest = _nearest_color(pixels, np.array([ground, *COLORS.values()], dtype=np.float32))
    parts = [part for component in _components(nearest > 0) for part in _split_by_color(component, nearest)]
    things = [_classify(part, pixels) for part in parts]
    faint = (nearest == 0) & (((pixels - ground) ** 2).sum(-1) > _FAINT_DISTANCE**2)
    # The erosion removes the blurred borders of things, which are faint too, but thin.
    things += [_blob(patch, None) for patch in _components(_erode(np.pad(faint, 1)))]
    return DetectedScene(_color_name(ground, BACKGROUNDS), tuple(things))


def _erode(mask: np.ndarray) -> np.ndarray:
    """Erode a mask by one pixel (4-neighborhood); the result is one row and column smaller on each side."""
    return mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]


def _nearest_color(pixels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """The index of the nearest of the colors [n, 3] for each pixel [rows, columns, 3]."""
    # |p - c|^2 without |p|^2, which is the same for all colors. Colors are the first axis: argmin over it is faster.
    flat = np.ascontiguousarray(pixels.reshape(-1, 3).T)
    return ((colors * colors).sum(-1)[:, None] - 2 * (colors @ flat)).argmin(0).reshape(pixels.shape[:2])


def _color_name(color: np.ndarray, allowed: Collection[str]) -> str | None:
    """The name of the nearest color of the world; None if it is not allowed or too far away."""
    distances = np.linalg.norm(_WORLD_COLORS - color, axis=1)
    name = _WORLD_NAMES[int(distances.argmin())]
    return name if name in allowed and distances.min() < _COLOR_DISTANCE else None


def _components(mask: np.ndarray) -> list[_Component]:
    """The 4-connected components with at least ``_MIN_PIXELS`` pixels, in the order of their first rows.

    Union-find over the horizontal runs of pixels: a run joins the runs that it touches in the row above.
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    runs = list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    above = 0
    for index, (row, start, end) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] <= start):
            above += 1
        other = above
        while runs[other][0] == row - 1 and runs[other][1] < end:
            low, high = sorted((root(other), root(index)))
            parent[high] = low
            other += 1
    members: dict[int, list[tuple[int, int, int]]] = {}
    for index, run in enumerate(runs):
        members.setdefault(root(index), []).append(run)
    components = map(_component_from_runs, members.values())
    return [component for component in components if np.count_nonzero(component.mask) >= _MIN_PIXELS]


def _component_from_runs(runs: list[tuple[int, int, int]]) -> _Component:
    """Build a component from runs (row, first column, column after the last), in ascending rows."""
    top, bottom = runs[0][0], runs[-1][0] + 1
    left, right = min(start for _, start, _ in runs), max(end for _, _, end in runs)
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    for row, start, end in runs:
        mask[row - top, start - left : end - left] = True
    return _Component(left, top, mask)


def _split_by_color(component: _Component, nearest: np.ndarray) -> list[_Component]:
    """Split a component in which things of several colors touch into the components of each color."""
    inside = component.inside(nearest)
    colors = np.flatnonzero(np.bincount(inside) >= _MIN_COLOR_FRACTION * len(inside))
    if len(colors) < 2:
        return [component]
    window = component.window(nearest)
    parts = [part for color in colors for part in _components(component.mask & (window == color))]
    return [_Component(part.left + component.left, part.top + component.top, part.mask) for part in parts]


def _centroid(corners: np.ndarray) -> tuple[np.ndarray, float]:
    """Centroid (x, y) and area of a polygon, by the shoelace formula."""
    following = np.roll(corners, -1, axis=0)
    cross = corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]
    area = cross.sum() / 2
    return ((corners + following) * cross[:, None]).sum(0) / (6 * area), abs(float(area))


@cache
def _radial_profiles() -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Shape -> (radius about the centroid per direction, centroid, area), for an outline of radius 1."""
    profiles = {}
    angles = (np.arange(_NUM_ANGLES) + 0.5) * (2 * np.pi / _NUM_ANGLES) - np.pi
    rays = np.stack([np.cos(angles), np.sin(angles)], -1)[:, None]  # [angles, 1, 2]
    for shape, outline in OUTLINES.items():
        corners = np.array(outline)
        centroid, area = _centroid(corners)
        start = corners - centroid
        side = np.roll(start, -1, axis=0) - start
        # Intersect every ray with every side: solve ray * r = start + side * t for r and t by Cramer's rule.
        determinant = rays[..., 0] * side[:, 1] - rays[..., 1] * side[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            r = (start[:, 0] * side[:, 1] - start[:, 1] * side[:, 0]) / determinant
            t = (start[:, 0] * rays[..., 1] - start[:, 1] * rays[..., 0]) / determinant
        hit = (r > 0) & (t >= -1e-9) & (t <= 1 + 1e-9)
        profiles[shape] = (np.where(hit, r, 0).max(1), centroid, area)
    return profiles


def _best_shape(mask: np.ndarray, area: int, x: float, y: float) -> tuple[float, str]:
    """(IoU, shape) of the outline with the highest overlap, at the area and centroid of the component."""
    margin = max(mask.shape) // 4  # outlines may extend beyond the bounding box
    mask = np.pad(mask, margin)
    across, down = np.arange(mask.shape[1]) + 0.5 - margin - x, np.arange(mask.shape[0]) + 0.5 - margin - y
    distance = np.hypot(across, down[:, None])
    direction = (np.arctan2(down[:, None], across) + np.pi) * (_NUM_ANGLES / (2 * np.pi))
    direction = np.minimum(direction.astype(np.int32), _NUM_ANGLES - 1)
    overlaps = []
    for shape, (profile, _, unit_area) in _radial_profiles().items():
        template = distance <= profile[direction] * np.sqrt(area / unit_area)
        common = np.count_nonzero(template & mask)
        overlaps.append((common / (area + np.count_nonzero(template) - common), shape))
    return max(overlaps)


def _blob(component: _Component, color: str | None) -> DetectedThing:
    """A thing without a shape or size."""
    left, top, right, bottom = component.box
    return DetectedThing(None, color, None, (left + right) / 2, (top + bottom) / 2, component.box)


def _classify(component: _Component, pixels: np.ndarray) -> DetectedThing:
    """Determine color, shape, size and position of a component."""
    color = _color_name(np.median(component.inside(pixels), axis=0), COLORS)
    rows, columns = np.nonzero(component.mask)
    area, x, y = len(rows), columns.mean() + 0.5, rows.mean() + 0.5
    overlap, shape = _best_shape(component.mask, area, x, y)
    if overlap < _MIN_IOU[shape]:
        return _blob(component, color)
    _, centroid, unit_area = _radial_profiles()[shape]
    radius = float(np.sqrt(area / unit_area)) / _SIDE
    size = next((name for name, (least, most) in _RADII.items() if least <= radius <= most), None)
    x, y = (component.left + x) / _SIDE - centroid[0] * radius, (component.top + y) / _SIDE - centroid[1] * radius
    return DetectedThing(shape, color, size, float(x), float(y), component.box)
