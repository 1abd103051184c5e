"""Sprites of the sample dataset: petals, discs, stamens, and the flower heads made of them.

A *sprite* is a premultiplied float32 RGBA image (pixels, pixels, 4) in [0, 1] of the square
[-SPAN, SPAN]^2, y up. A petal is a sprite that reaches from (0, -1) to (0, 1). Petals, discs and
stamens are stamped on one another into the sprite of a head; `scene` stamps heads into a picture.

Every number is drawn from the picture's generator in a fixed order, and the order of the
arithmetic is fixed as well: the sample has the same bytes each time.
"""

import cv2
import numpy as np

from flowers.sample.kinds import OUTLINES, RGB, Disc, Kind, Petals, Stamens

SPAN = 1.2  # half the side of a sprite: beyond 1 there is room for soft edges and shadows
DISC_PIXELS = 80  # side of a disc's sprite
GOLDEN_ANGLE = 2.39996  # radians between a sunflower's neighbouring florets

Array = np.ndarray
Rng = np.random.Generator
Paints = dict[str, Array]  # name: float32 RGB in [0, 1]
Point = tuple[float, float]  # pixels (x, y), y down

# -----------------------------------------------------------------------------
# helpers


def smooth(low: float, high: float, x: Array) -> Array:
    """Return 0 below `low`, 1 above `high`, and an S-curve between them."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def clouds(rng: Rng, side: int, *cells: int) -> Array:
    """Return soft noise (side, side), float32 in about [-1, 1].

    It is a sum of random grids of `cells` points a side, each half as strong as the one before.
    """
    noise = np.zeros((side, side), np.float32)
    for octave, n in enumerate(cells):
        grid = rng.uniform(-1, 1, (n, n)).astype(np.float32)
        smooth_grid = cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)
        noise += smooth_grid * 0.5**octave
    return noise


def plane(pixels: int) -> list[Array]:
    """Return the x and y coordinates of a sprite's pixels, each (pixels, pixels)."""
    line = np.linspace(-SPAN, SPAN, pixels, dtype=np.float32)
    return np.meshgrid(line, -line)


def sprite(colour: Array, light: Array, alpha: Array, shadow: Array) -> Array:
    """Cut colour (H, W, 3) times light (H, W) out by alpha (H, W).

    shadow: (H, W), how much the sprite darkens what lies behind it.
    """
    rgb = np.clip(colour * (light * alpha)[..., None], 0, 1)
    opacity = alpha + (1 - alpha) * shadow
    return cv2.merge([*cv2.split(rgb), opacity]).astype(np.float32)


def mix_paints(rng: Rng) -> Paints:
    """Return the paints of one picture: a little off, as plants of one kind differ."""
    n = len(RGB)
    rgb = np.array([list(RGB.values())], np.float32) / 255  # (1, n, 3)
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)  # hue in degrees, saturation and value in [0, 1]
    hue = hsv[0, :, 0]  # views: hsv changes with them
    saturation_value = hsv[0, :, 1:]
    hue[:] = (hue + rng.normal(0, 8, n)) % 360
    saturation_value *= rng.uniform((0.75, 0.8), (1.15, 1.08), (n, 2))
    saturation_value[:] = np.minimum(saturation_value, 1)
    mixed = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]
    return dict(zip(RGB, mixed))


def clockwise(centre: Point, turn: float, distance: float) -> Point:
    """Return the point at a distance from the centre; turn: radians clockwise from the top."""
    x = centre[0] + distance * np.sin(turn)
    y = centre[1] - distance * np.cos(turn)
    return x, y


def stamp(
    canvas: Array,
    image: Array,
    centre: Point,
    half: Point,
    angle: float = 0,
    gain: float = 1,
) -> None:
    """Lay a sprite over the canvas (H, W, 4), in place.

    centre: pixel (x, y) of the canvas; half: half the width and height of the sprite's
    [-1, 1]^2, pixels; angle: degrees clockwise; gain: factor of the brightness.
    """
    # the sprite's (right, up) -> the canvas' (x, y)
    cos = np.cos(np.radians(angle))
    sin = np.sin(np.radians(angle))
    right_axis = [half[0] * cos, half[0] * sin]
    up_axis = [half[1] * sin, -half[1] * cos]
    turn = np.column_stack([right_axis, up_axis])

    # the part of the canvas that the sprite can touch
    reach = SPAN * np.abs(turn).sum(1)
    height, width = canvas.shape[:2]
    first = np.maximum(np.floor(centre - reach), 0)
    last = np.minimum(np.ceil(centre + reach), (width, height))
    left, top = first.astype(int).tolist()
    right, bottom = last.astype(int).tolist()
    if right <= left or bottom <= top:
        return

    # the sprite's pixels (column, row) -> the region's pixels
    step = 2 * SPAN / (len(image) - 1)
    middle = (centre[0] - left, centre[1] - top)
    top_left = turn @ (-SPAN, SPAN) + middle
    matrix = np.column_stack([turn * (step, -step), top_left])
    size = (right - left, bottom - top)
    patch = cv2.warpAffine(image, matrix, size)

    region = canvas[top:bottom, left:right]
    behind = 1 - patch[..., 3]
    # numpy's broadcasting over four channels is five times slower than this
    region *= cv2.merge([behind] * 4)
    brighten = np.diag((gain, gain, gain, 1)).astype(np.float32)
    region += cv2.transform(patch, brighten)


