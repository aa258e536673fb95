"""What is in a picture of the world, by colour segmentation and outlines: NumPy only, deterministic.

The frame gives the background. Pixels nearer to the colour of a thing than to the background form connected
components; the colour of one is the median of its inside, its shape the outline of the world that overlaps best when
given the same area and centroid (all outlines are star-shaped about their centroids, so that one is a radius for each
direction). That bears the blur and noise of a small autoencoder; a blob that is none of the shapes gets none. Patches
of the background that are too faint for a thing but plainly visible, as what remains of one removed by half, are blobs
without a colour of the world.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from bagel_rt.tiny.render import OUTLINES
from bagel_rt.tiny.scene import BACKGROUNDS, COLORS

_SIDE = 128  # pictures of other sizes are resized
_FRAME = 2  # pixels at the edge that no thing reaches
_SPECK = 40  # pixels; smaller components are noise (the smallest thing, a small star, has 375)
_COLOR_DISTANCE = 60.0  # Euclidean, in 8-bit RGB; the nearest two, pink and beige, are 87 apart
_PART = 0.25  # share of a component's inside that makes a second colour a second thing
# Least intersection over union with an outline. Blur takes the points off small stars; a circle and a square of one
# area have 0.83, and a star has at most 0.75 with any other shape.
_OVERLAP = {"circle": 0.88, "square": 0.88, "triangle": 0.82, "star": 0.8}
_RADII = {"small": (0.07, 0.115), "large": (0.135, 0.19)}  # between them a thing is neither
_FAINT = 50.0  # distance from the background's colour from which a patch of it is visible
_ANGLES = 720
_WORLD_NAMES = (*BACKGROUNDS, *COLORS)
_WORLD_COLORS = np.array([*BACKGROUNDS.values(), *COLORS.values()], dtype=np.float32)


@dataclass(frozen=True)
class SeenThing:
    """A thing found: shape, color and size are None where they are none of the world's.

    (x, y) is the centre and ``box`` the left, top, right and bottom, as fractions of the side.
    """

    shape: str | None
    color: str | None
    size: str | None
    x: float
    y: float
    box: tuple[float, float, float, float]

    def __str__(self) -> str:
        return " ".join([self.size or "odd-sized", self.color or "odd-coloured", self.shape or "blob"])


@dataclass(frozen=True)
class Seen:
    """A picture's background (None: none of the world's) and the things on it."""

    background: str | None
    things: tuple[SeenThing, ...]


@dataclass(frozen=True, eq=False)
class _Component:
    """Connected pixels: a mask as large as their bounding box, and where that box starts."""

    left: int
    top: int
    mask: np.ndarray

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom as fractions of the side."""
        rows, columns = self.mask.shape
        return self.left / _SIDE, self.top / _SIDE, (self.left + columns) / _SIDE, (self.top + rows) / _SIDE

    def window(self, picture: np.ndarray) -> np.ndarray:
        """The part of an array [128, 128, ...] in the bounding box."""
        rows, columns = self.mask.shape
        return picture[self.top : self.top + rows, self.left : self.left + columns]

    def inside(self, picture: np.ndarray) -> np.ndarray:
        """The array's values in the component but for its outer two pixels, where colours mix (if more remains)."""
        inner = _eroded(_eroded(np.pad(self.mask, 2)))
        return self.window(picture)[inner if inner.any() else self.mask]


def see(image: Image.Image) -> Seen:
    """Finds the background and all things, in a picture of any size and mode."""
    image = image.convert("RGB")
    if image.size != (_SIDE, _SIDE):
        shrinks = min(image.size) >= _SIDE
        image = image.resize((_SIDE, _SIDE), Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32)
    edges = pixels[:_FRAME], pixels[-_FRAME:], pixels[:, :_FRAME], pixels[:, -_FRAME:]
    ground = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    nearest = _nearest(pixels, np.array([ground, *COLORS.values()], dtype=np.float32))
    parts = [part for component in _components(nearest > 0) for part in _split_by_color(component, nearest)]
    things = [_look_at(part, pixels) for part in parts]
    faint = (nearest == 0) & (((pixels - ground) ** 2).sum(-1) > _FAINT**2)
    # Blurred borders of things are faint too, but too thin to outlive this.
    things += [_blob(patch, None) for patch in _components(_eroded(np.pad(faint, 1)))]
    return Seen(_name_of(ground, BACKGROUNDS), tuple(things))


def _eroded(mask: np.ndarray) -> np.ndarray:
    """The pixels whose four neighbours are in the mask too; one row and column less on each side."""
    return mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]


