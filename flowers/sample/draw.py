"""Draw one flower of the sample dataset: 24 kinds that differ in form, while colours and backgrounds are shared between them.

A *sprite* is a premultiplied float32 RGBA image of the square [-1.2, 1.2]^2 (y up). A petal is a sprite from (0, -1) to (0, 1);
petals, discs and stamens are stamped on one another into a head; stems, leaves and heads into a scene, which is then photographed.
"""

from collections import namedtuple

import cv2
import numpy as np

SPAN = 1.2  # half the side of a sprite: beyond 1 there is room for soft edges and shadows
OVER = 1.25  # pictures are drawn this much larger, then averaged down

RGB = {
    "white": (246, 244, 240),
    "cream": (247, 236, 200),
    "yellow": (250, 220, 45),
    "gold": (246, 180, 20),
    "orange": (240, 125, 25),
    "scarlet": (226, 58, 30),
    "red": (200, 22, 35),
    "crimson": (140, 10, 45),
    "pink": (243, 160, 195),
    "rose": (228, 85, 140),
    "magenta": (196, 45, 150),
    "lilac": (196, 160, 228),
    "violet": (135, 75, 195),
    "purple": (88, 30, 128),
    "blue": (75, 95, 210),
    "sky": (140, 170, 238),
    "navy": (38, 38, 110),
    "lime": (180, 205, 90),
    "green": (75, 130, 50),
    "leaf": (50, 95, 42),
    "brown": (92, 56, 26),
    "black": (32, 20, 22),
}
# Petal outline: half-width u^a (1-u)^b at distance u from the base; depth of a notch at the tip; number and depth of teeth there.
SHAPES = {
    "oval": (0.6, 0.5, 0, 0, 0),
    "spear": (0.6, 0.95, 0, 0, 0),
    "drop": (0.9, 0.45, 0, 0, 0),
    "strap": (0.35, 0.22, 0.07, 0, 0),
    "round": (0.75, 0.3, 0.06, 0, 0),
    "heart": (0.9, 0.36, 0.3, 0, 0),
    "fan": (0.85, 0.16, 0, 2.5, 0.05),
    "bell": (0.42, 0.02, 0, 2.5, 0.12),
}
# What a head is made of, in units of its radius, y up. `at` is where the ring or fan has its centre.
# angles: a number makes an even ring, a tuple gives degrees, clockwise from the top; start: from the centre to the petals' base;
# paint: which of the picture's paints, or one of its own, "base body tip"; pattern: veins, spots, check, or stripe (up the middle).
Petals = namedtuple(
    "Petals", "angles shape length width start at paint pattern", defaults=(0.0, (0.0, 0.0), 0, "")
)
Disc = namedtuple(
    "Disc", "radius paint florets squash at", defaults=(0, 1.0, (0.0, 0.0))
)  # paint: "rim middle"
Stamens = namedtuple(
    "Stamens", "count length paint at", defaults=((0.0, 0.0),)
)  # paint: "filament anther"
# layout: how heads are arranged; size: a head's radius in parts of the picture's side; faces: seen from the front, at any slant;
# paints: "base body tip", one of several (divided by ",") is picked for a picture, "a|b" are two paints; parts: from back to front.
Kind = namedtuple("Kind", "layout size faces paints parts")
Rng, Table = np.random.Generator, dict[str, np.ndarray]


def fan(first: float, last: float, count: int) -> tuple[float, ...]:
    """`count` angles, ordered from the outside in, so that the middle petals lie in front."""
    return tuple(
        sorted(np.linspace(first, last, count).tolist(), key=lambda a: -abs(a - (first + last) / 2))
    )


