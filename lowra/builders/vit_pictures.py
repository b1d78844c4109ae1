"""The miniature's images: drawn objects to pre-train on, and 15 tasks of the kinds that VTAB-1k has.

Nothing is downloaded: shapes, textures and scenes are drawn, and the digits are scikit-learn's. Every image has
random colours, place, size and background, so that a task must be learned and not looked up. The tasks carry
the folder names that VTAB-1k is distributed with, but their images are ours.
"""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw
from tqdm import tqdm

CANVAS = 96
"""Everything is drawn on a canvas this wide, and averaged down to the image size."""

Point = tuple[float, float]
Colour = tuple[int, int, int]
Draw = Callable[[int, Generator], Image.Image]

# ---- What pictures are made of ----------------------------------------------------------------------------------


def _colour(rng: Generator, hue: float | None = None, value: float | None = None) -> Colour:
    """A random colour; hue and value (brightness) in [0, 1] where given."""
    hue = rng.uniform() if hue is None else hue
    value = rng.uniform(0.3, 1) if value is None else value
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.4, 1), value)
    return int(255 * red), int(255 * green), int(255 * blue)


def _background(rng: Generator, low: int = 0, high: int = 256) -> Image.Image:
    """A soft gradient between four random colours."""
    corners = rng.integers(low, high, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)


def _arc(start: float, stop: float, radius: float = 1, points: int = 16, shift: float = 0) -> list[Point]:
    """Points on a circle's arc from `start` to `stop` (turns)."""
    angles = np.linspace(start, stop, points) * math.tau
    return [(radius * math.cos(a) + shift, radius * math.sin(a)) for a in angles]


def _spikes(count: int, inner: float) -> list[Point]:
    """A star of `count` points whose dents lie at radius `inner`."""
    turns = [i / (2 * count) * math.tau for i in range(2 * count)]
    return [((1 if i % 2 == 0 else inner) * math.cos(t), (1 if i % 2 == 0 else inner) * math.sin(t)) for i, t in
            enumerate(turns)]  # fmt: skip


_SHAPES: dict[str, list[Point]] = {
    "disc": _arc(0, 1),
    "ring": _arc(0, 1) + _arc(1, 0, 0.55),
    "half": _arc(0, 0.5),
    "crescent": _arc(-0.3, 0.3) + _arc(0.24, -0.24, 0.85, shift=-0.36),
    "triangle": _arc(0, 1, points=4),
    "square": _arc(0, 1, points=5),
    "star": _spikes(5, 0.4),
    "cross": _spikes(4, 0.3),
    "bar": [(-1, -0.28), (1, -0.28), (1, 0.28), (-1, 0.28)],
    "arrow": [(-1, -0.25), (0.1, -0.25), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.25), (-1, 0.25)],
}
SHAPES = tuple(_SHAPES)


def _place(points: Sequence[Point], x: float, y: float, radius: float, turn: float) -> list[Point]:
    """Unit points turned (in turns), scaled and moved onto the canvas."""
    c, s = math.cos(turn * math.tau), math.sin(turn * math.tau)
    return [(x + radius * (c * px - s * py), y + radius * (s * px + c * py)) for px, py in points]


def _somewhere(rng: Generator, radius: float) -> Point:
    x, y = rng.uniform(radius, CANVAS - radius, 2)
    return float(x), float(y)


def _outline(shape: int, rng: Generator) -> list[Point]:
    """One shape near the middle of the picture, nearly upright, as photographers put things."""
    radius = rng.uniform(0.34, 0.46) * CANVAS
    return _place(_SHAPES[SHAPES[shape]], *_somewhere(rng, radius), radius, rng.uniform(-0.04, 0.04))


TEXTURES = ("stripes", "checks", "dots", "rings", "noise", "blotches", "zigzag", "grid", "fan", "waves")


