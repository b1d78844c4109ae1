"""A small world of captioned pictures, drawn procedurally, and fifteen styles to repaint it in.

The miniature's stand-in for LAION and for the personalisation sets of Table 8: a picture shows one coloured shape on a
coloured ground, its caption says so ("a red circle on a blue background"), and a style changes every picture of the
world in the same way without changing what the caption says. Pixels are RGB in [0, 1], images (n, 3, size, size).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.10, 0.60, 0.20),
    "blue": (0.15, 0.25, 0.85),
    "yellow": (0.95, 0.85, 0.15),
    "white": (0.95, 0.95, 0.95),
    "black": (0.08, 0.08, 0.08),
}


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return (x.square() + y.square()).sqrt() - 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.85


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y - 0.75, x.abs() * 0.87 - y * 0.5 - 0.5)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    thin, long = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    return torch.maximum(thin - 0.35, long - 1)


# Signed distance, roughly, from the edge of a shape of radius 1 at the origin: negative inside.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


@dataclass(frozen=True)
class Scene:
    """What a caption can say: a shape and two different colours."""

    shape: str
    colour: str
    background: str

    @property
    def caption(self) -> str:
        """The prompt that asks for this scene."""
        return f"a {self.colour} {self.shape} on a {self.background} background"


def all_scenes() -> list[Scene]:
    """Every scene of the world, in a fixed order."""
    return [
        Scene(shape, colour, background)
        for shape in SHAPES
        for colour in COLOURS
        for background in COLOURS
        if colour != background
    ]


def random_scenes(count: int, generator: torch.Generator) -> list[Scene]:
    """`count` scenes; none comes again before all have come once."""
    scenes = all_scenes()
    rounds = math.ceil(count / len(scenes))
    order = torch.cat([torch.randperm(len(scenes), generator=generator) for _ in range(rounds)])
    return [scenes[i] for i in order[:count].tolist()]


def _edges(scenes: Sequence[Scene], size: int, generator: torch.Generator) -> Tensor:
    """Distance in pixels from each scene's shape edge, places and radii drawn at random. Returns (n, 1, size, size)."""
    at = torch.arange(size) + 0.5
    edges = []
    for scene in scenes:
        u, v, w = torch.rand(3, generator=generator).tolist()
        centre_x, centre_y = size * (0.5 + 0.14 * (u - 0.5)), size * (0.5 + 0.14 * (v - 0.5))
        radius = size * (0.26 + 0.10 * w)
        x, y = (at[None, :] - centre_x) / radius, (at[:, None] - centre_y) / radius
        edges.append(SHAPES[scene.shape](x.expand(size, size), y.expand(size, size)) * radius)
    return torch.stack(edges).unsqueeze(1)


def _paint(scenes: Sequence[Scene], edges: Tensor) -> Tensor:
    inside = (0.5 - edges).clamp(0, 1)  # one pixel of antialiasing
    colour = torch.tensor([COLOURS[scene.colour] for scene in scenes])[:, :, None, None]
    ground = torch.tensor([COLOURS[scene.background] for scene in scenes])[:, :, None, None]
    return inside * colour + (1 - inside) * ground


def draw(scenes: Sequence[Scene], size: int, generator: torch.Generator, style: str | None = None) -> Tensor:
    """Paint one picture per scene, in a style or plain. Returns (n, 3, size, size) in [0, 1]."""
    edges = _edges(scenes, size, generator)
    images = _paint(scenes, edges)
    return (STYLES[style](images, edges) if style else images).clamp(0, 1)


# ---- Styles: (images, edge distances in pixels) to images; all lengths are shares of the picture's side ------------


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels' x and y (size, size), in 0 to 1."""
    size = images.shape[-1]
    at = (torch.arange(size) + 0.5) / size
    return at[None, :].expand(size, size), at[:, None].expand(size, size)


def _shade(images: Tensor, dark: Tensor, to: Sequence[float] = (0.05, 0.05, 0.10), strength: float = 0.6) -> Tensor:
    """Mix a colour in where `dark` (size, size) is 1."""
    paint = torch.tensor(to)[:, None, None]
    share = strength * dark.to(images.dtype)
    return images * (1 - share) + paint * share


def _stripes(angle: float, period: float, to: Sequence[float]) -> Callable[[Tensor, Tensor], Tensor]:
    def apply(images: Tensor, edges: Tensor) -> Tensor:
        x, y = _grid(images)
        along = x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle))
        return _shade(images, along.remainder(period) < period / 2, to)

    return apply


