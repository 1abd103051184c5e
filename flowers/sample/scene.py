"""Whole pictures of the sample dataset: background, plant, flower heads, and the camera."""

import cv2
import numpy as np

from flowers.sample.draw import (
    SPAN,
    Array,
    Paints,
    Rng,
    clouds,
    draw_disc,
    draw_head,
    draw_petal,
    mix_paints,
    stamp,
)
from flowers.sample.kinds import HEADS, KINDS, N_FLOWER_PAINTS, RGB, STEMS, Disc, Head, Stem

OVERSAMPLING = 1.25  # pictures are drawn this much larger, then averaged down
BACKGROUND_PIXELS = 128  # backgrounds are blurred: fewer pixels will do

# How often each background occurs, of 12. All kinds share them.
BACKGROUNDS = ["foliage"] * 4 + ["grass"] * 3 + ["bokeh"] * 2 + ["dark", "soil", "sky"]
# blades of grass, leaves, or lights in a background; the others have none
BACKGROUND_OBJECTS = {"grass": 90, "foliage": 45, "bokeh": 20}

LILY_PADS = ((0.15, 0.72), (0.85, 0.66), (0.5, 0.82))  # x, y in parts of the side
# A stem is three lines on one another: how far the line lies to the left and how wide it is,
# in widths of the stem, and its brightness.
STEM_LINES = ((0, 1, 0.55), (0.12, 0.7, 0.85), (0.2, 0.3, 1.1))

# -----------------------------------------------------------------------------
# background


def background_surface(name: str, noise: Array, paints: Paints) -> Array:
    """Return the colour behind everything (side, side, 3), float32 in [0, 1].

    noise: (side, side, 1).
    """
    side = len(noise)
    if name == "sky":
        down = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
        haze = 0.1 * down
        clouds_only = np.maximum(noise, 0)
        shade = paints["sky"] * (0.6 + 0.2 * down) + haze + 0.12 * clouds_only
    elif name == "soil":
        shade = paints["brown"] * (0.75 + 0.35 * noise) + 0.03
    elif name == "dark":
        shade = paints["leaf"] * (0.25 + 0.12 * noise)
    else:
        shade = paints["leaf"] * (0.55 + 0.25 * noise)
    return np.clip(shade, 0, 1).astype(np.float32)


def draw_background(rng: Rng, paints: Paints) -> Array:
    """Return blurred foliage, grass, lights (bokeh), darkness, soil or sky.

    (BACKGROUND_PIXELS, BACKGROUND_PIXELS, 3) float32 in [0, 1].
    """
    side = BACKGROUND_PIXELS
    name = str(rng.choice(BACKGROUNDS))
    noise = clouds(rng, side, 4, 8, 16, 40)[..., None]
    scene = background_surface(name, noise, paints)

    # position and size of each object, in parts of the side
    n_objects = BACKGROUND_OBJECTS.get(name, 0)
    objects = rng.uniform((0, 0, 0.08), (1, 1, 0.2), (n_objects, 3))
    for x, y, length in objects * side:
        mixture = rng.uniform(-0.4, 1.2)
        green = paints["leaf"] + (paints["green"] - paints["leaf"]) * mixture
        shade = green * rng.uniform(0.5, 0.85)
        centre = (int(x), int(y))
        if name == "grass":
            foot = (int(x), int(y + 3 * length))
            tip_x = x + rng.normal(0, length)
            tip = (int(tip_x), int(y - length))
            line_width = int(rng.integers(1, 4))
            cv2.line(scene, foot, tip, shade.tolist(), line_width)
        elif name == "foliage":
            half = (int(length), int(length * 0.45))
            turn = rng.uniform(0, 360)
            cv2.ellipse(scene, centre, half, turn, 0, 360, shade.tolist(), -1)
        else:  # leaves and other flowers, far out of focus
            tint = 1.2 * shade
            if rng.random() < 0.4:
                tint = 0.4 * paints[list(RGB)[rng.integers(N_FLOWER_PAINTS)]]
            cv2.circle(scene, centre, int(length * 0.6), tint.tolist(), -1)

    blur = 0.03 if name == "bokeh" else rng.uniform(0.012, 0.025)
    return cv2.GaussianBlur(scene, (0, 0), side * blur)


# -----------------------------------------------------------------------------
# plant


