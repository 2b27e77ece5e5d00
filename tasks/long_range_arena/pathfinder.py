"""Pathfinder: two circles among dashed curves; are they the two ends of one curve?

The procedure of Linsley et al. 2018 (arXiv:1805.08315) and Kim et al. 2020, with the settings of the Long Range Arena's hard
sets. Two long curves of dashes grow from seeds near each other, dash by dash: the next one is drawn with the squared cosine of
how far it turns (times `continuity`), and may not touch what is there. Short distractors fill the rest. A circle marks the
beginning of one curve; the other circle marks its end, or the end of the other curve.

Dashes and circles are drawn by averaging 4 x 4 points in each pixel, where the published images were drawn at twice the size
and filtered; so the pixels are not those of the published files.
"""

import dataclasses
import functools
import math

import numpy as np

Place = tuple[int, int]

# How often a dash, and a distractor, is tried again before it is given up.
_DASH_RETRIALS, _DISTRACTOR_RETRIALS = 2, 4
# Distractors end when less than this part of the image is free.
_LEAST_FREE = 0.01
_POINTS = 4
_TAKEN, _CROSSING = 0.3, 1.8


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of an image, in pixels.

    Attributes:
      size: of the square.
      seed_distance: between the beginnings of the two curves.
      marker_radius: of the circles.
      dash_length, dash_thickness: of a dash.
      margins: between dashes; one is drawn for each image.
      continuity: how much turning is penalised.
      curve_dashes, distractor_dashes, distractors: dashes of the two curves and of a distractor, and how many distractors.
      curve_contrast, distractor_contrast: brightness before the image is scaled to its brightest pixel.
      padding: frame that stays empty.
    """

    size: int
    seed_distance: int
    marker_radius: float
    dash_length: int
    dash_thickness: float
    margins: tuple[int, ...]
    continuity: float
    distractors: int
    curve_contrast: float
    distractor_contrast: float
    curve_dashes: int = 14
    distractor_dashes: int = 4
    padding: int = 1


PATHFINDER = Settings(32, 7, 1.5, 2, 0.5, (1,), 1.0, 5, curve_contrast=1.5, distractor_contrast=2.0)
PATHX = Settings(128, 20, 3.0, 5, 1.5, (2, 3), 1.8, 8, curve_contrast=0.9, distractor_contrast=0.9)
NUM_CLASSES = 2


def image(random: np.random.Generator, settings: Settings) -> tuple[np.ndarray, int]:
    """A random image.

    Returns:
      (pixels uint8 [size, size], label): 1 if the circles mark one curve.
    """
    margin = int(random.choice(settings.margins))
    while (drawing := _two_curves(random, settings, margin)) is None:
        pass
    canvas, beginnings, ends = drawing
    for _ in range(settings.distractors):
        for _ in range(_DISTRACTOR_RETRIALS + 1):
            if (with_distractor := _distractor(random, settings, margin, canvas)) is not None:
                canvas = with_distractor
                break
    label, first = (int(i) for i in random.integers(0, 2, 2))
    last = first if label else 1 - first
    circle = _circle(settings.marker_radius)
    for centre in (beginnings[first], ends[last]):
        _stamp(canvas.ink, circle, centre)
    ink = canvas.ink
    return np.floor(255 * ink / ink.max() + 0.5).astype(np.uint8), label


@dataclasses.dataclass
class _Canvas:
    """What is drawn (`ink`), and where nothing more may be (`taken`); both float [size, size]."""

    ink: np.ndarray
    taken: np.ndarray

    def copy(self) -> "_Canvas":
        return _Canvas(self.ink.copy(), self.taken.copy())


@dataclasses.dataclass
class _Curve:
    """The growing end of a curve.

    Attributes:
      pivot: where its last dash began, less the margin.
      angle: the last dash's direction.
      start, room: the last dash's own place and room, which the next dash may touch and later ones may not.
    """

    pivot: Place
    angle: float
    start: Place
    room: np.ndarray


def _two_curves(random, settings: Settings, margin: int):
    """(canvas, beginnings, ends) of the two curves, or None where they cannot grow to their length."""
    size, distance = settings.size, settings.seed_distance
    canvas = _Canvas(np.zeros((size, size)), np.ones((size, size)))
    inner = slice(settings.padding, size - settings.padding)
    canvas.taken[inner, inner] = 0
    angles = _angle(random), _angle(random)
    # The first seed lies so far inside that the second has room on every side.
    taken = np.ones((size, size), bool)
    taken[2 * distance : size - 2 * distance, 2 * distance : size - 2 * distance] = False
    first = _free_place(random, settings, margin, taken, angles[0])
    if first is None:
        return None
    towards = random.integers(0, 360) * math.pi / 180
    second = (round(first[0] + distance * math.sin(towards)), round(first[1] + distance * math.cos(towards)))
    curves = []
    for beginning, angle in zip((first, second), angles, strict=True):
        curve = _begin(settings, margin, canvas, beginning, angle, settings.curve_contrast)
        if curve is None:
            return None
        curves.append(curve)
    ends = [first, second]
    for _ in range(settings.curve_dashes - 1):
        for i, curve in enumerate(curves):
            end = _extend(random, settings, margin, canvas, curve, settings.curve_contrast)
            if end is None:
                return None
            ends[i] = end
    for curve in curves:
        _stamp(canvas.taken, curve.room, curve.start)
    return canvas, (first, second), tuple(ends)


def _distractor(random, settings: Settings, margin: int, canvas: _Canvas) -> _Canvas | None:
    """The canvas with one more distractor, or None where it does not fit."""
    taken = canvas.taken > _TAKEN
    if np.mean(~taken) < _LEAST_FREE:
        return None
    taken[[0, -1], :] = taken[:, [0, -1]] = True
    canvas, angle = canvas.copy(), _angle(random)
    beginning = _free_place(random, settings, margin, taken, angle)
    if beginning is None:
        return None
    curve = _begin(settings, margin, canvas, beginning, angle, settings.distractor_contrast)
    if curve is None:
        return None
    for _ in range(settings.distractor_dashes - 1):
        if _extend(random, settings, margin, canvas, curve, settings.distractor_contrast) is None:
            return None
    _stamp(canvas.taken, curve.room, curve.start)
    return canvas


def _angle(random) -> float:
    return float(random.integers(-180, 180)) * math.pi / 180


def _free_place(random, settings: Settings, margin: int, taken: np.ndarray, angle: float) -> Place | None:
    """A random place from which a dash and its margin touch nothing that is taken, or None."""
    _, room = _dash(settings, margin, angle)
    size, reach = settings.size, len(room) // 2
    blocked = taken.copy()
    padded = np.pad(taken, reach, constant_values=True)
    for y, x in np.argwhere(room >= 1):
        blocked |= padded[y : y + size, x : x + size]
    free = np.argwhere(~blocked)
    return tuple(int(i) for i in free[random.integers(len(free))]) if len(free) else None


def _begin(
    settings: Settings, margin: int, canvas: _Canvas, beginning: Place, angle: float, contrast: float
) -> _Curve | None:
    """Draws the first dash of a curve; None where it leaves the image."""
    head = _moved(beginning, angle, settings.dash_length)
    pivot = _moved(head, angle + math.pi, settings.dash_length + margin)
    if not all(0 <= i < settings.size for i in (*head, *pivot)):
        return None
    ink, room = _dash(settings, margin, angle)
    _stamp(canvas.ink, contrast * ink, beginning)
    return _Curve(pivot, angle, beginning, room)


def _extend(random, settings: Settings, margin: int, canvas: _Canvas, curve: _Curve, contrast: float) -> Place | None:
    """Draws the next dash of a curve and returns its end; None at a dead end."""
    pivot = _moved(curve.pivot, curve.angle, settings.dash_length + 2 * margin)
    places, angles, weights = _candidates(pivot, curve.angle, settings, margin, canvas.taken)
    if not len(places):
        return None
    cumulative = np.cumsum(weights)
    for _ in range(_DASH_RETRIALS + 1):
        choice = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
        choice = min(choice, len(places) - 1)
        end, angle = (int(places[choice, 0]), int(places[choice, 1])), float(angles[choice])
        ink, room = _dash(settings, margin, angle + math.pi)
        here, inside = _window(settings.size, end, len(room) // 2)
        if np.max(canvas.taken[here] + room[inside]) < _CROSSING:
            _stamp(canvas.ink, contrast * ink, end)
            _stamp(canvas.taken, curve.room, curve.start)
            curve.pivot, curve.angle, curve.start, curve.room = pivot, angle, end, room
            return end
    return None


def _candidates(pivot: Place, angle: float, settings: Settings, margin: int, taken: np.ndarray):
    """Pixels on a circle about the pivot where the next dash may end: places [n, 2], directions [n], weights [n]."""
    offsets, directions = _circumference(settings.dash_length + margin)
    places = offsets + pivot
    inside = np.all((places >= 0) & (places < settings.size), axis=1)
    places, directions = places[inside], directions[inside]
    turn = np.abs(np.mod(directions - angle + math.pi, 2 * math.pi) - math.pi)
    weights = np.cos(np.minimum(settings.continuity * turn, math.pi / 2)) ** 2
    weights *= 1 - _largest_around(taken, places, margin)
    if weights.sum() < 1e-4:
        return places[:0], directions[:0], weights[:0]
    return places, directions, weights


@functools.cache
def _circumference(radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels on a circle, relative to its centre [n, 2], and their directions [n]; as many points as pixels around."""
    around = np.arange(0, 2 * math.pi, 1 / radius)
    offsets = np.unique(np.floor(radius * np.stack([np.sin(around), np.cos(around)], axis=1)).astype(int), axis=0)
    return offsets, np.arctan2(offsets[:, 0], offsets[:, 1])


