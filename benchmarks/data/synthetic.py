"""Synthetic fundus photographs: drawn eyes with blurred bright exudates, and the mask of these.

Each shows, on black, a round retina of its own tint, vessels that fan out from the optic disc, a dark macula, clusters
of exudates, and the camera's noise; the disc and pale reflexes and drusen resemble exudates, but the mask has none.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFilter

from data.samples import Sample

SIDE = 320
LARGEST = 30
# Every fifth eye is healthy.
HEALTHY_EVERY = 5
EXUDATE = (255, 226, 130)
DISC = (255, 222, 150)
REFLEX = (235, 165, 95)
DRUSEN = (240, 190, 100)
VESSEL = (112, 26, 14)
MACULA = (96, 30, 14)

Picture = npt.NDArray[np.float32]
Random = np.random.Generator


def fundus_samples(count: int, seed: int, *, stream: int) -> list[Sample]:
    """Synthetic photographs with their exudate masks; every fifth has no exudate.

    Args:
        count: photographs to draw.
        seed: the same seed and stream give the same photographs.
        stream: tells training and held-out photographs of one seed apart.

    Returns:
        count samples of SIDE x SIDE pixels.
    """
    return [_fundus(index, np.random.default_rng([seed, stream, index])) for index in range(count)]


def _fundus(index: int, random: Random) -> Sample:
    disc = SIDE * random.uniform(0.2, 0.26), SIDE * random.uniform(0.42, 0.58)
    macula = disc[0] + SIDE * 0.38, disc[1] + SIDE * random.uniform(0, 0.06)
    picture = _retina(random)
    picture = _painted(picture, MACULA, _spot(macula, SIDE * 0.06, SIDE * 0.035), 0.6)
    picture = _painted(picture, DISC, _optic_disc(disc, random), 0.92)
    picture = _painted(picture, VESSEL, _vessels(disc, random), 0.75)
    picture = _painted(picture, REFLEX, _pale_spots(int(random.integers(2, 6)), (2, 9), (3, 6), random), 0.5)
    picture = _painted(picture, DRUSEN, _pale_spots(int(random.integers(5, 25)), (0.5, 4), (1, 2.5), random), 0.55)
    lesion = np.zeros((SIDE, SIDE), bool)
    if index % HEALTHY_EVERY != HEALTHY_EVERY - 1:
        lesion, opacity = _exudates(disc, random)
        picture = _painted(picture, EXUDATE, opacity, random.uniform(0.6, 0.95))
    picture = np.asarray(picture * _field_of_view() + random.normal(0, 4, picture.shape), np.float32)
    pixels = np.flip(picture, 1) if random.random() < 0.5 else picture
    mask = np.flip(lesion, 1) if pixels is not picture else lesion
    image = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()
    return Sample(f"synthetic {index}", image, torch.from_numpy(mask.copy()))


def _retina(random: Random) -> Picture:
    """An orange ground, brighter in the middle, with soft mottles; (SIDE, SIDE, 3)."""
    tint = np.array([random.uniform(165, 215), random.uniform(72, 105), random.uniform(25, 50)])
    shade = 1.1 - 0.5 * (_distance((SIDE / 2, SIDE / 2)) / (SIDE / 2)) ** 2
    mottles = sum(scale * _soft_noise(cells, random) for cells, scale in ((5, 0.12), (20, 0.06), (80, 0.04)))
    return np.asarray(tint * (shade + mottles)[..., None], np.float32)


def _soft_noise(cells: int, random: Random) -> Picture:
    coarse = Image.fromarray(random.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _field_of_view() -> Picture:
    return np.asarray(np.clip(SIDE * 0.48 - _distance((SIDE / 2, SIDE / 2)), 0, 1)[..., None], np.float32)


def _optic_disc(centre: tuple[float, float], random: Random) -> Picture:
    radius = SIDE * random.uniform(0.062, 0.08)
    rim, cup = _spot(centre, radius, 2.5), _spot(centre, radius * random.uniform(0.35, 0.6), 3)
    return np.asarray(0.72 * rim + 0.28 * cup, np.float32)


def _pale_spots(count: int, radii: tuple[float, float], softness: tuple[float, float], random: Random) -> Picture:
    spots = np.zeros((SIDE, SIDE), np.float32)
    for _ in range(count):
        spots = np.maximum(spots, _spot(_place(random), random.uniform(*radii), random.uniform(*softness)))
    return spots


def _vessels(disc: tuple[float, float], random: Random) -> Picture:
    canvas = Image.new("L", (2 * SIDE, 2 * SIDE))
    draw = ImageDraw.Draw(canvas)
    for start in np.linspace(0, 2 * math.pi, 8, endpoint=False):
        _draw_vessel(draw, disc, start + random.uniform(-0.3, 0.3), random.uniform(2.5, 4.5), random)
    return _opacity(canvas.resize((SIDE, SIDE), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(0.6)))


def _draw_vessel(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], angle: float, width: float, random: Random
) -> None:
    """A winding line on the double-sized canvas that thins out and, while it is wide, branches."""
    while width > 0.8:
        ahead = place[0] + 7 * math.cos(angle), place[1] + 7 * math.sin(angle)
        draw.line([2 * place[0], 2 * place[1], 2 * ahead[0], 2 * ahead[1]], fill=255, width=max(1, round(2 * width)))
        place, angle, width = ahead, angle + random.normal(0, 0.16), width * 0.965
        if width > 1.3 and random.random() < 0.12:
            turn = random.choice([-1, 1]) * random.uniform(0.4, 0.8)
            _draw_vessel(draw, place, angle + turn, width * 0.7, random)


def _exudates(disc: tuple[float, float], random: Random) -> tuple[npt.NDArray[np.bool_], Picture]:
    """Where the exudates are, sharp, and how opaque they look: blurred, large ones more than small ones."""
    lesion, opacity = np.zeros((SIDE, SIDE), bool), np.zeros((SIDE, SIDE), np.float32)
    clusters = [_place(random) for _ in range(random.integers(1, 4))]
    for blur, low, high, most in ((0.5, 1, 4, 50), (1.2, 4, 10, 24), (2.5, 10, LARGEST, 7)):
        layer = Image.new("L", (SIDE, SIDE))
        for _ in range(random.integers(most // 4, most + 1)):
            centre = clusters[random.integers(len(clusters))]
            centre = centre[0] + random.normal(0, SIDE * 0.07), centre[1] + random.normal(0, SIDE * 0.07)
            if math.dist(centre, disc) > SIDE * 0.1 + high / 2 and _inside(centre, high):
                _draw_exudate(ImageDraw.Draw(layer), centre, math.exp(random.uniform(*np.log((low, high)))), random)
        lesion |= np.asarray(layer) > 0
        opacity = np.maximum(opacity, _opacity(layer.filter(ImageFilter.GaussianBlur(blur))))
    return lesion, opacity


def _draw_exudate(draw: ImageDraw.ImageDraw, centre: tuple[float, float], across: float, random: Random) -> None:
    """An irregular polygon, at most across pixels wide and at least one."""
    opacity = int(random.integers(150, 256))
    angles = np.linspace(0, 2 * math.pi, 12, endpoint=False)
    radii = (across - 1) / 2 * random.uniform(0.6, 1, len(angles))
    corners = zip(centre[0] + radii * np.cos(angles), centre[1] + radii * np.sin(angles), strict=True)
    draw.polygon([(round(x), round(y)) for x, y in corners], fill=opacity, outline=opacity)


def _place(random: Random) -> tuple[float, float]:
    """A random place on the retina, away from its rim."""
    radius, angle = SIDE * 0.4 * math.sqrt(random.random()), random.uniform(0, 2 * math.pi)
    return SIDE / 2 + radius * math.cos(angle), SIDE / 2 + radius * math.sin(angle)


def _inside(place: tuple[float, float], across: float) -> bool:
    return math.dist(place, (SIDE / 2, SIDE / 2)) < SIDE * 0.47 - across / 2


def _spot(centre: tuple[float, float], radius: float, softness: float) -> Picture:
    """1 inside the circle, 0 outside, with an edge that is softness pixels wide to either side."""
    return np.asarray(1 / (1 + np.exp(np.clip((_distance(centre) - radius) / (softness / 2), -30, 30))), np.float32)


def _distance(centre: tuple[float, float]) -> Picture:
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.asarray(np.hypot(x - centre[0], y - centre[1]), np.float32)


def _opacity(canvas: Image.Image) -> Picture:
    return np.asarray(np.asarray(canvas) / 255, np.float32)


def _painted(picture: Picture, colour: tuple[int, int, int], opacity: Picture, strength: float) -> Picture:
    cover = (strength * opacity)[..., None]
    return np.asarray(picture * (1 - cover) + np.array(colour) * cover, np.float32)