def _nearest(pixels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """For each pixel [rows, columns, 3] the index of the nearest of the colors [n, 3]."""
    # |p - c|^2 without |p|^2, which is the same for all colours; colours first, as argmin is fast across rows
    flat = np.ascontiguousarray(pixels.reshape(-1, 3).T)
    return ((colors * colors).sum(-1)[:, None] - 2 * (colors @ flat)).argmin(0).reshape(pixels.shape[:2])


def _name_of(color: np.ndarray, allowed: Collection[str]) -> str | None:
    """The nearest of the world's colours, if it is allowed and near enough."""
    distances = np.linalg.norm(_WORLD_COLORS - color, axis=1)
    name = _WORLD_NAMES[int(distances.argmin())]
    return name if name in allowed and distances.min() < _COLOR_DISTANCE else None


def _components(mask: np.ndarray) -> list[_Component]:
    """The 4-connected components of at least ``_SPECK`` pixels, in the order of their first rows.

    Runs of pixels are joined with the runs of the row above that they touch.
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
    found = map(_component_of, members.values())
    return [component for component in found if np.count_nonzero(component.mask) >= _SPECK]


def _component_of(runs: list[tuple[int, int, int]]) -> _Component:
    """From runs (row, first column, column after the last), the rows ascending."""
    top, bottom = runs[0][0], runs[-1][0] + 1
    left, right = min(start for _, start, _ in runs), max(end for _, _, end in runs)
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    for row, start, end in runs:
        mask[row - top, start - left : end - left] = True
    return _Component(left, top, mask)


def _split_by_color(component: _Component, nearest: np.ndarray) -> list[_Component]:
    """The component itself, or, where things of several colours touch, the components of each colour."""
    inside = component.inside(nearest)
    colors = np.flatnonzero(np.bincount(inside) >= _PART * len(inside))
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
def _profiles() -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """For each shape: its radius about the centroid for each direction, the centroid, and the area, at radius 1."""
    profiles = {}
    angles = (np.arange(_ANGLES) + 0.5) * (2 * np.pi / _ANGLES) - np.pi
    rays = np.stack([np.cos(angles), np.sin(angles)], -1)[:, None]  # [angles, 1, 2]
    for shape, outline in OUTLINES.items():
        corners = np.array(outline)
        centroid, area = _centroid(corners)
        start = corners - centroid
        side = np.roll(start, -1, axis=0) - start
        # ray * r = start + side * t; Cramer's rule for r and t of every ray with every side
        determinant = rays[..., 0] * side[:, 1] - rays[..., 1] * side[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            r = (start[:, 0] * side[:, 1] - start[:, 1] * side[:, 0]) / determinant
            t = (start[:, 0] * rays[..., 1] - start[:, 1] * rays[..., 0]) / determinant
        hit = (r > 0) & (t >= -1e-9) & (t <= 1 + 1e-9)
        profiles[shape] = (np.where(hit, r, 0).max(1), centroid, area)
    return profiles


def _best_overlap(mask: np.ndarray, area: int, x: float, y: float) -> tuple[float, str]:
    """The outline that overlaps best with a component of this area and centroid, and its intersection over union."""
    margin = max(mask.shape) // 4  # an outline may reach out of the component's box
    mask = np.pad(mask, margin)
    across, down = np.arange(mask.shape[1]) + 0.5 - margin - x, np.arange(mask.shape[0]) + 0.5 - margin - y
    distance = np.hypot(across, down[:, None])
    direction = (np.arctan2(down[:, None], across) + np.pi) * (_ANGLES / (2 * np.pi))
    direction = np.minimum(direction.astype(np.int32), _ANGLES - 1)
    overlaps = []
    for shape, (profile, _, unit_area) in _profiles().items():
        template = distance <= profile[direction] * np.sqrt(area / unit_area)
        common = np.count_nonzero(template & mask)
        overlaps.append((common / (area + np.count_nonzero(template) - common), shape))
    return max(overlaps)


def _blob(component: _Component, color: str | None) -> SeenThing:
    """A thing of no shape of the world."""
    left, top, right, bottom = component.box
    return SeenThing(None, color, None, (left + right) / 2, (top + bottom) / 2, component.box)


def _look_at(component: _Component, pixels: np.ndarray) -> SeenThing:
    """Colour, shape, size and place of a component."""
    color = _name_of(np.median(component.inside(pixels), axis=0), COLORS)
    rows, columns = np.nonzero(component.mask)
    area, x, y = len(rows), columns.mean() + 0.5, rows.mean() + 0.5
    overlap, shape = _best_overlap(component.mask, area, x, y)
    if overlap < _OVERLAP[shape]:
        return _blob(component, color)
    _, centroid, unit_area = _profiles()[shape]
    radius = float(np.sqrt(area / unit_area)) / _SIDE
    size = next((name for name, (least, most) in _RADII.items() if least <= radius <= most), None)
    x, y = (component.left + x) / _SIDE - centroid[0] * radius, (component.top + y) / _SIDE - centroid[1] * radius
    return SeenThing(shape, color, size, float(x), float(y), component.box)