# -----------------------------------------------------------------------------
# petals


def petal_outline(shape: str, x: Array, y: Array, rng: Rng) -> tuple[Array, Array]:
    """Return, for each pixel, the distance u from base (0) to tip (1) and the half width there."""
    a, b, notch, teeth, depth = OUTLINES[shape]
    notch_depth = notch * np.exp(-((x / 0.35) ** 2))
    waves = np.sin(np.pi * teeth * (x * 0.8 + 0.5))
    tooth_depth = depth * np.abs(waves)
    u = (y + 1) / 2 / (1 - notch_depth - tooth_depth)

    inside = np.clip(u, 1e-4, 1 - 1e-4)
    # u^a (1 - u)^b is largest at u = a / (a + b)
    u_widest = a / (a + b)
    widest = u_widest**a * (b / (a + b)) ** b
    half = inside**a * (1 - inside) ** b / widest
    # edges that are a little wavy
    frequency = rng.uniform(6, 14)
    phase = rng.uniform(0, 6)
    half *= 1 + 0.05 * np.sin(inside * frequency + phase)
    return u, half


def petal_colour(paint: list[Array], pattern: str, x: Array, u: Array, noise: Array) -> Array:
    """Return (H, W, 3): the three colours of `paint` blend from base over body to tip."""
    base, body, tip = paint
    ragged_u = u + 0.06 * noise  # the colours have no straight borders
    body_weight = smooth(0.05, 0.42, ragged_u)
    tip_weight = smooth(0.6, 1, ragged_u)
    if pattern == "stripe":  # the base's colour runs up the middle
        middle = np.exp(-((x / 0.16) ** 2))
        body_weight *= 1 - 0.9 * middle * (1 - smooth(0.6, 0.95, u))
    to_body = (body - base) * body_weight[..., None]
    to_tip = (tip - body) * tip_weight[..., None]
    return base + to_body + to_tip


def petal_light(
    pattern: str,
    x: Array,
    u: Array,
    half: Array,
    noise: Array,
    rng: Rng,
) -> Array:
    """Return the brightness (H, W): a dark base, a crease, curled edges, folds, the pattern."""
    across = x / (half + 0.05)  # -1 to 1 from edge to edge
    crease = np.exp(-((x / 0.07) ** 2))
    folds = np.sin(across * 14 + noise)
    light = 0.72 + 0.3 * smooth(0, 0.45, u) - 0.2 * across**2 - 0.1 * crease
    light += 0.05 * noise + 0.04 * folds
    if pattern == "veins":
        lines = np.abs(np.sin(across * 7 + 0.4 * noise))
        light -= 0.2 * smooth(0.75, 1, lines) * (1 - smooth(0.35, 0.95, u))
    elif pattern == "check":
        rows = np.sin(u * 22 + noise)
        columns = np.sin(across * 7)
        light += 0.26 * np.sign(rows * columns)
    elif pattern == "spots":
        spots = rng.uniform((-0.6, 0.12), (0.6, 0.72), (22, 2))
        for spot_x, spot_u in spots:
            dx = (x - spot_x) / 0.11
            du = (u - spot_u) / 0.025
            light -= 0.7 * (dx**2 + du**2 < 1)
    return light


def draw_petal(shape: str, paint: list[Array], pattern: str, rng: Rng, pixels: int) -> Array:
    """Return the sprite of a petal. paint: RGB of base, body and tip; pattern: see Petals."""
    x, y = plane(pixels)
    u, half = petal_outline(shape, x, y, rng)
    # the distance to the nearest edge, sideways or lengthwise, becomes an edge of two pixels
    sideways = half - np.abs(x)
    lengthwise = 2 - np.abs(4 * u - 2)
    margin = np.minimum(sideways, lengthwise)
    alpha = np.clip(margin * pixels / 4 + 0.5, 0, 1)

    noise = clouds(rng, pixels, 6)
    colour = petal_colour(paint, pattern, x, u, noise)
    light = petal_light(pattern, x, u, half, noise, rng)
    soft_edge = cv2.GaussianBlur(alpha, (3, 3), 0)
    shadow = 0.5 * cv2.GaussianBlur(alpha, (0, 0), pixels * 0.045)
    return sprite(colour, light, soft_edge, shadow)


# -----------------------------------------------------------------------------
# discs and heads