def _largest_around(values: np.ndarray, places: np.ndarray, radius: int) -> np.ndarray:
    """The largest value in the disc about each place: [n]."""
    rows, columns = (np.clip(places[:, i, None] + _disc(radius)[i], 0, len(values) - 1) for i in (0, 1))
    return values[rows, columns].max(axis=1, initial=0.0)


@functools.cache
def _disc(radius: int) -> np.ndarray:
    """Pixels of a disc relative to its centre: [2, n]."""
    offsets = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1)
    return offsets[:, np.sum(offsets**2, axis=0) <= radius**2]


def _moved(place: Place, angle: float, distance: float) -> Place:
    """The pixel at a distance in a direction, rounded up as published."""
    return math.ceil(place[0] + distance * math.sin(angle)), math.ceil(place[1] + distance * math.cos(angle))


@functools.lru_cache(maxsize=8192)
def _dash(settings: Settings, margin: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """A dash that begins in the middle of a square: its ink, and the room it takes with its margin; both in [0, 1]."""
    length, half = settings.dash_length, settings.dash_thickness / 2
    y, x = _points(math.ceil(length + half + margin) + 1)
    along = y * math.sin(angle) + x * math.cos(angle)
    across = np.abs(y * math.cos(angle) - x * math.sin(angle))
    beyond = np.maximum(np.maximum(-along, along - length), 0)
    ink = (across <= half) & (beyond == 0)
    room = np.hypot(np.maximum(across - half, 0), beyond) <= margin
    return _pixels(ink), _pixels(room)


@functools.cache
def _circle(radius: float) -> np.ndarray:
    """A filled circle in the middle of a square."""
    y, x = _points(math.ceil(radius) + 1)
    return _pixels(np.hypot(y, x) <= radius)


def _points(reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the points of 2 reach + 1 pixels a side, from the middle one's centre: [n, 1] and [1, n]."""
    pixels = np.arange(-reach, reach + 1)[:, None]
    points = (pixels + (np.arange(_POINTS) + 0.5) / _POINTS - 0.5).ravel()
    return points[:, None], points[None, :]


def _pixels(points: np.ndarray) -> np.ndarray:
    """The mean over each pixel's points."""
    side = len(points) // _POINTS
    return points.reshape(side, _POINTS, side, _POINTS).mean(axis=(1, 3))


def _window(size: int, centre: Place, reach: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a square about a centre lies in an image, and which part of the square that is."""
    first = [max(c - reach, 0) for c in centre]
    last = [max(min(c + reach + 1, size), f) for c, f in zip(centre, first, strict=True)]
    here = tuple(slice(f, e) for f, e in zip(first, last, strict=True))
    inside = tuple(slice(f - c + reach, e - c + reach) for f, e, c in zip(first, last, centre, strict=True))
    return here, inside


def _stamp(picture: np.ndarray, patch: np.ndarray, centre: Place) -> None:
    """Puts a square onto a picture where it is brighter."""
    here, inside = _window(len(picture), centre, len(patch) // 2)
    np.maximum(picture[here], patch[inside], out=picture[here])
