"""Draw the built-in sample data set: 24 kinds of flower, 40 pictures each, in torchvision's layout of Oxford Flowers 102.

    python -m flowers.sample --root data/sample

960 JPEGs of 160 x 160 pixels in about 15 seconds, no download, the same bytes each time on one machine. The kinds differ in form
(petal number and shape, centre, how heads are arranged); colours and backgrounds are shared between them on purpose, so that a
model has to look at structure and a colour histogram is not enough.

How a picture is made: a *sprite* is a premultiplied RGBA image of the square [-1.2, 1.2]^2 (y up). A petal is a sprite from
(0, -1) to (0, 1); petals, discs and stamens are stamped on one another into a head; heads, stems and leaves into a scene.
"""
import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from scipy.io import loadmat, savemat
from tqdm import tqdm

VERSION = 1  # raise it when the pictures change: older samples are then drawn anew
SEED = 102
PER_SPLIT = {"trnid": 10, "valid": 10, "tstid": 20}  # images of each kind
MARKER = "sample.json"  # only a folder that holds it is ever replaced
SPAN = 1.2  # half the side of a sprite, so that there is room for soft edges and shadows
OVER = 1.5  # drawn this much larger, then averaged down: smooth edges

RGB = {
    "white": (246, 244, 240), "cream": (247, 236, 200), "yellow": (250, 220, 45), "gold": (246, 180, 20), "orange": (240, 125, 25),
    "scarlet": (226, 58, 30), "red": (200, 22, 35), "crimson": (140, 10, 45), "pink": (243, 160, 195), "rose": (228, 85, 140),
    "magenta": (196, 45, 150), "lilac": (196, 160, 228), "violet": (135, 75, 195), "purple": (88, 30, 128), "blue": (75, 95, 210),
    "sky": (140, 170, 238), "navy": (38, 38, 110), "lime": (180, 205, 90), "green": (75, 130, 50), "leaf": (50, 95, 42),
    "brown": (92, 56, 26), "black": (32, 20, 22),
}
# Petal outline: half-width u^a (1-u)^b at distance u from the base; depth of a notch at the tip; number and depth of tip teeth.
SHAPES = {
    "oval": (0.6, 0.5, 0.0, 0, 0.0), "spear": (0.6, 0.95, 0.0, 0, 0.0), "strap": (0.35, 0.22, 0.07, 0, 0.0), "round": (0.75, 0.3, 0.06, 0, 0.0),
    "fan": (0.85, 0.16, 0.0, 2.5, 0.05), "heart": (0.9, 0.36, 0.3, 0, 0.0), "bell": (0.42, 0.02, 0.0, 2.5, 0.12), "drop": (0.9, 0.45, 0.0, 0, 0.0),
}


class Petals(NamedTuple):
    angles: int | tuple[float, ...]  # a number makes an even ring; else degrees, clockwise from the top
    shape: str
    length: float
    width: float
    start: float = 0.0  # distance of the base from the point `at`
    paint: int | str = 0  # which of the picture's paints, or one of its own: "base body tip"
    pattern: str = ""  # veins, spots, check, or stripe (the base colour runs up the middle)
    at: tuple[float, float] = (0.0, 0.0)


class Disc(NamedTuple):
    radius: float
    paint: str  # "rim middle"
    florets: int = 0
    squash: float = 1.0
    at: tuple[float, float] = (0.0, 0.0)


class Stamens(NamedTuple):
    count: int
    length: float
    paint: str  # "filament anther"
    at: tuple[float, float] = (0.0, 0.0)


class Kind(NamedTuple):
    layout: str
    size: float  # radius of a head, in parts of the picture's side
    turns: bool  # seen from the front, so any rotation will do
    paints: tuple[str, ...]  # one is picked for a picture: "base body tip", more than one paint divided by "|"
    parts: tuple[Petals | Disc | Stamens, ...]  # from back to front


def fan(first: float, last: float, count: int) -> tuple[float, ...]:
    """`count` angles, ordered from the outside in, so that the middle petals lie in front."""
    return tuple(sorted(np.linspace(first, last, count).tolist(), key=lambda a: -abs(a - (first + last) / 2)))