KINDS = {
    "sunflower": Kind(
        "single",
        0.40,
        True,
        "gold yellow yellow,orange gold yellow,crimson orange gold",
        (
            Petals(17, "spear", 0.62, 0.27, 0.38),
            Petals(17, "spear", 0.54, 0.25, 0.38),
            Disc(0.52, "black brown", 170),
        ),
    ),
    "oxeye daisy": Kind(
        "group",
        0.26,
        True,
        "cream white white,yellow white white",
        (Petals(19, "strap", 0.76, 0.19, 0.22), Disc(0.29, "orange yellow", 50)),
    ),
    "purple coneflower": Kind(
        "single",
        0.38,
        False,
        "rose pink pink,purple magenta rose",
        (
            Petals(fan(100, 260, 11), "strap", 0.95, 0.27, 0.12, (0, 0.35)),
            Disc(0.42, "brown orange", 90, 0.85, (0, 0.42)),
        ),
    ),
    "rose": Kind(
        "single",
        0.43,
        True,
        "crimson red rose,rose pink white,orange gold cream",
        (
            Petals(5, "round", 0.84, 1.15, 0.12),
            Petals(4, "round", 0.72, 1.05, 0.06),
            Petals(4, "round", 0.56, 0.85, 0.02),
            Petals(3, "round", 0.42, 0.66),
            Petals(3, "round", 0.29, 0.42),
            Petals(2, "round", 0.18, 0.28),
        ),
    ),
    "tiger lily": Kind(
        "single",
        0.44,
        True,
        "yellow orange orange,orange scarlet orange,lime yellow yellow",
        (
            Petals(3, "spear", 1.0, 0.42, pattern="spots"),
            Petals(3, "spear", 1.0, 0.36, pattern="spots"),
            Stamens(6, 0.55, "lime brown"),
        ),
    ),
    "water lily": Kind(
        "float",
        0.34,
        False,
        "cream white white,rose pink white",
        (
            Petals(fan(-96, 96, 9), "spear", 1.15, 0.4, at=(0, -0.35)),
            Petals(fan(-72, 72, 8), "spear", 0.95, 0.36, at=(0, -0.35)),
            Petals(fan(-50, 50, 5), "spear", 0.72, 0.34, at=(0, -0.38)),
            Stamens(24, 0.3, "gold yellow", (0, -0.2)),
            Petals(fan(115, 245, 5), "spear", 0.5, 0.36, at=(0, -0.3)),
        ),
    ),
    "daffodil": Kind(
        "pair",
        0.30,
        True,
        "gold yellow yellow|orange gold yellow,cream white white|orange orange gold",
        (
            Petals(3, "oval", 1.0, 0.66),
            Petals(3, "oval", 0.97, 0.6),
            Petals(11, "round", 0.52, 0.28, paint=1),
            Disc(0.34, "orange brown"),
            Stamens(6, 0.14, "gold yellow"),
        ),
    ),
    "grape hyacinth": Kind(
        "spike",
        0.062,
        False,
        "navy blue sky,purple violet lilac",
        (Petals((180,), "oval", 2.1, 2.0, -1.0), Disc(0.32, "white cream", 0, 0.5, (0, -0.85))),
    ),
    "foxglove": Kind(
        "raceme",
        0.15,
        False,
        "purple magenta rose,rose pink pink,purple violet lilac",
        (
            Petals((180,), "bell", 1.9, 1.3, -1.0),
            Disc(0.66, "tip tip", 0, 0.62, (0, -0.76)),
            Disc(0.46, "white base", 12, 0.58, (0, -0.8)),
        ),
    ),
    "wild pansy": Kind(
        "single",
        0.38,
        False,
        "purple violet violet|gold yellow yellow,"
        "navy purple purple|lilac white white,crimson crimson red|yellow gold red",
        (
            Petals((-30, 30), "round", 1.0, 1.0),
            Petals((-98, 98), "round", 0.92, 0.85, paint=1, pattern="veins"),
            Petals((180,), "fan", 0.98, 1.25, paint=1, pattern="veins"),
            Disc(0.1, "orange lime"),
        ),
    ),
    "corn poppy": Kind(
        "single",
        0.40,
        True,
        "black scarlet scarlet,black red red,black orange orange",
        (
            Petals(2, "oval", 1.05, 1.55, pattern="veins"),
            Petals(2, "oval", 1.0, 1.45, pattern="veins"),
            Stamens(30, 0.36, "black purple"),
            Disc(0.15, "green lime", 9),
        ),
    ),
    "passion flower": Kind(
        "single",
        0.42,
        True,
        "lime white white,lime lilac lilac",
        (
            Petals(5, "oval", 1.0, 0.42),
            Petals(5, "oval", 0.96, 0.38),
            Stamens(70, 0.66, "violet sky"),
            Stamens(50, 0.4, "white purple"),
            Disc(0.17, "purple lime"),
            Petals(5, "strap", 0.42, 0.15, 0.05, paint="lime lime yellow"),
            Petals(3, "drop", 0.3, 0.12, paint="purple purple black"),
        ),
    ),
    "canterbury bells": Kind(
        "bells",
        0.25,
        False,
        "purple violet violet,rose pink pink,lime white white",
        (
            Petals(fan(-62, 62, 3), "drop", 0.62, 0.7, at=(0, 0.3)),
            Petals((0,), "bell", 1.5, 1.35, -1.05),
            Petals((-102, 102), "drop", 0.5, 0.5, 0.3, (0, 0.36)),
            Disc(0.6, "body purple", 0, 0.46, (0, 0.4)),
            Stamens(3, 0.2, "cream white", (0, 0.42)),
        ),
    ),
    "morning glory": Kind(
        "single",
        0.36,
        True,
        "white blue blue,white violet purple,white rose magenta",
        (
            Petals(5, "fan", 1.0, 1.42, pattern="stripe"),
            Disc(0.2, "white cream"),
            Disc(0.07, "lime yellow"),
        ),
    ),
    "magnolia": Kind(
        "branch",
        0.36,
        False,
        "magenta pink white,cream white white",
        (
            Petals(fan(-34, 34, 4), "oval", 1.8, 0.76, at=(0, -0.95)),
            Petals((-17, 20), "oval", 1.6, 0.82, at=(0, -0.92)),
            Petals((2,), "oval", 1.35, 0.85, at=(0, -0.95)),
        ),
    ),
    "fritillary": Kind(
        "nod",
        0.40,
        False,
        "crimson crimson rose,purple purple magenta,lime white cream",
        (
            Petals((160, 200), "oval", 1.75, 0.95, at=(0, 0.9), pattern="check"),
            Petals((180,), "oval", 1.75, 1.0, at=(0, 0.92), pattern="check"),
        ),
    ),
    "globe thistle": Kind(
        "group",
        0.24,
        True,
        "navy blue sky,purple violet lilac",
        (
            Petals(30, "spear", 0.42, 0.13, 0.58),
            Petals(28, "spear", 0.42, 0.14, 0.45),
            Petals(24, "spear", 0.4, 0.14, 0.3),
            Petals(17, "spear", 0.36, 0.14, 0.16),
            Petals(9, "spear", 0.3, 0.14, 0.02),
        ),
    ),
    "bearded iris": Kind(
        "single",
        0.40,
        False,
        "gold violet violet|gold purple purple,"
        "gold yellow cream|orange gold yellow,gold white white|gold sky blue",
        (
            Petals((-38, 38, 0), "round", 1.05, 0.8),
            Petals((-118, 118), "round", 0.98, 0.58, 0.02, paint=1, pattern="stripe"),
            Petals((180,), "round", 1.05, 0.85, -0.05, paint=1, pattern="stripe"),
        ),
    ),
    "bird of paradise": Kind(
        "single",
        0.43,
        False,
        "red orange gold|navy blue blue,"
        "gold orange orange|purple violet blue,orange gold yellow|navy blue blue",
        (
            Petals((-24, 4, 30, 52), "spear", 1.25, 0.32, at=(-0.35, -0.25)),
            Petals((66,), "spear", 1.2, 0.2, at=(-0.3, -0.25), paint=1),
            Petals((96,), "spear", 1.95, 0.36, at=(-0.9, -0.3), paint="green green crimson"),
        ),
    ),
    "anthurium": Kind(
        "single",
        0.40,
        False,
        "red red scarlet,rose pink pink,white white white",
        (
            Petals((0,), "heart", 1.95, 1.85, -1.0, pattern="veins"),
            Petals((24,), "strap", 1.0, 0.24, at=(-0.1, 0.05), paint="cream yellow gold"),
        ),
    ),
    "hibiscus": Kind(
        "single",
        0.47,
        True,
        "crimson red red,crimson pink pink,red yellow yellow",
        (
            Petals(5, "round", 1.0, 1.12, pattern="veins"),
            Petals((40,), "strap", 0.85, 0.13, paint="red pink yellow"),
            Stamens(16, 0.15, "cream gold", (0.4, 0.48)),
            Stamens(12, 0.14, "cream gold", (0.5, 0.6)),
        ),
    ),
    "garden phlox": Kind(
        "umbel",
        0.115,
        True,
        "magenta pink pink,purple magenta rose,violet lilac lilac",
        (Petals(5, "round", 1.0, 0.92), Disc(0.1, "white yellow")),
    ),
    "cyclamen": Kind(
        "nodding",
        0.24,
        False,
        "crimson rose pink,magenta pink white,magenta white white",
        (
            Petals(fan(-58, 58, 5), "oval", 1.5, 0.62, at=(0, -0.6)),
            Disc(0.34, "purple crimson", 0, 0.55, (0, -0.66)),
        ),
    ),
    "moon orchid": Kind(
        "arch",
        0.22,
        False,
        "lilac white white|gold yellow white,"
        "magenta pink white|crimson magenta rose,lime yellow cream|red crimson crimson",
        (
            Petals((0, 132, 228), "oval", 0.98, 0.56),
            Petals((-84, 84), "round", 1.0, 1.25, pattern="veins"),
            Petals((180,), "fan", 0.5, 0.42, paint=1),
            Disc(0.12, "gold white"),
        ),
    ),
}
# Heads of a layout, see `arrange`; the others have a rule, or one head in the middle.
HEADS = {
    "group": [(0.3, 0.33, 1, 0), (0.7, 0.42, 1, 0), (0.42, 0.74, 1, 0)],
    "nod": [(0.5, 0.52, 1, 0)],
    "pair": [(0.32, 0.34, 1, 0), (0.66, 0.62, 1, 0)],
    "nodding": [(0.3, 0.36, 1, -6), (0.7, 0.5, 1, 6), (0.48, 0.7, 1, 0)],
    "bells": [(0.5, 0.27, 1, 0), (0.27, 0.58, 1.05, -34), (0.73, 0.58, 1.05, 34)],
    "arch": [
        (0.25, 0.32, 0.85, -8),
        (0.52, 0.25, 0.8, 0),
        (0.76, 0.45, 0.95, 6),
        (0.46, 0.64, 1.1, 4),
    ],
}
# Stems of a layout: width and the control points of a Bezier curve, the first relative to the plant's foot; else one to each head.
STEMS = {
    "branch": [
        (0.05, (-0.1, 1.0), (0.4, 0.85), (0.52, 0.72)),
        (0.035, (0.4, 0.87), (0.7, 0.8), (1.1, 0.85)),
    ],
    "nod": [(0.022, (0.28, 1.1), (0.8, -0.1), (0.5, 0.2))],
    "arch": [
        (0.02, (-0.2, 1.1), (-0.1, 0.0), (0.5, 0.2)),
        (0.015, (-0.2, 0.22), (0.7, 0.12), (0.9, 0.6)),
    ],
    "bells": [(0.028, (0, 1.1), (0.5, 0.7), (0.5, 0.3))],
    "umbel": [(0.028, (0, 1.1), (0.5, 0.7), (0.5, 0.3))],
    "spike": [(0.028, (0, 1.1), (0.5, 0.7), (0.5, 0.1))],
    "raceme": [(0.028, (0, 1.1), (0.5, 0.7), (0.5, 0.1))],
}