def place_heads(layout: str) -> list[Head]:
    """Return where the heads of a layout are, from back to front."""
    if layout == "spike":  # eleven whorls of five around a stem, widening downwards
        heads = []
        for down in np.linspace(0, 1, 11):
            for k in range(5):
                sideways = np.sin(k * 1.9 + 9 * down)
                x = 0.5 + (0.04 + 0.09 * down) * sideways
                y = 0.1 + 0.62 * down
                scale = 0.7 + 0.5 * down
                heads.append(Head(x, y, scale, angle=-25 * sideways))
        return heads
    if layout == "raceme":  # bells to the left, to the right, and further down in the middle
        heads = []
        for down in np.linspace(0, 1, 5):
            sides = (-1, 1, 0) if down > 0.3 else (-1, 1)
            for side in sides:
                x = 0.5 + (0.04 + 0.13 * down) * side
                y = 0.08 + 0.72 * down + 0.05 * side
                scale = 0.35 + 0.75 * down
                heads.append(Head(x, y, scale, angle=(8 * down - 48) * side))
        return heads
    if layout == "umbel":  # rings around one in the middle, seen at a slant
        heads = []
        for radius, count in ((0.29, 9), (0.14, 5), (0, 1)):
            for k in range(count):
                turn = 2 * np.pi * k / count
                x = 0.5 + radius * np.cos(turn)
                y = 0.44 + 0.83 * radius * np.sin(turn)
                heads.append(Head(x, y))
        return heads
    return HEADS.get(layout, [Head(0.5, 0.47)])


def draw_water(scene: Array, paints: Paints, rng: Rng) -> None:
    """Turn the scene (side, side, 4) into water that mirrors it, with lily pads."""
    side = len(scene)
    mirrored = cv2.GaussianBlur(scene, (0, 0), side * 0.06, sigmaY=side * 0.012)
    depth = paints["navy"] * rng.uniform(0.2, 0.7)
    scene[..., :3] = mirrored[..., :3] * 0.5 + depth
    pad = draw_disc(Disc(radius=1, paint="leaf green"), paints, rng)
    half = (0.3 * side, 0.12 * side)
    centres = LILY_PADS + rng.normal(0, 0.05, (3, 2))
    for centre in centres * side:
        stamp(scene, pad, centre, half)


def draw_stem(scene: Array, stem: Stem, paint: Array, foot_x: float) -> None:
    """Draw a stem into the scene (side, side, 4), lit from the left.

    foot_x: what the stem's foot is shifted by, in parts of the side.
    """
    side = len(scene)
    t = np.linspace(0, 1, 24)[:, None]
    bernstein = np.hstack([(1 - t) ** 2, 2 * t * (1 - t), t**2])  # (24, 3)
    foot = (stem.foot[0] + foot_x, stem.foot[1])
    path = bernstein @ np.array([foot, stem.control, stem.tip])  # (24, 2)
    for left, width, shade in STEM_LINES:
        shifted = path - (left * stem.width, 0)
        line = np.round(shifted * side).astype(np.int32)
        colour = (paint * shade).tolist()
        line_width = max(1, round(width * stem.width * side))
        cv2.polylines(scene, [line], False, (*colour, 1.0), line_width)


def draw_plant(scene: Array, layout: str, heads: list[Head], paints: Paints, rng: Rng) -> None:
    """Draw what lies behind the heads into the scene (side, side, 4)."""
    side = len(scene)
    foot = 0.5 + rng.normal(0, 0.1)  # where the plant stands
    if layout == "float":
        draw_water(scene, paints, rng)
        return

    if layout == "branch":  # its ends lie outside the picture: it stays where it is
        for stem in STEMS[layout]:
            draw_stem(scene, stem, paints["brown"], 0)
        return

    stems = STEMS.get(layout)
    if stems is None:
        stems = []
        for x, y, _, _ in heads:
            foot_of_stem = (0.4 * x - 0.2, 1.1)
            stems.append(Stem(0.028, foot_of_stem, control=(x, 0.9), tip=(x, y)))
    for stem in stems:
        draw_stem(scene, stem, paints["green"], foot)

    colours = [paints["leaf"], paints["green"], paints["green"]]
    leaf = draw_petal("oval", colours, "veins", rng, 64)
    turns = rng.permutation((-62, 58, -28, 34))
    n_leaves = rng.integers(1, 3)
    for turn in turns[:n_leaves]:
        length = rng.uniform(0.16, 0.24) * side
        x = foot + 0.16 * np.sin(np.radians(turn))
        centre = (x * side, 0.93 * side)
        half = (0.35 * length, length)
        gain = rng.uniform(0.75, 1.1)
        stamp(scene, leaf, centre, half, turn, gain)