KINDS = {
    "sunflower": Kind("single", 0.40, True, ("gold yellow yellow", "orange gold yellow", "crimson orange gold", "yellow cream cream"), (
        Petals(17, "spear", 0.62, 0.27, 0.38), Petals(17, "spear", 0.54, 0.25, 0.38), Disc(0.52, "black brown", 170))),
    "oxeye daisy": Kind("group", 0.26, True, ("cream white white", "lilac white white", "yellow white white"), (
        Petals(19, "strap", 0.76, 0.19, 0.22), Disc(0.29, "orange yellow", 50))),
    "purple coneflower": Kind("single", 0.38, False, ("rose pink pink", "purple magenta rose", "lime white cream", "magenta violet lilac"), (
        Petals(fan(100, 260, 11), "strap", 0.95, 0.27, 0.12, at=(0, 0.35)), Disc(0.42, "brown orange", 90, 0.85, (0, 0.42)))),
    "rose": Kind("single", 0.36, True, ("crimson red red", "rose pink pink", "gold yellow cream", "lime white white", "red orange orange"), (
        Petals(5, "round", 0.82, 1.1, 0.16), Petals(5, "round", 0.7, 0.95, 0.08), Petals(5, "round", 0.56, 0.75, 0.04),
        Petals(4, "round", 0.42, 0.6), Petals(3, "round", 0.29, 0.42), Petals(2, "round", 0.17, 0.26))),
    "tiger lily": Kind("single", 0.44, True, ("yellow orange orange", "orange scarlet orange", "lime yellow yellow", "white pink white"), (
        Petals(3, "spear", 1.0, 0.42, 0, 0, "spots"), Petals(3, "spear", 1.0, 0.36, 0, 0, "spots"), Stamens(6, 0.55, "lime brown"))),
    "water lily": Kind("float", 0.34, False, ("cream white white", "rose pink white", "magenta rose pink", "gold yellow cream"), (
        Petals(fan(-96, 96, 9), "spear", 1.15, 0.4, 0, at=(0, -0.35)), Petals(fan(-72, 72, 8), "spear", 0.95, 0.36, 0, at=(0, -0.35)),
        Petals(fan(-50, 50, 5), "spear", 0.72, 0.34, 0, at=(0, -0.38)), Stamens(24, 0.3, "gold yellow", (0, -0.2)),
        Petals(fan(115, 245, 5), "spear", 0.5, 0.36, 0, at=(0, -0.3)))),
    "daffodil": Kind("single", 0.40, True, ("gold yellow yellow|orange gold yellow", "lime white white|gold yellow orange",
                                            "cream cream white|orange orange scarlet", "gold yellow cream|lime white pink"), (
        Petals(3, "oval", 1.0, 0.66), Petals(3, "oval", 0.97, 0.6), Petals(11, "round", 0.46, 0.25, 0, 1), Disc(0.3, "orange brown"),
        Stamens(6, 0.14, "gold yellow"))),
    "grape hyacinth": Kind("spike", 0.062, False, ("navy blue sky", "purple violet lilac", "sky sky white", "lilac white white"), (
        Petals((180,), "oval", 2.1, 2.0, -1.0), Disc(0.32, "white cream", 0, 0.5, (0, -0.85)))),
    "foxglove": Kind("raceme", 0.135, False, ("purple magenta rose", "rose pink pink", "cream white white", "purple violet lilac"), (
        Petals((180,), "bell", 1.9, 1.3, -1.0), Disc(0.66, "tip tip", 0, 0.62, (0, -0.76)), Disc(0.46, "white base", 12, 0.58, (0, -0.8)))),
    "wild pansy": Kind("single", 0.38, False, ("purple violet violet|yellow yellow lilac", "navy purple purple|gold yellow yellow",
                                                 "lilac white lilac|yellow white white", "gold yellow cream|orange gold yellow",
                                                 "crimson crimson red|yellow gold red"), (
        Petals((-30, 30), "round", 1.0, 1.0), Petals((-98, 98), "round", 0.92, 0.85, 0, 1, "veins"),
        Petals((180,), "fan", 0.98, 1.25, 0, 1, "veins"), Disc(0.1, "orange lime"))),
    "corn poppy": Kind("single", 0.40, True, ("black scarlet scarlet", "black red red", "black rose pink", "white orange orange", "black white pink"), (
        Petals(2, "round", 1.0, 1.75, 0, 0, "veins"), Petals(2, "round", 0.95, 1.6, 0, 0, "veins"), Stamens(30, 0.36, "black purple"),
        Disc(0.15, "green lime", 9))),
    "passion flower": Kind("single", 0.42, True, ("lime white white", "lime lilac lilac", "purple rose pink", "crimson red red"), (
        Petals(5, "oval", 1.0, 0.42), Petals(5, "oval", 0.96, 0.38), Stamens(70, 0.66, "violet sky"), Stamens(50, 0.4, "white purple"),
        Disc(0.17, "purple lime"), Petals(5, "strap", 0.42, 0.15, 0.05, "lime lime yellow"), Petals(3, "drop", 0.3, 0.12, 0, "purple purple black"))),
    "canterbury bells": Kind("bells", 0.19, False, ("purple violet violet", "violet lilac lilac", "rose pink pink", "cream white white", "navy blue sky"), (
        Petals((0,), "bell", 1.55, 1.5, -0.9), Petals(fan(-75, 75, 5), "drop", 0.55, 0.6, 0, at=(0, 0.35)),
        Disc(0.54, "tip base", 0, 0.5, (0, 0.52)), Petals(fan(125, 235, 3), "drop", 0.45, 0.62, at=(0, 0.42)))),
    "morning glory": Kind("single", 0.38, True, ("white blue blue", "white violet purple", "white rose magenta", "cream sky blue", "white red red"), (
        Petals(5, "fan", 1.0, 1.42, 0, 0, "stripe"), Disc(0.2, "white cream"), Disc(0.07, "lime yellow"))),
    "magnolia": Kind("branch", 0.36, False, ("magenta pink white", "purple rose pink", "cream white white", "lime cream yellow"), (
        Petals(fan(-42, 42, 4), "oval", 1.75, 0.8, 0, at=(0, -0.9)), Petals((-20, 24), "oval", 1.6, 0.85, 0, at=(0, -0.92)),
        Petals((2,), "oval", 1.35, 0.85, 0, at=(0, -0.95)))),
    "fritillary": Kind("nod", 0.35, False, ("crimson crimson rose", "purple purple magenta", "lime white cream", "brown crimson red"), (
        Petals((160, 200), "oval", 1.75, 0.95, 0, 0, "check", (0, 0.9)), Petals((180,), "oval", 1.75, 1.0, 0, 0, "check", (0, 0.92)))),
    "globe thistle": Kind("group", 0.24, True, ("navy blue sky", "purple violet lilac", "green sky white", "green lime white"), (
        Petals(30, "spear", 0.42, 0.13, 0.58), Petals(28, "spear", 0.42, 0.14, 0.45), Petals(24, "spear", 0.4, 0.14, 0.3),
        Petals(17, "spear", 0.36, 0.14, 0.16), Petals(9, "spear", 0.3, 0.14, 0.02))),
    "bearded iris": Kind("single", 0.40, False, ("gold violet violet|gold purple purple", "gold lilac lilac|orange violet violet",
                                                 "gold yellow cream|orange gold yellow", "gold white white|gold sky blue",
                                                 "gold pink pink|orange crimson crimson"), (
        Petals((-38, 38, 0), "round", 1.05, 0.8, 0), Petals((-118, 118), "round", 0.98, 0.58, 0.02, 1, "stripe"),
        Petals((180,), "round", 1.05, 0.85, -0.05, 1, "stripe"))),
    "bird of paradise": Kind("single", 0.43, False, ("red orange gold|navy blue blue", "gold orange orange|purple violet blue",
                                                     "lime yellow gold|blue sky white", "pink white cream|navy sky blue"), (
        Petals((-24, 4, 30, 52), "spear", 1.25, 0.32, 0, 0, "", (-0.35, -0.25)), Petals((66,), "spear", 1.2, 0.2, 0, 1, "", (-0.3, -0.25)),
        Petals((96,), "spear", 1.95, 0.36, 0, "green green crimson", "", (-0.9, -0.3)))),
    "anthurium": Kind("single", 0.40, False, ("red red scarlet", "crimson red red", "rose pink pink", "white white white", "orange scarlet scarlet"), (
        Petals((0,), "heart", 1.95, 1.85, -1.0, 0, "veins"), Petals((24,), "strap", 1.0, 0.24, 0, "cream yellow gold", "", (-0.1, 0.05)))),
    "hibiscus": Kind("single", 0.41, True, ("crimson red red", "crimson pink pink", "red yellow yellow", "crimson white white", "red orange gold"), (
        Petals(5, "round", 1.0, 1.12, 0, 0, "veins"), Petals((40,), "strap", 0.85, 0.13, 0, "red pink yellow"),
        Stamens(16, 0.15, "cream gold", (0.4, 0.48)), Stamens(12, 0.14, "cream gold", (0.5, 0.6)))),
    "garden phlox": Kind("umbel", 0.115, True, ("magenta pink pink", "rose white white", "purple magenta rose", "violet lilac lilac", "red scarlet scarlet"), (
        Petals(5, "round", 1.0, 0.92), Disc(0.1, "white yellow"))),
    "cyclamen": Kind("nodding", 0.24, False, ("crimson rose pink", "magenta pink white", "magenta white white", "crimson red scarlet", "purple violet lilac"), (
        Petals(fan(-58, 58, 5), "oval", 1.5, 0.62, 0, at=(0, -0.6)), Disc(0.34, "purple crimson", 0, 0.55, (0, -0.66)))),
    "moon orchid": Kind("arch", 0.22, False, ("lilac white white|gold yellow white", "magenta pink white|crimson magenta rose",
                                                "purple magenta rose|crimson crimson gold", "lime yellow cream|red crimson crimson"), (
        Petals((0, 132, 228), "oval", 0.98, 0.56), Petals((-84, 84), "round", 1.0, 1.25, 0, 0, "veins"),
        Petals((180,), "fan", 0.5, 0.42, 0, 1), Disc(0.12, "gold white"))),
}