def smooth(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 below `low`, 1 above `high`, and an S-curve between them."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def clouds(rng: Rng, side: int, *cells: int) -> np.ndarray:
    """Soft noise (side, side) in about [-1, 1]: random grids of `cells` points a side, each half as strong as the one before."""
    grids = [
        cv2.resize(
            rng.uniform(-1, 1, (n, n)).astype(np.float32),
            (side, side),
            interpolation=cv2.INTER_CUBIC,
        )
        for n in cells
    ]
    return sum(grid * 0.5**octave for octave, grid in enumerate(grids))


def plane(pixels: int) -> list[np.ndarray]:
    """The x and y coordinates of a sprite's pixels."""
    line = np.linspace(-SPAN, SPAN, pixels, dtype=np.float32)
    return np.meshgrid(line, -line)


def sprite(
    colour: np.ndarray, light: np.ndarray, alpha: np.ndarray, shadow: np.ndarray
) -> np.ndarray:
    """Colour (H, W, 3) times light (H, W), cut out by alpha, with a shadow that falls on what lies behind."""
    return cv2.merge(
        [
            *cv2.split(np.clip(colour * (light * alpha)[..., None], 0, 1)),
            alpha + (1 - alpha) * shadow,
        ]
    ).astype(np.float32)


def mix_paints(rng: Rng) -> Table:
    """The colour table of one picture: every hue, saturation and brightness is a little off, as between plants of one kind."""
    hsv = cv2.cvtColor(np.array([list(RGB.values())], np.float32) / 255, cv2.COLOR_RGB2HSV)
    hsv[0, :, 0] = (hsv[0, :, 0] + rng.normal(0, 8, len(RGB))) % 360
    hsv[0, :, 1:] = np.minimum(
        hsv[0, :, 1:] * rng.uniform((0.75, 0.8), (1.15, 1.08), (len(RGB), 2)), 1
    )
    return dict(zip(RGB, cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]))