def draw_disc(disc: Disc, paints: Paints, rng: Rng) -> Array:
    """Return the sprite of a domed centre, of radius 1."""
    x, y = plane(DISC_PIXELS)
    r = np.hypot(x, y)
    rim_name, middle_name = disc.paint.split()
    rim, middle = paints[rim_name], paints[middle_name]
    noise = clouds(rng, DISC_PIXELS, 7)
    rim_weight = smooth(0.2, 0.95, r + 0.1 * noise)
    colour = middle + (rim - middle) * rim_weight[..., None]
    for i in range(disc.florets):
        distance = np.sqrt((i + 0.5) / disc.florets) * 0.95
        turn = i * GOLDEN_ANGLE
        direction = np.array((np.sin(turn), np.cos(turn)))
        position = direction * distance
        pixel = (position / SPAN + 1) * DISC_PIXELS / 2
        column, row = pixel.round().astype(int).tolist()
        shade = 1 if i % 2 else 0.65
        floret = (middle + (rim - middle) * distance) * shade
        cv2.circle(colour, (column, row), 2, floret.tolist(), -1)

    light = 1.05 - 0.35 * r**2
    if disc.florets:
        light = light + 0.15 * (y - x)
    alpha = np.clip((1 - r) * DISC_PIXELS / 4 + 0.5, 0, 1)
    shadow = 0.5 * (1 - smooth(0.9, 1.2, r))
    return sprite(colour, light, alpha, shadow)


def stamp_petals(
    canvas: Array,
    petals: Petals,
    colours: list[Array],
    angles: Array,
    centre: Point,
    unit: float,
    sun: float,
    rng: Rng,
) -> None:
    """Stamp one petal at every angle (degrees) around `centre`, each a little different.

    unit: pixels in the head's radius; sun: where the light comes from, radians.
    """
    pixels = int(np.clip(1.2 * petals.length * unit, 24, 80))
    petal = draw_petal(petals.shape, colours, petals.pattern, rng, pixels)
    for angle in angles + rng.normal(0, 4, len(angles)):
        length = petals.length * rng.normal(1, 0.04)
        width = petals.width * rng.normal(1, 0.05)
        turn = np.radians(angle)
        distance = (petals.start + length / 2) * unit  # from the ring's to the petal's centre
        position = clockwise(centre, turn, distance)
        half = (width / 2 * unit, length / 2 * unit)
        lit = np.cos(turn - sun)
        gain = 1 + 0.1 * lit + rng.normal(0, 0.03)
        stamp(canvas, petal, position, half, angle, gain)


def draw_stamens(
    canvas: Array,
    stamens: Stamens,
    paints: Paints,
    phase: float,
    centre: Point,
    unit: float,
    rng: Rng,
) -> None:
    """Draw the filaments and anthers around `centre`; phase: the first one's angle, degrees."""
    filament_name, anther_name = stamens.paint.split()
    filament = (*paints[filament_name].tolist(), 1.0)
    anther = (*paints[anther_name].tolist(), 1.0)
    foot = (round(centre[0]), round(centre[1]))
    line_width = max(1, round(0.022 * unit))
    anther_size = 0.055 if stamens.count < 10 else 0.03
    anther_radius = max(1, round(anther_size * unit))

    even = phase + np.arange(stamens.count) * 360 / stamens.count
    for turn in np.radians(even + rng.normal(0, 4, stamens.count)):
        length = stamens.length * unit * rng.uniform(0.82, 1.05)
        x, y = clockwise(centre, turn, length)
        end = (round(x), round(y))
        cv2.line(canvas, foot, end, filament, line_width)
        cv2.circle(canvas, end, anther_radius, anther, -1)


def draw_head(
    kind: Kind, head_paints: tuple[str, ...], paints: Paints, rng: Rng, pixels: int
) -> Array:
    """Return the sprite of one flower head, of radius 1; head_paints: one of the kind's paints."""
    canvas = np.zeros((pixels, pixels, 4), np.float32)
    middle = pixels / 2
    unit = pixels / (2 * SPAN)  # pixels in the head's radius
    phase = rng.normal(0, 4)  # degrees
    sun = rng.uniform(0, 360)  # radians: a random direction

    # Discs may refer to the colours of the petals.
    base, body, tip = head_paints[0].split()
    paints = paints | {"base": paints[base], "body": paints[body], "tip": paints[tip]}

    for order, part in enumerate(kind.parts):
        x, y = part.at
        centre = (middle + x * unit, middle - y * unit)
        if isinstance(part, Petals):
            paint = head_paints[part.paint] if isinstance(part.paint, int) else part.paint
            colours = [paints[name] for name in paint.split()]
            if isinstance(part.angles, int):
                # Every second ring stands in the gaps of the one before it.
                steps = np.arange(part.angles) + order % 2 / 2
                angles = phase + steps * 360 / part.angles
            else:
                angles = np.array(part.angles, float)
            stamp_petals(canvas, part, colours, angles, centre, unit, sun, rng)
        elif isinstance(part, Disc):
            height = part.radius * part.squash
            half = (part.radius * unit, height * unit)
            stamp(canvas, draw_disc(part, paints, rng), centre, half)
        else:
            draw_stamens(canvas, part, paints, phase, centre, unit, rng)
    return canvas