def _texture(kind: int, rng: Generator, period: float) -> Image.Image:
    """A two-coloured texture at any phase, nearly upright. period: a share of the picture's width."""
    y, x = np.mgrid[0:CANVAS, 0:CANVAS] / CANVAS
    angle, (dx, dy) = rng.uniform(-0.3, 0.3), rng.uniform(0, 1, 2)
    u = (np.cos(angle) * (x - dx) + np.sin(angle) * (y - dy)) * math.tau / period
    v = (np.cos(angle) * (y - dy) - np.sin(angle) * (x - dx)) * math.tau / period
    cells = max(2, round(1.5 / period))
    level: np.ndarray
    match TEXTURES[kind]:
        case "stripes":
            level = np.sin(u)
        case "checks":
            level = np.sign(np.sin(u) * np.sin(v))
        case "dots":
            level = np.where(np.cos(u) + np.cos(v) > 0.8, 1.0, -1.0)
        case "rings":
            level = np.sin(np.hypot(u, v))
        case "noise":
            level = rng.uniform(-1, 1, (CANVAS // 3, CANVAS // 3)).repeat(3, 0).repeat(3, 1)
        case "blotches":
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
            level = np.asarray(coarse.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)) / 127.5 - 1
        case "zigzag":
            level = np.sign(np.sin(u + 2 * np.abs(v / math.pi % 2 - 1)))
        case "grid":
            level = np.where(np.maximum(np.cos(u), np.cos(v)) > 0.85, 1.0, -1.0)
        case "fan":
            level = np.sign(np.sin(np.arctan2(v, u) * cells))
        case "waves":
            level = np.sin(u + 1.5 * np.sin(v / 2))
    share = (level[..., None] + 1) / 2  # (canvas, canvas, 1)
    one, other = np.array(_colour(rng)), np.array(_colour(rng, value=rng.uniform(0, 0.4)))
    return Image.fromarray((one * share + other * (1 - share)).astype(np.uint8))


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: (1797, 8, 8) uint8 and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).astype(np.uint8), digits.target


def _digit(image: Image.Image, digit: int, rng: Generator, x: float, y: float, width: float, colour: Colour) -> None:
    """A handwritten digit of the given width centred at (x, y)."""
    images, labels = _digits()
    mask = Image.fromarray(images[rng.choice(np.flatnonzero(labels == digit))])
    mask = mask.resize((round(width), round(width)), Image.Resampling.BICUBIC)
    image.paste(colour, (round(x - width / 2), round(y - width / 2)), mask)


def _contrast(rng: Generator) -> tuple[Image.Image, Colour]:
    """A dark background and a light colour that stands out from it."""
    return _background(rng, 0, 110), _colour(rng, value=rng.uniform(0.75, 1))


# ---- Pre-training: 30 kinds of things --------------------------------------------------------------------------

PRETRAINING_CLASSES = 30


def draw_thing(label: int, rng: Generator) -> Image.Image:
    """One of 10 digits, 10 shapes and 10 textures: the miniature's ImageNet."""
    kind, which = divmod(label, 10)
    if kind == 2:
        return _texture(which, rng, rng.uniform(0.2, 0.3))
    image, colour = _contrast(rng)
    if kind == 1:
        ImageDraw.Draw(image).polygon(_outline(which, rng), fill=colour)
    else:
        width = rng.uniform(0.8, 1) * CANVAS
        _digit(image, which, rng, *_somewhere(rng, width / 2), width, colour)
    return image


# ---- Natural tasks ----------------------------------------------------------------------------------------------


def _cifar(label: int, rng: Generator) -> Image.Image:
    """Coloured things before textured backgrounds: 10 shapes, warm or cold."""
    shape, cold = divmod(label, 2)
    image = _texture(int(rng.integers(10)), rng, 0.3)
    image = Image.blend(image, Image.new("RGB", image.size, _colour(rng)), 0.7)
    colour = _colour(rng, hue=rng.uniform(-0.08, 0.14) + 0.5 * cold, value=1)
    ImageDraw.Draw(image).polygon(_outline(shape, rng), fill=colour)
    return image


def _caltech(label: int, rng: Generator) -> Image.Image:
    """Outlines of 10 shapes."""
    image, colour = _contrast(rng)
    points = _outline(label, rng)
    ImageDraw.Draw(image).line([*points, points[0]], fill=colour, width=int(rng.integers(4, 8)))
    return image


def _dtd(label: int, rng: Generator) -> Image.Image:
    """Six textures, fine or coarse."""
    kind, coarse = divmod(label, 2)
    return _texture((0, 1, 2, 3, 6, 7)[kind], rng, rng.uniform(0.3, 0.4) if coarse else rng.uniform(0.13, 0.2))