def draw_petal(
    shape: str, paint: list[np.ndarray], pattern: str, rng: Rng, pixels: int
) -> np.ndarray:
    """Sprite of a petal: colour from base to tip, veins, a crease, curled edges."""
    v, y = plane(pixels)
    a, b, notch, teeth, depth = SHAPES[shape]
    u = (
        (y + 1)
        / 2
        / (
            1
            - notch * np.exp(-((v / 0.35) ** 2))
            - depth * np.abs(np.sin(np.pi * teeth * (v * 0.8 + 0.5)))
        )
    )
    inside = np.clip(u, 1e-4, 1 - 1e-4)
    half = inside**a * (1 - inside) ** b / ((a / (a + b)) ** a * (b / (a + b)) ** b)
    half *= 1 + 0.05 * np.sin(inside * rng.uniform(6, 14) + rng.uniform(0, 6))
    alpha = np.clip(np.minimum(half - np.abs(v), 2 - np.abs(4 * u - 2)) * pixels / 4 + 0.5, 0, 1)
    across, noise = v / (half + 0.05), clouds(rng, pixels, 6)
    body, tip = smooth(0.05, 0.42, u + 0.06 * noise), smooth(0.6, 1, u + 0.06 * noise)
    if pattern == "stripe":
        body *= 1 - 0.9 * np.exp(-((v / 0.16) ** 2)) * (1 - smooth(0.6, 0.95, u))
    colour = (
        paint[0] + (paint[1] - paint[0]) * body[..., None] + (paint[2] - paint[1]) * tip[..., None]
    )
    light = 0.72 + 0.3 * smooth(0, 0.45, u) - 0.2 * across**2 - 0.1 * np.exp(-((v / 0.07) ** 2))
    light += 0.05 * noise + 0.04 * np.sin(across * 14 + noise)
    if pattern == "veins":
        light -= (
            0.2
            * smooth(0.75, 1, np.abs(np.sin(across * 7 + 0.4 * noise)))
            * (1 - smooth(0.35, 0.95, u))
        )
    elif pattern == "check":
        light += 0.26 * np.sign(np.sin(u * 22 + noise) * np.sin(across * 7))
    elif pattern == "spots":
        for v0, u0 in rng.uniform((-0.6, 0.12), (0.6, 0.72), (22, 2)):
            light -= 0.7 * (((v - v0) / 0.11) ** 2 + ((u - u0) / 0.025) ** 2 < 1)
    return sprite(
        colour,
        light,
        cv2.GaussianBlur(alpha, (3, 3), 0),
        0.5 * cv2.GaussianBlur(alpha, (0, 0), pixels * 0.045),
    )