def smooth(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 below `low`, 1 above `high`, and an S-curve between them."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def clouds(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[float, ...]) -> np.ndarray:
    """Soft noise in about [-1, 1]: random grids of `cells` points along the longer side, each half as strong as the one before."""
    total = np.zeros(shape, np.float32)
    for octave, n in enumerate(cells):
        grid = rng.uniform(-1, 1, [max(2, round(n * s / max(shape))) for s in shape]).astype(np.float32)
        total += cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC) * 0.5**octave
    return total


def mix_paints(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The colour table of one picture: every hue, saturation and brightness is a little off, as between plants of one kind."""
    table = np.array([list(RGB.values())], np.float32) / 255
    hsv = cv2.cvtColor(table, cv2.COLOR_RGB2HSV)
    n = len(RGB)
    hsv[0, :, 0] = (hsv[0, :, 0] + rng.normal(0, 6, n)) % 360
    hsv[0, :, 1:] *= rng.uniform((0.75, 0.82), (1.15, 1.08), (n, 2))
    mixed = cv2.cvtColor(np.clip(hsv, 0, (360, 1, 1)).astype(np.float32), cv2.COLOR_HSV2RGB)[0]
    return dict(zip(RGB, mixed))


def petal(shape: str, paint: list[np.ndarray], pattern: str, rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Sprite of one petal with colour from base to tip, veins, a crease, curled edges and the shadow it throws."""
    v, y = np.meshgrid(np.linspace(-SPAN, SPAN, pixels, dtype=np.float32), np.linspace(SPAN, -SPAN, pixels, dtype=np.float32))
    a, b, notch, teeth, depth = SHAPES[shape]
    reach = 1 - notch * np.exp(-((v / 0.35) ** 2)) - depth * np.abs(np.sin(np.pi * teeth * v * 0.8 + 0.5 * np.pi * teeth))
    u = (y + 1) / 2 / reach
    inside = np.clip(u, 1e-4, 1 - 1e-4)
    half = inside**a * (1 - inside) ** b / ((a / (a + b)) ** a * (b / (a + b)) ** b)
    half *= 1 + 0.05 * np.sin(inside * rng.uniform(6, 14) + rng.uniform(0, 6))
    edge = np.minimum(half - np.abs(v), (1 - np.abs(2 * u - 1)) * 2)
    alpha = cv2.GaussianBlur(np.clip(edge * pixels / 4 + 0.5, 0, 1), (3, 3), 0)
    across = v / (half + 0.05)
    noise = clouds(rng, u.shape, (4, 9))
    base, body, tip = paint
    body_part, tip_part = smooth(0.05, 0.42, u + 0.06 * noise), smooth(0.6, 1.0, u + 0.06 * noise)
    if pattern == "stripe":
        body_part = body_part * (1 - 0.9 * np.exp(-((v / 0.16) ** 2)) * (1 - smooth(0.6, 0.95, u)))
    colour = base + (body - base) * body_part[..., None] + (tip - body) * tip_part[..., None]
    light = 0.72 + 0.3 * smooth(0, 0.45, u) - 0.2 * across**2 - 0.1 * np.exp(-((v / 0.07) ** 2)) + 0.05 * noise
    light += 0.04 * np.sin(across * 14 + noise)
    if pattern == "veins":
        light -= 0.2 * smooth(0.75, 1, np.abs(np.sin(across * 7 + 0.4 * noise))) * (1 - smooth(0.35, 0.95, u))
    elif pattern == "check":
        light += 0.26 * np.sign(np.sin(u * 22 + noise) * np.sin(across * 7))
    elif pattern == "spots":
        for x0, u0 in rng.uniform((-0.6, 0.12), (0.6, 0.72), (22, 2)):
            light -= 0.7 * (((v - x0) / 0.11) ** 2 + ((u - u0) / 0.025) ** 2 < 1)
    shadow = 0.5 * cv2.GaussianBlur(alpha, (0, 0), pixels * 0.045)
    return np.dstack([np.clip(colour * light[..., None], 0, 1) * alpha[..., None], alpha + (1 - alpha) * shadow]).astype(np.float32)


def stamp(canvas: np.ndarray, sprite: np.ndarray, x: float, y: float, half: tuple[float, float], angle: float, gain: float = 1.0) -> None:
    """Lay a sprite over the canvas (H, W, 4), centred on pixel (x, y), `half` its half width and height, turned clockwise."""
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn = np.array([[half[0] * cos, half[1] * sin], [half[0] * sin, -half[1] * cos]])  # sprite's (right, up) -> canvas (x, y)
    reach = SPAN * np.abs(turn).sum(1)
    left, top = np.maximum(np.floor((x, y) - reach), 0).astype(int)
    right, bottom = np.minimum(np.ceil((x, y) + reach), canvas.shape[1::-1]).astype(int)
    if right <= left or bottom <= top:
        return
    step = 2 * SPAN / (len(sprite) - 1)
    matrix = np.column_stack([turn * (step, -step), turn @ (-SPAN, SPAN) + (x - left, y - top)])
    patch = cv2.warpAffine(sprite, matrix, (int(right - left), int(bottom - top)), flags=cv2.INTER_LINEAR)
    region = canvas[top:bottom, left:right]
    region *= cv2.merge([1 - patch[..., 3]] * 4)  # one flat product: broadcasting over 4 channels is 5 times slower
    region += cv2.transform(patch, np.diag((gain, gain, gain, 1.0)))


def draw_head(kind: Kind, paints: list[str], table: dict[str, np.ndarray], rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Sprite of one flower head of radius 1."""
    canvas = np.zeros((pixels, pixels, 4), np.float32)
    unit, phase, sun = pixels / (2 * SPAN), rng.uniform(0, 360), rng.uniform(0, 360)
    look = [[table[name] for name in text.split()] for text in paints]
    table = table | dict(zip(("base", "body", "tip"), look[0]))
    for order, part in enumerate(kind.parts):
        x, y = pixels / 2 + part.at[0] * unit, pixels / 2 - part.at[1] * unit
        if isinstance(part, Petals):
            paint = look[part.paint] if isinstance(part.paint, int) else [table[name] for name in part.paint.split()]
            sprite = petal(part.shape, paint, part.pattern, rng, int(np.clip(1.3 * part.length * unit, 24, 120)))
            ring = isinstance(part.angles, int)  # each second ring stands in the gaps of the one before
            angles = phase + (np.arange(part.angles) + order % 2 / 2) * 360 / part.angles if ring else part.angles
            for angle in angles + rng.normal(0, 3 if len(angles) < 12 else 5, len(angles)):
                length, width = part.length * rng.normal(1, 0.04), part.width * rng.normal(1, 0.05)
                far, turn = (part.start + length / 2) * unit, np.radians(angle)
                half = (width / 2 * unit * rng.choice((-1, 1)), length / 2 * unit)
                gain = 1 + 0.1 * np.cos(turn - sun) + rng.normal(0, 0.03)
                stamp(canvas, sprite, x + far * np.sin(turn), y - far * np.cos(turn), half, angle, gain)
        elif isinstance(part, Disc):
            stamp(canvas, disc(part, table, rng), x, y, (part.radius * unit, part.radius * part.squash * unit), 0)
        else:
            filament, anther = ((*table[name].tolist(), 1.0) for name in part.paint.split())
            for angle in np.radians(phase + np.arange(part.count) * 360 / part.count + rng.normal(0, 4, part.count)):
                far = part.length * unit * rng.uniform(0.82, 1.05)
                end = (round(x + far * np.sin(angle)), round(y - far * np.cos(angle)))
                cv2.line(canvas, (round(x), round(y)), end, filament, max(1, round(0.022 * unit)))
                cv2.circle(canvas, end, max(1, round((0.055 if part.count < 10 else 0.03) * unit)), anther, -1)
    return canvas


def disc(part: Disc, table: dict[str, np.ndarray], rng: np.random.Generator, pixels: int = 96) -> np.ndarray:
    """Sprite of a domed centre, with florets in the spiral of a sunflower."""
    x, y = np.meshgrid(np.linspace(-SPAN, SPAN, pixels, dtype=np.float32), np.linspace(SPAN, -SPAN, pixels, dtype=np.float32))
    r = np.hypot(x, y)
    rim, middle = (table[name] for name in part.paint.split())
    colour = middle + (rim - middle) * smooth(0.2, 0.95, r + 0.1 * clouds(rng, r.shape, (7,)))[..., None]
    for i in np.arange(part.florets) + 0.5:
        far, turn = np.sqrt(i / part.florets) * 0.95, i * 2.39996  # the golden angle
        spot = (round((far * np.sin(turn) / SPAN + 1) * pixels / 2), round((far * np.cos(turn) / SPAN + 1) * pixels / 2))
        cv2.circle(colour, spot, 2, (middle + (rim - middle) * far * 0.8).tolist() if i % 2 else (rim * 0.6 + middle * 0.1).tolist(), -1)
    light = 1.05 - 0.35 * r**2 + 0.15 * (y - x) * (part.florets > 0)
    alpha = np.clip((1 - r) * pixels / 4 + 0.5, 0, 1)
    shadow = 0.5 * (1 - smooth(0.9, 1.25, r))
    return np.dstack([np.clip(colour * light[..., None], 0, 1) * alpha[..., None], alpha + (1 - alpha) * shadow]).astype(np.float32)


def background(rng: np.random.Generator, table: dict[str, np.ndarray], side: int) -> np.ndarray:
    """Blurred foliage, grass, soil, sky, water, bokeh or a dark studio, (side, side, 3) in [0, 1]."""
    place = rng.choice(["foliage", "foliage", "grass", "grass", "soil", "sky", "bokeh", "dark"])
    noise = clouds(rng, (side, side), (4, 8, 16, 40))[..., None]
    down = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    leaf, green = table["leaf"], table["green"]
    if place == "sky":
        return np.clip(table["sky"] * 0.95 + (0.35 * down + 0.22 * np.maximum(noise, 0)), 0, 1)
    if place == "soil":
        return np.clip(table["brown"] * (0.9 + 0.45 * noise) + 0.08, 0, 1)
    if place == "dark":
        return np.clip(leaf * (0.25 + 0.12 * noise) + 0.02, 0, 1)
    scene = np.clip(leaf * (0.8 + 0.5 * noise), 0, 1).astype(np.float32)
    for _ in range(90 if place == "grass" else 45):
        x, y, long = rng.uniform(0, side, 2).tolist() + [side * rng.uniform(0.08, 0.2)]
        shade = ((leaf + (green - leaf) * rng.uniform(-0.4, 1.6)) * rng.uniform(0.6, 1.2)).tolist()
        if place == "grass":
            cv2.line(scene, (int(x), int(y + 3 * long)), (int(x + rng.normal(0, long)), int(y - long)), shade, int(rng.integers(1, 4)))
        elif place == "foliage":
            cv2.ellipse(scene, (int(x), int(y)), (int(long), int(long * 0.45)), rng.uniform(0, 360), 0, 360, shade, -1)
        elif rng.random() < 0.5:
            tint = table[rng.choice(list(RGB)[:18])] * 0.5 if rng.random() < 0.4 else np.array(shade) * 1.2
            cv2.circle(scene, (int(x), int(y)), int(long * 0.6), tint.tolist(), -1)
    return cv2.GaussianBlur(scene, (0, 0), side * rng.uniform(*((0.008, 0.02) if place != "bokeh" else (0.02, 0.03))))


def arrange(layout: str, rng: np.random.Generator) -> list[tuple[float, float, float, float]]:
    """Where the heads are, from back to front: x, y (0 to 1, y down), relative size, angle clockwise."""
    if layout == "group":
        n = rng.choice((2, 3))
        spots = [(0.3, 0.33), (0.7, 0.42), (0.42, 0.74)] if n == 3 else [(0.32, 0.35), (0.66, 0.62)]
        return [(x, y, (1.0 if n == 3 else 1.15) * rng.uniform(0.88, 1.08), 0) for x, y in spots]
    if layout == "nodding":
        return [(x, y, rng.uniform(0.85, 1.1), rng.normal(0, 10)) for x, y in ((0.3, 0.36), (0.7, 0.5), (0.48, 0.7))[: rng.choice((2, 3))]]
    if layout == "spike":
        return [(0.5 + (0.05 + 0.13 * t) * np.sin(k * 1.9 + 9 * t), 0.1 + 0.62 * t + rng.normal(0, 0.008), 0.7 + 0.5 * t,
                 -25 * np.sin(k * 1.9 + 9 * t)) for t in np.linspace(0, 1, 11) for k in range(5)]
    if layout == "raceme":
        return [(0.5 + side * (0.03 + 0.1 * t), 0.08 + 0.72 * t + 0.05 * side, 0.35 + 0.75 * t, -side * (48 - 8 * t))
                for t in np.linspace(0, 1, 6) for side in (-1, 1, 0)[: 2 + (t > 0.3)]]
    if layout == "bells":
        return [(0.5, 0.25, 0.9, 0), (0.27, 0.45, 1, -48), (0.73, 0.42, 1, 48), (0.36, 0.72, 1.1, -28), (0.68, 0.7, 1.1, 36)]
    if layout == "umbel":
        ring = [(0.27, n, np.pi * 2 * k / n) for n in (9,) for k in range(n)] + [(0.13, 5, np.pi * 2 * k / 5) for k in range(5)]
        return [(0.5 + 1.1 * r * np.cos(a) + rng.normal(0, 0.015), 0.44 + 0.9 * r * np.sin(a), 1.0, 0) for r, n, a in ring] + [(0.5, 0.42, 1.05, 0)]
    if layout == "arch":
        return [(0.25, 0.32, 0.85, -8), (0.52, 0.25, 0.8, 0), (0.76, 0.45, 0.95, 6), (0.46, 0.64, 1.1, 4)]
    return [(0.5, {"float": 0.5, "nod": 0.52, "branch": 0.45}.get(layout, 0.46), 1.0, 0)]


def curve(canvas: np.ndarray, points: list[tuple[float, float]], width: float, colour: np.ndarray) -> None:
    """A stem along a Bezier curve through three control points (0 to 1), lit from the left."""
    t = np.linspace(0, 1, 24)[:, None]
    a, b, c = np.array(points) * len(canvas)
    path = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
    for shift, part, shade in ((0, 1, 0.55), (-0.12, 0.7, 0.85), (-0.2, 0.3, 1.1)):
        line = np.round(path + (shift * width * len(canvas), 0)).astype(np.int32)
        cv2.polylines(canvas, [line], False, (*(colour * shade).tolist(), 1.0), max(1, round(part * width * len(canvas))))


def draw_plant(scene: np.ndarray, kind: Kind, heads: list[tuple[float, float, float, float]], table: dict[str, np.ndarray],
               rng: np.random.Generator) -> None:
    """Stems, leaves, branch or lily pads, behind the heads."""
    side, foot = len(scene), 0.5 + rng.normal(0, 0.1)
    leaf = petal("oval", [table["leaf"], table["green"], table["green"]], "veins", rng, 96)
    if kind.layout == "float":
        scene[..., :3] = cv2.GaussianBlur(scene, (0, 0), sigmaX=side * 0.06, sigmaY=side * 0.012)[..., :3] * 0.5 + table["navy"] * rng.uniform(0.2, 0.7)
        for x, y in ((0.15, 0.72), (0.85, 0.66), (0.5, 0.82)) + rng.normal(0, 0.05, (3, 2)):
            stamp(scene, disc(Disc(1, "leaf green"), table, rng), x * side, y * side, (0.3 * side, 0.12 * side), 0)
        return
    if kind.layout == "branch":
        curve(scene, [(-0.1, 1.0), (0.4, 0.85), (0.52, 0.72)], 0.05, table["brown"])
        curve(scene, [(0.4, 0.87), (0.7, 0.8), (1.1, 0.85)], 0.035, table["brown"])
        return
    if kind.layout == "nod":
        curve(scene, [(0.78 + foot - 0.5, 1.1), (0.8, -0.1), (0.5, 0.2)], 0.022, table["green"])
    elif kind.layout in ("spike", "raceme", "bells", "umbel"):
        curve(scene, [(foot, 1.1), (0.5, 0.9), (0.5, 0.5)], 0.03, table["green"])
        curve(scene, [(0.5, 0.6), (0.5, 0.3), (0.5, 0.1 if kind.layout in ("spike", "raceme") else 0.3)], 0.025, table["green"])
    elif kind.layout == "arch":
        curve(scene, [(foot - 0.2, 1.1), (-0.1, 0.0), (0.5, 0.18)], 0.02, table["green"])
        curve(scene, [(0.3, 0.17), (0.7, 0.1), (0.9, 0.6)], 0.015, table["green"])
    else:
        for x, y, _, _ in heads:
            curve(scene, [(foot + 0.4 * (x - 0.5), 1.1), (x, 0.9), (x, y)], 0.028, table["green"])
    for turn in rng.permutation((-62, 58, -28, 34))[: rng.integers(1, 4)]:
        x, y, long = foot + 0.16 * np.sin(np.radians(turn)), 0.93, rng.uniform(0.16, 0.24)
        stamp(scene, leaf, x * side, y * side, (0.35 * long * side, long * side), turn + rng.normal(0, 8), rng.uniform(0.75, 1.1))


def draw_flower(kind: str, rng: np.random.Generator, size: int = 160) -> np.ndarray:
    """One picture of a kind in KINDS, uint8 RGB (size, size, 3), drawn larger and shrunk."""
    spec, table, side = KINDS[kind], mix_paints(rng), round(OVER * size)
    paints = str(rng.choice(spec.paints)).split("|")
    scene = cv2.resize(background(rng, table, 128), (side, side), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    scene = np.dstack([scene, np.ones((side, side), np.float32)])
    heads = arrange(spec.layout, rng)
    draw_plant(scene, spec, heads, table, rng)
    zoom = rng.uniform(0.85, 1.1)
    pixels = int(np.clip(2 * SPAN * spec.size * zoom * side, 40, 320))
    sprites = [draw_head(spec, paints, table, rng, pixels) for _ in range(min(len(heads), 3))]
    mirror = rng.choice((-1, 1))
    for i, (x, y, scale, angle) in enumerate(heads):
        radius = spec.size * scale * zoom * side * rng.normal(1, 0.03)
        squash = rng.uniform(0.78, 1.0) if spec.turns else rng.uniform(0.92, 1.06)
        angle = rng.uniform(0, 360) if spec.turns else angle + rng.normal(0, 5)
        stamp(scene, sprites[i % len(sprites)], x * side, y * side, (radius * squash * mirror, radius), angle, rng.normal(1, 0.04))
    # the camera: a small turn, shift and slant, then light and its colour, a soft lens and a noisy sensor
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], np.float32) - 0.5
    turn = np.radians(rng.normal(0, 6))
    seen = corners @ np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))]) + rng.normal(0, 0.03, 2) + rng.normal(0, 0.02, (4, 2))
    lens = cv2.getPerspectiveTransform(((corners + 0.5) * side).astype(np.float32), ((seen + 0.5) * side).astype(np.float32))
    scene = cv2.warpPerspective(scene, lens, (side, side), borderMode=cv2.BORDER_REFLECT)
    photo = cv2.resize(scene, (size, size), interpolation=cv2.INTER_AREA)[..., :3]
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    slope = rng.normal(0, 0.1, 2)
    warmth = rng.normal(0, 0.06)
    photo = np.clip(photo, 0, 1) ** rng.uniform(0.8, 1.2) * rng.uniform(0.88, 1.2) * (1 + warmth, 1 + rng.normal(0, 0.02), 1 - warmth)
    photo *= (1 + slope[0] * ramp[:, None] + slope[1] * ramp)[..., None]
    photo = cv2.GaussianBlur(photo, (0, 0), rng.uniform(0.25, 0.8)) + rng.normal(0, rng.uniform(0.004, 0.02), photo.shape)
    return np.clip(photo * 255 + 0.5, 0, 255).astype(np.uint8)


def complete(root: Path) -> bool:
    """Whether root holds a sample of this version with all its files whole."""
    try:
        marker = json.loads((root / MARKER).read_text())
        names = json.loads((root / "cat_to_name.json").read_text())
        labels, splits = loadmat(root / "imagelabels.mat")["labels"], loadmat(root / "setid.mat")
        ids = np.concatenate([splits[name][0] for name in PER_SPLIT])
        tails = [(root / "jpg" / f"image_{i:05d}.jpg").read_bytes()[-2:] for i in range(1, labels.size + 1)]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (marker == {"drawn_by": "flowers/sample.py", "version": VERSION} and list(names.values()) == list(KINDS)
            and sorted(ids) == list(range(1, len(KINDS) * sum(PER_SPLIT.values()) + 1)) and set(tails) == {b"\xff\xd9"})


def write_sample(root: str | Path = "data/sample") -> Path:
    """Draw the sample data set at `root` unless it is there, and return its path.

    Everything is drawn into a folder beside root that is renamed at the end, so root is never half-written. An incomplete or older
    sample is replaced; FileExistsError if root holds anything else.
    """
    root = Path(root)
    for old in root.parent.glob(f".{root.name}.drawing-*"):
        if time.time() - max(p.stat().st_mtime for p in (old, *old.glob("jpg"))) > 60:  # its run was killed; a live one draws several a second
            shutil.rmtree(old, ignore_errors=True)
    if complete(root):
        return root
    if root.exists() and not (root.is_dir() and ((root / MARKER).exists() or not any(root.iterdir()))):
        raise FileExistsError(f"{root} is in the way: it is not a sample drawn by this program, so it is not replaced; give another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}.drawing-", dir=root.parent))
    try:
        draw_all(work)
        if not complete(root):  # another process may have been faster
            if root.exists():
                shutil.rmtree(root)
            os.replace(work, root)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return root


def draw_all(folder: Path) -> None:
    """Write the whole data set into an empty folder; the number of an image says nothing about its kind."""
    (folder / MARKER).write_text(json.dumps({"drawn_by": "flowers/sample.py", "version": VERSION}))
    (folder / "jpg").mkdir()
    splits = {name: [] for name in PER_SPLIT}
    labels, per_kind = np.zeros(len(KINDS) * sum(PER_SPLIT.values()), np.uint8), sum(PER_SPLIT.values())
    numbers = np.random.default_rng(SEED).permutation(len(labels)).reshape(len(KINDS), per_kind) + 1
    places = [name for name, count in PER_SPLIT.items() for _ in range(count)]
    for j in tqdm(range(labels.size), desc="drawing the sample", unit="img"):
        k, i = divmod(j, per_kind)
        number = numbers[k, i]
        photo = draw_flower(list(KINDS)[k], np.random.default_rng((SEED, k, i)))
        ok, jpeg = cv2.imencode(".jpg", photo[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 92))
        (folder / "jpg" / f"image_{number:05d}.jpg").write_bytes(jpeg.tobytes())
        labels[number - 1] = k + 1
        splits[places[i]].append(number)
    savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    savemat(folder / "setid.mat", {name: np.sort(ids)[None].astype(np.uint16) for name, ids in splits.items()})
    (folder / "cat_to_name.json").write_text(json.dumps({str(k + 1): name for k, name in enumerate(KINDS)}, indent=1))