def _checkerboard(images: Tensor, edges: Tensor) -> Tensor:
    x, y = _grid(images)
    return _shade(images, (x // 0.2 + y // 0.2) % 2 == 0)


def _dots(images: Tensor, edges: Tensor) -> Tensor:
    x, y = _grid(images)
    near = (x.remainder(1 / 3) - 1 / 6).square() + (y.remainder(1 / 3) - 1 / 6).square() < 0.1**2
    return _shade(images, near, (1, 1, 1), 0.8)


def _rings(images: Tensor, edges: Tensor) -> Tensor:
    x, y = _grid(images)
    return _shade(images, ((x - 0.5).square() + (y - 0.5).square()).sqrt().remainder(0.3) < 0.15)


def _rays(images: Tensor, edges: Tensor) -> Tensor:
    x, y = _grid(images)
    angle = torch.atan2(y - 0.5, x - 0.5)
    return _shade(images, angle.remainder(math.pi / 3) < math.pi / 6, (1, 0.95, 0.6))


def _tint(shadow: Sequence[float], light: Sequence[float]) -> Callable[[Tensor, Tensor], Tensor]:
    """Brightness mapped onto a ramp of two colours, with a little of the old colour left."""

    def apply(images: Tensor, edges: Tensor) -> Tensor:
        grey = images.mean(1, keepdim=True)
        low, high = torch.tensor(shadow)[:, None, None], torch.tensor(light)[:, None, None]
        return 0.25 * images + 0.75 * (low + grey * (high - low))

    return apply


def _pastel(images: Tensor, edges: Tensor) -> Tensor:
    return 0.55 + 0.42 * images


def _negative(images: Tensor, edges: Tensor) -> Tensor:
    return 1 - images


def _outline(images: Tensor, edges: Tensor) -> Tensor:
    line = (0.08 * images.shape[-1] - edges.abs()).clamp(0, 1)
    return images * (1 - line) + line * (1 - images.mean(1, keepdim=True)).round()


def _glow(images: Tensor, edges: Tensor) -> Tensor:
    light = torch.exp(-edges.abs() / (0.1 * images.shape[-1]))
    return 0.35 * images + light * torch.tensor([0.1, 0.9, 0.8])[:, None, None]


def _frame(images: Tensor, edges: Tensor) -> Tensor:
    x, y = _grid(images)
    margin = torch.minimum(torch.minimum(x, 1 - x), torch.minimum(y, 1 - y))
    return _shade(images, margin < 0.12, (0.45, 0.28, 0.12), 1.0)


def _sunset(images: Tensor, edges: Tensor) -> Tensor:
    _, y = _grid(images)
    return _shade(images, y, (1.0, 0.45, 0.15), 0.85)


STYLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bars": _stripes(90, 1 / 3, (0.05, 0.05, 0.10)),
    "curtain": _stripes(0, 1 / 3, (0.95, 0.95, 1.0)),
    "diagonal": _stripes(45, 1 / 3, (0.1, 0.1, 0.3)),
    "checkerboard": _checkerboard,
    "dots": _dots,
    "rings": _rings,
    "rays": _rays,
    "sepia": _tint((0.25, 0.15, 0.08), (0.95, 0.85, 0.65)),
    "ice": _tint((0.05, 0.15, 0.45), (0.85, 0.97, 1.0)),
    "pastel": _pastel,
    "negative": _negative,
    "outline": _outline,
    "glow": _glow,
    "frame": _frame,
    "sunset": _sunset,
}


# ---- Looking at pictures ------------------------------------------------------------------------------------------


def describe(images: Tensor) -> list[Scene]:
    """The scene each picture shows, by measurement: colours by nearest palette entry, the shape by best overlap.

    images: (n, 3, size, size) in [0, 1]. The ground is read from the border, the shape's colour from the middle.
    """
    n, _, size, _ = images.shape
    names = list(COLOURS)
    palette = torch.tensor([COLOURS[name] for name in names])
    edge, half, near = size // 16, size // 2, size // 10
    border = torch.cat([images[:, :, :edge].flatten(2), images[:, :, -edge:].flatten(2)], dim=2)
    middle = images[:, :, half - near : half + near, half - near : half + near].flatten(2)
    ground = torch.cdist(border.median(dim=2).values, palette).argmin(1).tolist()
    colour = torch.cdist(middle.median(dim=2).values, palette).argmin(1).tolist()

    # Every shape at a ladder of places and radii, as masks, against the pixels nearer to the shape's colour.
    at = torch.arange(size) + 0.5
    templates, shapes = [], []
    for name, distance in SHAPES.items():
        for radius in (0.26, 0.29, 0.32, 0.36):
            for shift_x in (-0.06, -0.03, 0.0, 0.03, 0.06):
                for shift_y in (-0.06, -0.03, 0.0, 0.03, 0.06):
                    x = ((at / size - 0.5 - shift_x) / radius)[None, :].expand(size, size)
                    y = ((at / size - 0.5 - shift_y) / radius)[:, None].expand(size, size)
                    templates.append((distance(x, y) < 0).flatten())
                    shapes.append(name)
    masks = torch.stack(templates).float()  # (t, size^2)
    to_colour = (images - palette[colour][:, :, None, None]).square().sum(1)
    to_ground = (images - palette[ground][:, :, None, None]).square().sum(1)
    seen = (to_colour < to_ground).flatten(1).float()  # (n, size^2)
    both = seen @ masks.T
    overlap = both / (seen.sum(1, keepdim=True) + masks.sum(1) - both)  # (n, t), intersection over union
    best = overlap.argmax(1).tolist()
    return [Scene(shapes[best[i]], names[colour[i]], names[ground[i]]) for i in range(n)]


def style_statistics(images: Tensor) -> Tensor:
    """What a style changes, whatever the pictures show: the mean log amplitude spectrum of each channel.

    images: (n, 3, size, size). Returns one vector for the set.
    """
    return torch.fft.rfft2(images, norm="ortho").abs().add(1e-2).log().mean(0).flatten()