def draw_disc(part: Disc, table: Table, rng: Rng, pixels: int = 80) -> np.ndarray:
    """Sprite of a domed centre, with florets in the spiral of a sunflower."""
    x, y = plane(pixels)
    r = np.hypot(x, y)
    rim, middle = (table[name] for name in part.paint.split())
    colour = (
        middle + (rim - middle) * smooth(0.2, 0.95, r + 0.1 * clouds(rng, pixels, 7))[..., None]
    )
    for i in range(part.florets):
        far, turn = np.sqrt((i + 0.5) / part.florets) * 0.95, i * 2.39996  # the golden angle
        spot = (np.array((np.sin(turn), np.cos(turn))) * far / SPAN + 1) * pixels / 2
        cv2.circle(
            colour,
            spot.round().astype(int).tolist(),
            2,
            ((middle + (rim - middle) * far) * (0.65, 1)[i % 2]).tolist(),
            -1,
        )
    light = 1.05 - 0.35 * r**2 + 0.15 * (y - x) * (part.florets > 0)
    return sprite(
        colour, light, np.clip((1 - r) * pixels / 4 + 0.5, 0, 1), 0.5 * (1 - smooth(0.9, 1.2, r))
    )


def stamp(
    canvas: np.ndarray,
    image: np.ndarray,
    x: float,
    y: float,
    half: tuple[float, float],
    angle: float = 0,
    gain: float = 1,
) -> None:
    """Lay a sprite over the canvas (H, W, 4), centred on pixel (x, y), `half` its half width and height, turned clockwise."""
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn = np.array(
        [[half[0] * cos, half[1] * sin], [half[0] * sin, -half[1] * cos]]
    )  # the sprite's (right, up) -> canvas (x, y)
    reach = SPAN * np.abs(turn).sum(1)
    left, top = np.maximum(np.floor((x, y) - reach), 0).astype(int).tolist()
    right, bottom = np.minimum(np.ceil((x, y) + reach), canvas.shape[1::-1]).astype(int).tolist()
    if right > left and bottom > top:
        step = 2 * SPAN / (len(image) - 1)
        matrix = np.column_stack([turn * (step, -step), turn @ (-SPAN, SPAN) + (x - left, y - top)])
        patch = cv2.warpAffine(image, matrix, (right - left, bottom - top))
        region = canvas[top:bottom, left:right]
        region *= cv2.merge(
            [1 - patch[..., 3]] * 4
        )  # numpy's broadcasting over four channels is five times slower
        region += cv2.transform(patch, np.diag((gain, gain, gain, 1)).astype(np.float32))