# -----------------------------------------------------------------------------
# camera


def move_camera(scene: Array, rng: Rng) -> Array:
    """Return the scene (side, side, 4) a little turned, shifted and slanted."""
    side = len(scene)
    turn = np.radians(rng.normal(0, 2))
    cos, sin = np.cos(turn), np.sin(turn)
    rotation = [(cos, sin), (-sin, cos)]
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) - 0.5
    shift = rng.normal(0, 0.01, 2)
    slant = rng.normal(0, 0.01, (4, 2))
    moved = corners @ rotation + shift + slant

    before = ((corners + 0.5) * side).astype(np.float32)
    after = ((moved + 0.5) * side).astype(np.float32)
    view = cv2.getPerspectiveTransform(before, after)
    return cv2.warpPerspective(scene, view, (side, side), borderMode=cv2.BORDER_REFLECT)


def photograph(scene: Array, size: int, rng: Rng) -> Array:
    """Return uint8 RGB (size, size, 3) of the scene (side, side, 4), as a camera would take it."""
    scene = move_camera(scene, rng)
    small = cv2.resize(scene, (size, size), interpolation=cv2.INTER_AREA)
    gamma = np.float32(rng.uniform(0.85, 1.15))
    photo = small[..., :3].clip(0, 1) ** gamma

    # light that falls off to one side and has a colour
    ramp = np.linspace(-1, 1, size)
    slope = rng.normal(0, 0.08, 2)
    warmth = rng.normal(0, 0.05)
    brightness = rng.uniform(0.9, 1.1)
    down, right = slope
    light = brightness * (1 + down * ramp[:, None] + right * ramp)
    tint = rng.normal(0, 0.02)
    red, green, blue = light * (1 + warmth), light * (1 + tint), light * (1 - warmth)
    photo *= cv2.merge([red, green, blue]).astype(np.float32)

    # a soft lens and a noisy sensor
    noise = rng.standard_normal(photo.shape, np.float32)
    grain = noise * rng.uniform(0.004, 0.02)
    softness = rng.uniform(0.25, 0.8)  # pixels
    photo = cv2.GaussianBlur(photo, (0, 0), softness) + grain
    levels = photo * 255 + 0.5
    return levels.clip(0, 255).astype(np.uint8)


# -----------------------------------------------------------------------------
# picture


def draw_flower(name: str, rng: Rng, size: int = 160) -> Array:
    """Return one picture of a kind in KINDS, uint8 RGB (size, size, 3)."""
    kind = KINDS[name]
    side = round(OVERSAMPLING * size)
    paints = mix_paints(rng)
    head_paints = kind.paints[rng.integers(len(kind.paints))]

    scene = draw_background(rng, paints)
    scene = cv2.resize(scene, (side, side), interpolation=cv2.INTER_CUBIC)
    scene = cv2.cvtColor(scene, cv2.COLOR_RGB2RGBA)
    heads = place_heads(kind.layout)
    draw_plant(scene, kind.layout, heads, paints, rng)

    # Three different heads at most: the others of a picture are stamped from the same sprites.
    zoom = rng.uniform(0.98, 1.08) * side
    pixels = max(40, int(2 * SPAN * kind.size * zoom))
    sprites = [draw_head(kind, head_paints, paints, rng, pixels) for _ in heads[:3]]
    mirror = rng.choice((-1, 1))
    for i, head in enumerate(heads):
        radius = kind.size * head.scale * zoom * rng.normal(1, 0.04)
        # A face is seen at a slant.
        least, most = (0.9, 1) if kind.faces else (0.92, 1.06)
        squash = rng.uniform(least, most)
        half = (radius * squash * mirror, radius)
        angle = head.angle + rng.normal(0, 4)
        centre = (head.x, head.y) + rng.normal(0, 0.01, 2)
        gain = rng.normal(1, 0.04)
        stamp(scene, sprites[i % len(sprites)], centre * side, half, angle, gain)
    return photograph(scene, size, rng)
