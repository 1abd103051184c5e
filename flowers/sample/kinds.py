"""The tables of the sample dataset: paints, petal outlines, the 24 kinds of flower, layouts.

Colours and backgrounds are shared between the kinds on purpose: a model has to look at structure.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# sRGB, 0 to 255. The first N_FLOWER_PAINTS are colours that flowers have; the rest are leaves,
# soil and shadows.
N_FLOWER_PAINTS = 18
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


class Outline(NamedTuple):
    """Outline of a petal: half width u^a (1 - u)^b at the distance u from base (0) to tip (1)."""

    a: float
    b: float
    notch: float = 0  # depth of a notch in the tip, in petal lengths
    teeth: float = 0  # number of teeth at the tip
    depth: float = 0  # depth of the teeth, in petal lengths


OUTLINES = {
    "oval": Outline(a=0.6, b=0.5),
    "spear": Outline(a=0.6, b=0.95),
    "drop": Outline(a=0.9, b=0.45),
    "strap": Outline(a=0.35, b=0.22, notch=0.07),
    "round": Outline(a=0.75, b=0.3, notch=0.06),
    "heart": Outline(a=0.9, b=0.36, notch=0.3),
    "fan": Outline(a=0.85, b=0.16, teeth=2.5, depth=0.05),
    "bell": Outline(a=0.42, b=0.02, teeth=2.5, depth=0.12),
}

# -----------------------------------------------------------------------------
# what a flower head is made of; lengths in units of the head's radius, y up


@dataclass(frozen=True)
class Petals:
    """A ring or a fan of petals of one shape."""

    angles: int | tuple[float, ...]  # so many, evenly around; or degrees clockwise from the top
    shape: str  # a key of OUTLINES
    length: float
    width: float
    start: float = 0.0  # distance from the ring's centre to the base of the petals
    at: tuple[float, float] = (0.0, 0.0)  # centre of the ring
    paint: int | str = 0  # index of one of the picture's paints, or "base body tip"
    pattern: str = ""  # "veins", "spots", "check", "stripe" (up the middle), or plain


@dataclass(frozen=True)
class Disc:
    """A domed centre, with florets in the spiral of a sunflower."""

    radius: float
    paint: str  # "rim middle"
    florets: int = 0
    squash: float = 1.0  # height in parts of the width
    at: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Stamens:
    """A ring of thin filaments, each with an anther at its end."""

    count: int
    length: float
    paint: str  # "filament anther"
    at: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Kind:
    """A kind of flower."""

    layout: str  # how the heads are arranged on the plant, see HEADS and STEMS
    size: float  # radius of a head, in parts of the picture's side
    faces: bool  # seen from the front, at any slant
    # One of these is picked for a picture. Each is one paint, "base body tip", or two paints
    # that the parts refer to by index.
    paints: tuple[tuple[str, ...], ...]
    parts: tuple[Petals | Disc | Stamens, ...]  # from back to front


def fan(first: float, last: float, count: int) -> tuple[float, ...]:
    """`count` angles in degrees, outermost first, so that the middle petals lie in front."""
    angles = np.linspace(first, last, count).tolist()
    middle = (first + last) / 2
    return tuple(sorted(angles, key=lambda angle: -abs(angle - middle)))


KINDS = {
    "sunflower": Kind(
        layout="single",
        size=0.4,
        faces=True,
        paints=(
            ("gold yellow yellow",),
            ("orange gold yellow",),
            ("crimson orange gold",),
        ),
        parts=(
            Petals(17, "spear", length=0.62, width=0.27, start=0.38),
            Petals(17, "spear", length=0.54, width=0.25, start=0.38),
            Disc(radius=0.52, paint="black brown", florets=170),
        ),
    ),
    "oxeye daisy": Kind(
        layout="group",
        size=0.26,
        faces=True,
        paints=(
            ("cream white white",),
            ("yellow white white",),
        ),
        parts=(
            Petals(19, "strap", length=0.76, width=0.19, start=0.22),
            Disc(radius=0.29, paint="orange yellow", florets=50),
        ),
    ),
    "purple coneflower": Kind(
        layout="single",
        size=0.38,
        faces=False,
        paints=(
            ("rose pink pink",),
            ("purple magenta rose",),
        ),
        parts=(
            # petals that hang down below the cone
            Petals(fan(100, 260, 11), "strap", length=0.95, width=0.27, start=0.12, at=(0, 0.35)),
            Disc(radius=0.42, paint="brown orange", florets=90, squash=0.85, at=(0, 0.42)),
        ),
    ),
    "rose": Kind(
        layout="single",
        size=0.43,
        faces=True,
        paints=(
            ("crimson red rose",),
            ("rose pink white",),
            ("orange gold cream",),
        ),
        parts=(
            # rings that lie closer and closer
            Petals(5, "round", length=0.84, width=1.15, start=0.12),
            Petals(4, "round", length=0.72, width=1.05, start=0.06),
            Petals(4, "round", length=0.56, width=0.85, start=0.02),
            Petals(3, "round", length=0.42, width=0.66),
            Petals(3, "round", length=0.29, width=0.42),
            Petals(2, "round", length=0.18, width=0.28),
        ),
    ),
    "tiger lily": Kind(
        layout="single",
        size=0.44,
        faces=True,
        paints=(
            ("yellow orange orange",),
            ("orange scarlet orange",),
            ("lime yellow yellow",),
        ),
        parts=(
            Petals(3, "spear", length=1.0, width=0.42, pattern="spots"),
            Petals(3, "spear", length=1.0, width=0.36, pattern="spots"),
            Stamens(count=6, length=0.55, paint="lime brown"),
        ),
    ),
    "water lily": Kind(
        layout="float",
        size=0.34,
        faces=False,
        paints=(
            ("cream white white",),
            ("rose pink white",),
        ),
        parts=(
            Petals(fan(-96, 96, 9), "spear", length=1.15, width=0.4, at=(0, -0.35)),
            Petals(fan(-72, 72, 8), "spear", length=0.95, width=0.36, at=(0, -0.35)),
            Petals(fan(-50, 50, 5), "spear", length=0.72, width=0.34, at=(0, -0.38)),
            Stamens(count=24, length=0.3, paint="gold yellow", at=(0, -0.2)),
            # petals in front of the stamens
            Petals(fan(115, 245, 5), "spear", length=0.5, width=0.36, at=(0, -0.3)),
        ),
    ),
    "daffodil": Kind(
        layout="pair",
        size=0.3,
        faces=True,
        paints=(
            ("gold yellow yellow", "orange gold yellow"),
            ("cream white white", "orange orange gold"),
        ),
        parts=(
            Petals(3, "oval", length=1.0, width=0.66),
            Petals(3, "oval", length=0.97, width=0.6),
            # the trumpet
            Petals(11, "round", length=0.52, width=0.28, paint=1),
            Disc(radius=0.34, paint="orange brown"),
            Stamens(count=6, length=0.14, paint="gold yellow"),
        ),
    ),
    "grape hyacinth": Kind(
        layout="spike",
        size=0.062,
        faces=False,
        paints=(
            ("navy blue sky",),
            ("purple violet lilac",),
        ),
        parts=(
            # one small bell with a white rim
            Petals((180,), "oval", length=2.1, width=2.0, start=-1.0),
            Disc(radius=0.32, paint="white cream", squash=0.5, at=(0, -0.85)),
        ),
    ),
    "foxglove": Kind(
        layout="raceme",
        size=0.15,
        faces=False,
        paints=(
            ("purple magenta rose",),
            ("rose pink pink",),
            ("purple violet lilac",),
        ),
        parts=(
            Petals((180,), "bell", length=1.9, width=1.3, start=-1.0),
            # the mouth, and its spotted throat
            Disc(radius=0.66, paint="tip tip", squash=0.62, at=(0, -0.76)),
            Disc(radius=0.46, paint="white base", florets=12, squash=0.58, at=(0, -0.8)),
        ),
    ),
    "wild pansy": Kind(
        layout="single",
        size=0.38,
        faces=False,
        paints=(
            ("purple violet violet", "gold yellow yellow"),
            ("navy purple purple", "lilac white white"),
            ("crimson crimson red", "yellow gold red"),
        ),
        parts=(
            Petals((-30, 30), "round", length=1.0, width=1.0),
            # the face: two petals at the sides and one below
            Petals((-98, 98), "round", length=0.92, width=0.85, paint=1, pattern="veins"),
            Petals((180,), "fan", length=0.98, width=1.25, paint=1, pattern="veins"),
            Disc(radius=0.1, paint="orange lime"),
        ),
    ),
    "corn poppy": Kind(
        layout="single",
        size=0.4,
        faces=True,
        paints=(
            ("black scarlet scarlet",),
            ("black red red",),
            ("black orange orange",),
        ),
        parts=(
            Petals(2, "oval", length=1.05, width=1.55, pattern="veins"),
            Petals(2, "oval", length=1.0, width=1.45, pattern="veins"),
            Stamens(count=30, length=0.36, paint="black purple"),
            Disc(radius=0.15, paint="green lime", florets=9),
        ),
    ),
    "passion flower": Kind(
        layout="single",
        size=0.42,
        faces=True,
        paints=(
            ("lime white white",),
            ("lime lilac lilac",),
        ),
        parts=(
            Petals(5, "oval", length=1.0, width=0.42),
            Petals(5, "oval", length=0.96, width=0.38),
            # the corona, in two rings
            Stamens(count=70, length=0.66, paint="violet sky"),
            Stamens(count=50, length=0.4, paint="white purple"),
            Disc(radius=0.17, paint="purple lime"),
            # five anthers and three stigmas
            Petals(5, "strap", length=0.42, width=0.15, start=0.05, paint="lime lime yellow"),
            Petals(3, "drop", length=0.3, width=0.12, paint="purple purple black"),
        ),
    ),
    "canterbury bells": Kind(
        layout="bells",
        size=0.25,
        faces=False,
        paints=(
            ("purple violet violet",),
            ("rose pink pink",),
            ("lime white white",),
        ),
        parts=(
            Petals(fan(-62, 62, 3), "drop", length=0.62, width=0.7, at=(0, 0.3)),
            # the bell between lobes that stand behind it and lobes that curl
            Petals((0,), "bell", length=1.5, width=1.35, start=-1.05),
            Petals((-102, 102), "drop", length=0.5, width=0.5, start=0.3, at=(0, 0.36)),
            Disc(radius=0.6, paint="body purple", squash=0.46, at=(0, 0.4)),
            Stamens(count=3, length=0.2, paint="cream white", at=(0, 0.42)),
        ),
    ),
    "morning glory": Kind(
        layout="single",
        size=0.36,
        faces=True,
        paints=(
            ("white blue blue",),
            ("white violet purple",),
            ("white rose magenta",),
        ),
        parts=(
            Petals(5, "fan", length=1.0, width=1.42, pattern="stripe"),
            Disc(radius=0.2, paint="white cream"),
            Disc(radius=0.07, paint="lime yellow"),
        ),
    ),
    "magnolia": Kind(
        layout="branch",
        size=0.36,
        faces=False,
        paints=(
            ("magenta pink white",),
            ("cream white white",),
        ),
        parts=(
            Petals(fan(-34, 34, 4), "oval", length=1.8, width=0.76, at=(0, -0.95)),
            Petals((-17, 20), "oval", length=1.6, width=0.82, at=(0, -0.92)),
            Petals((2,), "oval", length=1.35, width=0.85, at=(0, -0.95)),
        ),
    ),
    "fritillary": Kind(
        layout="nod",
        size=0.4,
        faces=False,
        paints=(
            ("crimson crimson rose",),
            ("purple purple magenta",),
            ("lime white cream",),
        ),
        parts=(
            Petals((160, 200), "oval", length=1.75, width=0.95, at=(0, 0.9), pattern="check"),
            Petals((180,), "oval", length=1.75, width=1.0, at=(0, 0.92), pattern="check"),
        ),
    ),
    "globe thistle": Kind(
        layout="group",
        size=0.24,
        faces=True,
        paints=(
            ("navy blue sky",),
            ("purple violet lilac",),
        ),
        parts=(
            # rings of spikes, each smaller and further in
            Petals(30, "spear", length=0.42, width=0.13, start=0.58),
            Petals(28, "spear", length=0.42, width=0.14, start=0.45),
            Petals(24, "spear", length=0.4, width=0.14, start=0.3),
            Petals(17, "spear", length=0.36, width=0.14, start=0.16),
            Petals(9, "spear", length=0.3, width=0.14, start=0.02),
        ),
    ),
    "bearded iris": Kind(
        layout="single",
        size=0.4,
        faces=False,
        paints=(
            ("gold violet violet", "gold purple purple"),
            ("gold yellow cream", "orange gold yellow"),
            ("gold white white", "gold sky blue"),
        ),
        parts=(
            # three standards up, two falls to the sides and one down
            Petals((-38, 38, 0), "round", length=1.05, width=0.8),
            Petals(
                (-118, 118), "round", length=0.98, width=0.58, start=0.02, paint=1, pattern="stripe"
            ),
            Petals(
                (180,), "round", length=1.05, width=0.85, start=-0.05, paint=1, pattern="stripe"
            ),
        ),
    ),
    "bird of paradise": Kind(
        layout="single",
        size=0.43,
        faces=False,
        paints=(
            ("red orange gold", "navy blue blue"),
            ("gold orange orange", "purple violet blue"),
            ("orange gold yellow", "navy blue blue"),
        ),
        parts=(
            # the crest, the tongue, and the beak that they stand on
            Petals((-24, 4, 30, 52), "spear", length=1.25, width=0.32, at=(-0.35, -0.25)),
            Petals((66,), "spear", length=1.2, width=0.2, at=(-0.3, -0.25), paint=1),
            Petals(
                (96,),
                "spear",
                length=1.95,
                width=0.36,
                at=(-0.9, -0.3),
                paint="green green crimson",
            ),
        ),
    ),
    "anthurium": Kind(
        layout="single",
        size=0.4,
        faces=False,
        paints=(
            ("red red scarlet",),
            ("rose pink pink",),
            ("white white white",),
        ),
        parts=(
            # the spathe and the spadix
            Petals((0,), "heart", length=1.95, width=1.85, start=-1.0, pattern="veins"),
            Petals(
                (24,), "strap", length=1.0, width=0.24, at=(-0.1, 0.05), paint="cream yellow gold"
            ),
        ),
    ),
    "hibiscus": Kind(
        layout="single",
        size=0.47,
        faces=True,
        paints=(
            ("crimson red red",),
            ("crimson pink pink",),
            ("red yellow yellow",),
        ),
        parts=(
            Petals(5, "round", length=1.0, width=1.12, pattern="veins"),
            # the column, with stamens along it
            Petals((40,), "strap", length=0.85, width=0.13, paint="red pink yellow"),
            Stamens(count=16, length=0.15, paint="cream gold", at=(0.4, 0.48)),
            Stamens(count=12, length=0.14, paint="cream gold", at=(0.5, 0.6)),
        ),
    ),
    "garden phlox": Kind(
        layout="umbel",
        size=0.115,
        faces=True,
        paints=(
            ("magenta pink pink",),
            ("purple magenta rose",),
            ("violet lilac lilac",),
        ),
        parts=(
            Petals(5, "round", length=1.0, width=0.92),
            Disc(radius=0.1, paint="white yellow"),
        ),
    ),
    "cyclamen": Kind(
        layout="nodding",
        size=0.24,
        faces=False,
        paints=(
            ("crimson rose pink",),
            ("magenta pink white",),
            ("magenta white white",),
        ),
        parts=(
            Petals(fan(-58, 58, 5), "oval", length=1.5, width=0.62, at=(0, -0.6)),
            Disc(radius=0.34, paint="purple crimson", squash=0.55, at=(0, -0.66)),
        ),
    ),
    "moon orchid": Kind(
        layout="arch",
        size=0.22,
        faces=False,
        paints=(
            ("lilac white white", "gold yellow white"),
            ("magenta pink white", "crimson magenta rose"),
            ("lime yellow cream", "red crimson crimson"),
        ),
        parts=(
            Petals((0, 132, 228), "oval", length=0.98, width=0.56),
            Petals((-84, 84), "round", length=1.0, width=1.25, pattern="veins"),
            # the lip
            Petals((180,), "fan", length=0.5, width=0.42, paint=1),
            Disc(radius=0.12, paint="gold white"),
        ),
    ),
}

# -----------------------------------------------------------------------------
# layouts: where the heads and stems are, in parts of the picture's side, y down


class Head(NamedTuple):
    """Where one flower head is."""

    x: float
    y: float
    scale: float = 1  # of the kind's size
    angle: float = 0  # degrees clockwise


class Stem(NamedTuple):
    """A quadratic Bezier curve. Of a plant the foot is relative to where the plant stands."""

    width: float
    foot: tuple[float, float]
    control: tuple[float, float]
    tip: tuple[float, float]


# "spike", "raceme" and "umbel" follow rules (scene.place_heads). All other layouts have one head,
# in the middle.
HEADS = {
    "group": [Head(0.3, 0.33), Head(0.7, 0.42), Head(0.42, 0.74)],
    "nod": [Head(0.5, 0.52)],
    "pair": [Head(0.32, 0.34), Head(0.66, 0.62)],
    "nodding": [Head(0.3, 0.36, 1, -6), Head(0.7, 0.5, 1, 6), Head(0.48, 0.7)],
    "bells": [Head(0.5, 0.27), Head(0.27, 0.58, 1.05, -34), Head(0.73, 0.58, 1.05, 34)],
    "arch": [
        Head(0.25, 0.32, 0.85, -8),
        Head(0.52, 0.25, 0.8),
        Head(0.76, 0.45, 0.95, 6),
        Head(0.46, 0.64, 1.1, 4),
    ],
}

# A layout that is not listed has one stem to each head.
STEMS = {
    "branch": [
        Stem(0.05, foot=(-0.1, 1.0), control=(0.4, 0.85), tip=(0.52, 0.72)),
        Stem(0.035, foot=(0.4, 0.87), control=(0.7, 0.8), tip=(1.1, 0.85)),
    ],
    "nod": [Stem(0.022, foot=(0.28, 1.1), control=(0.8, -0.1), tip=(0.5, 0.2))],
    "arch": [
        Stem(0.02, foot=(-0.2, 1.1), control=(-0.1, 0.0), tip=(0.5, 0.2)),
        Stem(0.015, foot=(-0.2, 0.22), control=(0.7, 0.12), tip=(0.9, 0.6)),
    ],
    "bells": [Stem(0.028, foot=(0, 1.1), control=(0.5, 0.7), tip=(0.5, 0.3))],
    "umbel": [Stem(0.028, foot=(0, 1.1), control=(0.5, 0.7), tip=(0.5, 0.3))],
    "spike": [Stem(0.028, foot=(0, 1.1), control=(0.5, 0.7), tip=(0.5, 0.1))],
    "raceme": [Stem(0.028, foot=(0, 1.1), control=(0.5, 0.7), tip=(0.5, 0.1))],
}