def draw_head(kind: Kind, paints: list[str], table: Table, rng: Rng, pixels: int) -> np.ndarray:
    """Sprite of one flower head of radius 1."""
    canvas = np.zeros((pixels, pixels, 4), np.float32)
    unit, phase, sun = pixels / (2 * SPAN), rng.normal(0, 4), rng.uniform(0, 360)
    table = table | dict(zip(("base", "body", "tip"), (table[name] for name in paints[0].split())))
    for order, part in enumerate(kind.parts):
        x, y = pixels / 2 + part.at[0] * unit, pixels / 2 - part.at[1] * unit
        if isinstance(part, Petals):
            paint = paints[part.paint] if isinstance(part.paint, int) else part.paint
            paint, detail = (
                [table[name] for name in paint.split()],
                int(np.clip(1.2 * part.length * unit, 24, 80)),
            )
            petal = draw_petal(part.shape, paint, part.pattern, rng, detail)
            angles = np.array(part.angles, float)
            if isinstance(
                part.angles, int
            ):  # each second ring stands in the gaps of the one before
                angles = phase + (np.arange(part.angles) + order % 2 / 2) * 360 / part.angles
            for angle in angles + rng.normal(0, 4, len(angles)):
                length, width, turn = (
                    part.length * rng.normal(1, 0.04),
                    part.width * rng.normal(1, 0.05),
                    np.radians(angle),
                )
                far = (part.start + length / 2) * unit
                stamp(
                    canvas,
                    petal,
                    x + far * np.sin(turn),
                    y - far * np.cos(turn),
                    (width / 2 * unit, length / 2 * unit),
                    angle,
                    1 + 0.1 * np.cos(turn - sun) + rng.normal(0, 0.03),
                )
        elif isinstance(part, Disc):
            stamp(
                canvas,
                draw_disc(part, table, rng),
                x,
                y,
                (part.radius * unit, part.radius * part.squash * unit),
            )
        else:
            filament, anther = ((*table[name].tolist(), 1.0) for name in part.paint.split())
            for turn in np.radians(
                phase + np.arange(part.count) * 360 / part.count + rng.normal(0, 4, part.count)
            ):
                far = part.length * unit * rng.uniform(0.82, 1.05)
                end = (round(x + far * np.sin(turn)), round(y - far * np.cos(turn)))
                cv2.line(canvas, (round(x), round(y)), end, filament, max(1, round(0.022 * unit)))
                cv2.circle(
                    canvas,
                    end,
                    max(1, round((0.055 if part.count < 10 else 0.03) * unit)),
                    anther,
                    -1,
                )
    return canvas