def _flower(label: int, rng: Generator) -> Image.Image:
    """Flowers with 3, 4, 5 or 7 petals in one of three colours, on leaves."""
    petals, hue = (3, 4, 5, 7)[label // 3], (0.0, 0.15, 0.75)[label % 3]
    image = _texture(5, rng, 0.2)
    image = Image.blend(image, Image.new("RGB", image.size, (30, 110, 40)), 0.7)
    pen, size = ImageDraw.Draw(image), rng.uniform(0.3, 0.42) * CANVAS
    x, y = _somewhere(rng, size)
    colour, turn = _colour(rng, hue + rng.uniform(-0.04, 0.04), 1), rng.uniform()
    for petal in range(petals):
        angle = turn + petal / petals
        middle = _place([(0.6, 0)], x, y, size, angle)[0]
        pen.polygon(
            _place([(px, py * 1.6 / petals**0.7) for px, py in _arc(0, 1)], *middle, 0.42 * size, angle), colour
        )
    pen.polygon(_place(_SHAPES["disc"], x, y, 0.22 * size, 0), _colour(rng, 0.12, 0.9))
    return image


def _pet(label: int, rng: Generator) -> Image.Image:
    """Faces: pointed or hanging ears, light or dark muzzle, eyes near or far from each other."""
    hanging, dark, wide = label // 4, label // 2 % 2, label % 2
    image = _background(rng)
    pen, size = ImageDraw.Draw(image), rng.uniform(0.26, 0.34) * CANVAS
    x, y = _somewhere(rng, 1.35 * size)
    fur = _colour(rng, 0.08, rng.uniform(0.45, 0.9))
    for side in (-1, 1):
        if hanging:
            ear = _place([(0.35 * px, 0.8 * py) for px, py in _arc(0, 1)], x + side * size, y + 0.1 * size, size, 0)
        else:
            ear = [(x + side * a * size, y - b * size) for a, b in ((0.2, 0.8), (0.8, 1.35), (0.95, 0.3))]
        pen.polygon(ear, fur)
    pen.polygon(_place(_SHAPES["disc"], x, y, size, 0), fur)
    pen.polygon(_place(_SHAPES["disc"], x, y + 0.45 * size, 0.38 * size, 0), (60, 40, 30) if dark else (250, 240, 225))
    for side in (-1, 1):
        pen.polygon(_place(_SHAPES["disc"], x + side * (0.55 if wide else 0.25) * size, y - 0.2 * size, 0.15 * size, 0),
                    (10, 10, 10))  # fmt: skip
    return image


def _svhn(label: int, rng: Generator) -> Image.Image:
    """House numbers: the digit in the middle, cut neighbours on both sides."""
    image, colour = _contrast(rng)
    width, y = rng.uniform(0.6, 0.85) * CANVAS, CANVAS / 2 + rng.uniform(-8, 8)
    for place, digit in ((-0.75, rng.integers(10)), (0.75, rng.integers(10)), (0, label)):
        _digit(image, int(digit), rng, CANVAS / 2 + place * width + rng.uniform(-4, 4), y, width, colour)
    return image


# ---- Specialised ------------------------------------------------------------------------------------------------


def _camelyon(label: int, rng: Generator) -> Image.Image:
    """Stained tissue: does a large dark nucleus lie in the middle? There may be others around it either way."""
    image = _texture(5, rng, 0.15)
    image = Image.blend(image, Image.new("RGB", image.size, (230, 170, 200)), 0.8)
    pen = ImageDraw.Draw(image)
    for _ in range(14):
        pen.polygon(_place(_SHAPES["disc"], *_somewhere(rng, 4), rng.uniform(3, 6), 0), _colour(rng, 0.8, 0.6))
    places = [(CANVAS / 2 + rng.uniform(-9, 9), CANVAS / 2 + rng.uniform(-9, 9))] if label else []
    around = [(rng.uniform(0.4, 0.6) * CANVAS * math.cos(t), rng.uniform(0.4, 0.6) * CANVAS * math.sin(t))
              for t in rng.uniform(0, math.tau, 3)]  # fmt: skip
    for x, y in places + [(CANVAS / 2 + x, CANVAS / 2 + y) for x, y in around]:
        pen.polygon(_place(_SHAPES["disc"], x, y, rng.uniform(9, 13), 0), _colour(rng, 0.75, 0.3))
    return image


# ---- Structured -------------------------------------------------------------------------------------------------


def _count(label: int, rng: Generator) -> Image.Image:
    """3 to 8 objects that do not touch: the label is how many."""
    image = _background(rng, 90, 150)
    pen = ImageDraw.Draw(image)
    for cell in rng.permutation(9)[: label + 3]:
        x, y = (cell % 3 + 0.5) * CANVAS / 3 + rng.uniform(-4, 4), (cell // 3 + 0.5) * CANVAS / 3 + rng.uniform(-4, 4)
        shape = _SHAPES[("disc", "square", "triangle")[rng.integers(3)]]
        pen.polygon(
            _place(shape, x, y, rng.uniform(8, 11), rng.uniform()), _colour(rng, value=float(rng.choice([0.2, 1])))
        )
    return image


def _depth(rng: Generator, label: int, bins: int) -> float:
    """A depth in [0, 1] (near, far) from the label's bin, its edges left out."""
    return (label + rng.uniform(0.1, 0.9)) / bins


def _ground(rng: Generator, depth: float) -> tuple[float, float, float]:
    """Where something that stands on the ground at this depth is seen: x, y of its foot, and its scale."""
    scale = 1 / (1 + 3 * depth)
    return CANVAS * (0.5 + rng.uniform(-0.4, 0.4)), CANVAS * (0.3 + 0.65 * scale), scale


def _scene(rng: Generator, ground: Colour) -> Image.Image:
    image = _background(rng, 150, 256)
    ImageDraw.Draw(image).rectangle((0, 0.35 * CANVAS, CANVAS, CANVAS), fill=ground)
    return image


def _distance(label: int, rng: Generator) -> Image.Image:
    """Balls on a plane: the label is the depth of the nearest one, in five bins."""
    image = _scene(rng, (120, 120, 120))
    nearest = _depth(rng, label, 5)
    for depth in sorted([nearest, *rng.uniform(nearest, 1.2, rng.integers(1, 4))], reverse=True):
        x, y, scale = _ground(rng, depth)
        radius = 0.22 * CANVAS * scale
        ImageDraw.Draw(image).polygon(_place(_SHAPES["disc"], x, y - radius, radius, 0), _colour(rng, value=0.9))
    return image


def _dmlab(label: int, rng: Generator) -> Image.Image:
    """A corridor with a good (green) or bad (red) thing in it, close, far or very far."""
    bad, far = divmod(label, 3)
    image = Image.new("RGB", (CANVAS, CANVAS), _colour(rng, value=0.6))
    pen, middle = ImageDraw.Draw(image), CANVAS * rng.uniform(0.35, 0.65)
    end, corner = (middle, 0.4 * CANVAS), [(0, 0), (CANVAS, 0), (CANVAS, CANVAS), (0, CANVAS)]
    for i in (0, 2):
        pen.polygon([corner[i], corner[i + 1], end], fill=_colour(rng, value=0.35 if i else 0.8))
    depth = _depth(rng, far, 3)
    scale = 1 / (1 + 3 * depth)
    x, y = middle + rng.uniform(-20, 20) * scale, CANVAS * (0.4 + 0.4 * scale)
    shape = _SHAPES[("disc", "star", "square")[rng.integers(3)]]
    pen.polygon(_place(shape, x, y, 0.28 * CANVAS * scale, rng.uniform()), _colour(rng, 0 if bad else 0.35, 1))
    return image


def _kitti(label: int, rng: Generator) -> Image.Image:
    """A road: is the nearest vehicle close, at some distance, far, or is there none? Trees stand beside it."""
    image = _scene(rng, (90, 140, 70))
    pen = ImageDraw.Draw(image)
    pen.polygon([(0.47 * CANVAS, 0.35 * CANVAS), (0.53 * CANVAS, 0.35 * CANVAS), (1.1 * CANVAS, CANVAS),
                 (-0.1 * CANVAS, CANVAS)], fill=(90, 90, 95))  # fmt: skip
    for side in rng.choice([-1, 1], 2):
        _, y, scale = _ground(rng, rng.uniform(0.2, 1))
        x = CANVAS * (0.5 + side * (0.1 + 0.55 * scale))
        pen.polygon([(x - 9 * scale, y), (x + 9 * scale, y), (x, y - 50 * scale)], fill=(20, 80, 30))
    if label == 3:
        return image
    nearest = _depth(rng, label, 3)
    for depth in sorted([nearest, *rng.uniform(nearest, 1, rng.integers(0, 3))], reverse=True):
        x, y, scale = _ground(rng, depth)
        x = CANVAS / 2 + (x - CANVAS / 2) * scale
        colour = _colour(rng, value=0.9)
        pen.rectangle((x - 20 * scale, y - 22 * scale, x + 20 * scale, y), fill=colour)
        pen.rectangle((x - 14 * scale, y - 34 * scale, x + 14 * scale, y - 20 * scale), fill=colour)
        pen.rectangle((x - 10 * scale, y - 31 * scale, x + 10 * scale, y - 23 * scale), fill=(30, 40, 60))
    return image


def _location(label: int, rng: Generator) -> Image.Image:
    """A white sprite on black: the label is its place from left to right, in eight bins."""
    image = Image.new("RGB", (CANVAS, CANVAS))
    radius = rng.uniform(0.08, 0.15) * CANVAS
    x = radius + (CANVAS - 2 * radius) * (label + rng.uniform()) / 8
    shape = _SHAPES[("square", "disc", "crescent")[rng.integers(3)]]
    ImageDraw.Draw(image).polygon(_place(shape, x, _somewhere(rng, radius)[1], radius, rng.uniform()), (255, 255, 255))
    return image


def _orientation(label: int, rng: Generator) -> Image.Image:
    """A white sprite on black: the label is where it points, in eight bins."""
    image = Image.new("RGB", (CANVAS, CANVAS))
    radius = rng.uniform(0.25, 0.4) * CANVAS
    shape = _SHAPES[("arrow", "half", "crescent")[rng.integers(3)]]
    turn = (label + rng.uniform(0.1, 0.9)) / 8
    ImageDraw.Draw(image).polygon(_place(shape, *_somewhere(rng, radius), radius, turn), (255, 255, 255))
    return image


def _block(azimuth: float, elevation: float, rng: Generator) -> Image.Image:
    """A grey block with a bright front, seen from an azimuth and an elevation (turns)."""
    half = np.array([rng.uniform(0.7, 1), rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6)])  # length, width, height
    ca, sa = math.cos(azimuth * math.tau), math.sin(azimuth * math.tau)
    ce, se = math.cos(elevation * math.tau), math.sin(elevation * math.tau)
    turn = np.array([[ca, -sa, 0], [sa, ca, 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, se, ce], [0, -ce, se]])  # rows: right, up in the picture, towards the eye
    view = tilt @ turn  # (3, 3)
    brightness = rng.uniform(0.7, 1)
    image = Image.new("RGB", (CANVAS, CANVAS), (int(rng.uniform(60, 120)),) * 3)
    x, y = CANVAS * (0.5 + rng.uniform(-0.08, 0.08, 2))
    for axis in range(3):
        for side in (-1, 1):
            normal = view[:, axis] * side
            if normal[2] <= 0:
                continue  # faces away from the eye
            one, other = (axis + 1) % 3, (axis + 2) % 3
            corners = np.zeros((4, 3))
            corners[:, axis] = side * half[axis]
            corners[:, one] = np.array([-1, 1, 1, -1]) * half[one]
            corners[:, other] = np.array([-1, -1, 1, 1]) * half[other]
            seen = corners @ view.T * 0.34 * CANVAS  # (4, 3)
            front = axis == 0 and side == 1
            level = int(255 * brightness) if front else int(brightness * (70 + 110 * max(normal[1], 0)))
            ImageDraw.Draw(image).polygon([(x + a, y - b) for a, b, _ in seen], fill=(level,) * 3)
    return image


def _azimuth(label: int, rng: Generator) -> Image.Image:
    """A block seen from one of nine sides."""
    return _block((label + rng.uniform(0.1, 0.9)) / 9, rng.uniform(0.06, 0.17), rng)


def _elevation(label: int, rng: Generator) -> Image.Image:
    """A block seen from one of five heights, 10 to 80 degrees."""
    return _block(rng.uniform(), (10 + 70 * _depth(rng, label, 5)) / 360, rng)


TASKS: dict[str, tuple[int, Draw]] = {
    "cifar": (20, _cifar),
    "caltech101": (10, _caltech),
    "dtd": (12, _dtd),
    "oxford_flowers102": (12, _flower),
    "oxford_iiit_pet": (8, _pet),
    "svhn": (10, _svhn),
    "patch_camelyon": (2, _camelyon),
    "clevr_count": (6, _count),
    "clevr_dist": (5, _distance),
    "dmlab": (6, _dmlab),
    "kitti": (4, _kitti),
    "dsprites_loc": (8, _location),
    "dsprites_ori": (8, _orientation),
    "smallnorb_azi": (9, _azimuth),
    "smallnorb_ele": (5, _elevation),
}
"""The paper's 15 of VTAB-1k's 19 tasks (App. D.1), by their folder names: classes and drawing of the stand-in."""


def draw_images(draw: Draw, classes: int, count: int, size: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """`count` images of random classes: (count, size, size, 3) uint8 and (count,) labels."""
    labels = rng.integers(0, classes, count)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    for i, label in enumerate(tqdm(labels, desc="drawing", unit="image", delay=5, leave=False)):
        images[i] = np.asarray(draw(int(label), rng).resize((size, size), Image.Resampling.BOX))
    return images, labels