def background(rng: Rng, table: Table, side: int = 128) -> np.ndarray:
    """Blurred foliage, grass, soil, sky, bokeh or darkness, (side, side, 3) in [0, 1]. All kinds share them."""
    place = str(
        rng.choice(["foliage"] * 4 + ["grass"] * 3 + ["bokeh"] * 2 + ["dark", "soil", "sky"])
    )
    noise, down = (
        clouds(rng, side, 4, 8, 16, 40)[..., None],
        np.linspace(0, 1, side, dtype=np.float32)[:, None, None],
    )
    shade = table["leaf"] * (0.25 + 0.12 * noise if place == "dark" else 0.55 + 0.25 * noise)
    if place == "sky":
        shade = table["sky"] * (0.6 + 0.2 * down) + 0.1 * down + 0.12 * np.maximum(noise, 0)
    elif place == "soil":
        shade = table["brown"] * (0.75 + 0.35 * noise) + 0.03
    scene = np.clip(shade, 0, 1).astype(np.float32)
    for x, y, long in (
        rng.uniform(
            (0, 0, 0.08), (1, 1, 0.2), ({"grass": 90, "foliage": 45, "bokeh": 20}.get(place, 0), 3)
        )
        * side
    ):
        shade = (
            table["leaf"] + (table["green"] - table["leaf"]) * rng.uniform(-0.4, 1.2)
        ) * rng.uniform(0.5, 0.85)
        if place == "grass":
            tip = (int(x + rng.normal(0, long)), int(y - long))
            cv2.line(
                scene, (int(x), int(y + 3 * long)), tip, shade.tolist(), int(rng.integers(1, 4))
            )
        elif place == "foliage":
            cv2.ellipse(
                scene,
                (int(x), int(y)),
                (int(long), int(long * 0.45)),
                rng.uniform(0, 360),
                0,
                360,
                shade.tolist(),
                -1,
            )
        else:  # other flowers, far out of focus
            tint = 0.4 * table[list(RGB)[rng.integers(18)]] if rng.random() < 0.4 else 1.2 * shade
            cv2.circle(scene, (int(x), int(y)), int(long * 0.6), tint.tolist(), -1)
    return cv2.GaussianBlur(
        scene, (0, 0), side * (0.03 if place == "bokeh" else rng.uniform(0.012, 0.025))
    )


def arrange(layout: str) -> list[tuple[float, float, float, float]]:
    """Where the heads are, from back to front: x, y (0 to 1, y down), relative size, angle clockwise."""
    if layout == "spike":
        turns = [(t, np.sin(k * 1.9 + 9 * t)) for t in np.linspace(0, 1, 11) for k in range(5)]
        return [
            (0.5 + (0.04 + 0.09 * t) * s, 0.1 + 0.62 * t, 0.7 + 0.5 * t, -25 * s) for t, s in turns
        ]
    if layout == "raceme":
        turns = [(t, s) for t in np.linspace(0, 1, 5) for s in (-1, 1, 0)[: 2 + (t > 0.3)]]
        return [
            (
                0.5 + (0.04 + 0.13 * t) * s,
                0.08 + 0.72 * t + 0.05 * s,
                0.35 + 0.75 * t,
                (8 * t - 48) * s,
            )
            for t, s in turns
        ]
    if layout == "umbel":
        rings = [
            (r, 2 * np.pi * k / n) for r, n in ((0.29, 9), (0.14, 5), (0, 1)) for k in range(n)
        ]
        return [(0.5 + r * np.cos(a), 0.44 + 0.83 * r * np.sin(a), 1, 0) for r, a in rings]
    return HEADS.get(layout, [(0.5, 0.47, 1, 0)])


def draw_plant(
    scene: np.ndarray,
    layout: str,
    heads: list[tuple[float, float, float, float]],
    table: Table,
    rng: Rng,
) -> None:
    """Water with lily pads, or stems (Bezier curves, lit from the left) and leaves: what lies behind the heads."""
    side, foot = len(scene), 0.5 + rng.normal(0, 0.1)
    if layout == "float":
        water = cv2.GaussianBlur(scene, (0, 0), side * 0.06, sigmaY=side * 0.012)[..., :3]
        scene[..., :3] = water * 0.5 + table["navy"] * rng.uniform(0.2, 0.7)
        pad = draw_disc(Disc(1, "leaf green"), table, rng)
        for x, y in ((0.15, 0.72), (0.85, 0.66), (0.5, 0.82)) + rng.normal(0, 0.05, (3, 2)):
            stamp(scene, pad, x * side, y * side, (0.3 * side, 0.12 * side))
        return
    t = np.linspace(0, 1, 24)[:, None]
    for width, *points in STEMS.get(layout) or [
        (0.028, (0.4 * x - 0.2, 1.1), (x, 0.9), (x, y)) for x, y, _, _ in heads
    ]:
        shift = (
            (0 if layout == "branch" else foot, 0),
            (0, 0),
            (0, 0),
        )  # a stem's foot is anywhere, a branch is where it is
        path = np.hstack([(1 - t) ** 2, 2 * t * (1 - t), t**2]) @ np.add(points, shift)
        for left, part, shade in ((0, 1, 0.55), (0.12, 0.7, 0.85), (0.2, 0.3, 1.1)):
            line = np.round((path - (left * width, 0)) * side).astype(np.int32)
            colour = table["brown" if layout == "branch" else "green"] * shade
            cv2.polylines(
                scene, [line], False, (*colour.tolist(), 1.0), max(1, round(part * width * side))
            )
    if layout == "branch":
        return
    leaf = draw_petal("oval", [table["leaf"], table["green"], table["green"]], "veins", rng, 64)
    for turn in rng.permutation((-62, 58, -28, 34))[: rng.integers(1, 3)]:
        long = rng.uniform(0.16, 0.24) * side
        stamp(
            scene,
            leaf,
            (foot + 0.16 * np.sin(np.radians(turn))) * side,
            0.93 * side,
            (0.35 * long, long),
            turn,
            rng.uniform(0.75, 1.1),
        )


def draw_flower(kind: str, rng: Rng, size: int = 160) -> np.ndarray:
    """One picture of a kind in KINDS, uint8 RGB (size, size, 3)."""
    spec, table, side = KINDS[kind], mix_paints(rng), round(OVER * size)
    paints = str(rng.choice(spec.paints.split(","))).split("|")
    scene = cv2.cvtColor(
        cv2.resize(background(rng, table), (side, side), interpolation=cv2.INTER_CUBIC),
        cv2.COLOR_RGB2RGBA,
    )
    heads = arrange(spec.layout)
    draw_plant(scene, spec.layout, heads, table, rng)
    zoom = rng.uniform(0.98, 1.08) * side
    sprites = [
        draw_head(spec, paints, table, rng, max(40, int(2 * SPAN * spec.size * zoom)))
        for _ in heads[:3]
    ]
    mirror = rng.choice((-1, 1))
    for i, (x, y, scale, angle) in enumerate(heads):
        radius = spec.size * scale * zoom * rng.normal(1, 0.04)
        squash = (
            rng.uniform(0.9, 1) if spec.faces else rng.uniform(0.92, 1.06)
        )  # a face is seen at a slant
        angle += rng.normal(0, 4)
        x, y = (x, y) + rng.normal(0, 0.01, 2)
        stamp(
            scene,
            sprites[i % len(sprites)],
            x * side,
            y * side,
            (radius * squash * mirror, radius),
            angle,
            rng.normal(1, 0.04),
        )
    # The camera: a small turn, shift and slant; then exposure, light that falls off and has a colour, a soft lens, a noisy sensor.
    corners, turn = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) - 0.5, np.radians(rng.normal(0, 2))
    seen = (
        corners @ [(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))]
        + rng.normal(0, 0.01, 2)
        + rng.normal(0, 0.01, (4, 2))
    )
    view = cv2.getPerspectiveTransform(
        *(((p + 0.5) * side).astype(np.float32) for p in (corners, seen))
    )
    scene = cv2.warpPerspective(scene, view, (side, side), borderMode=cv2.BORDER_REFLECT)
    photo = cv2.resize(scene, (size, size), interpolation=cv2.INTER_AREA)[..., :3].clip(
        0, 1
    ) ** np.float32(rng.uniform(0.85, 1.15))
    ramp, slope, warmth = np.linspace(-1, 1, size), rng.normal(0, 0.08, 2), rng.normal(0, 0.05)
    light = rng.uniform(0.9, 1.1) * (1 + slope[0] * ramp[:, None] + slope[1] * ramp)
    photo *= cv2.merge(
        [light * (1 + warmth), light * (1 + rng.normal(0, 0.02)), light * (1 - warmth)]
    ).astype(np.float32)
    grain = rng.standard_normal(photo.shape, np.float32) * rng.uniform(0.004, 0.02)
    photo = cv2.GaussianBlur(photo, (0, 0), rng.uniform(0.25, 0.8)) + grain
    return (photo * 255 + 0.5).clip(0, 255).astype(np.uint8)
