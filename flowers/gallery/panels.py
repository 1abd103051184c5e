"""The parts of web.py that know nothing of its state, as HTML: pictures, charts, rankings. Drawn here, as a browser takes a second to load a library
of charts. Names are escaped; what carries data-open opens something when it is clicked. ELEMENT shows such HTML and hands on the clicks."""

import base64
from collections.abc import Iterable
from html import escape

import numpy as np

from flowers import colour
from flowers.data import Flowers
from flowers.gallery.data import palette

BLUE, ORANGE = "0 114 178", "213 94 0"  # of figures.PALETTE: legible on light and dark
CSS = """
.root { font: 13px/1.3 var(--st-font); color: var(--st-text-color) }
button { all: unset; box-sizing: border-box; cursor: pointer; min-width: 0; border: 1px solid transparent; background-origin: border-box }
button:hover, button:focus-visible, button.on { border-color: var(--st-text-color) }
p { margin: 2px 0 0; overflow-wrap: anywhere }
.pictures, .bars { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)) }
.pictures button { display: flex; flex-direction: column; border-radius: 6px; padding: 3px }
.pictures img, .none { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 4px; background: var(--st-secondary-background-color) }
.none { display: grid; place-items: center }
.image { display: grid; gap: 24px; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); font-size: 15px }
.image img { max-width: 100%; border-radius: 4px } h3 { margin: 0; font-size: 24px } ul { padding-left: 18px }
.bars { gap: 3px; grid-template-columns: repeat(auto-fill, minmax(155px, 1fr)); max-height: 380px; overflow-y: auto }
.bars button { display: flex; justify-content: space-between; gap: 6px; padding: 1px 5px }
.bars span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.matrix { display: grid; overflow-x: auto; font-size: 10px; gap: 1px }
.matrix span { position: sticky; left: 0; padding-right: 4px; text-align: right; white-space: nowrap; background: var(--st-background-color) }
.matrix .top { position: static; writing-mode: vertical-rl; rotate: 180deg; padding: 4px 0 0; line-height: 1; justify-self: center; text-align: left }
.matrix button { height: 17px; text-align: center }
.strip { display: flex; gap: 2px; justify-content: space-between; font: 10px var(--st-code-font); margin: 6px 0 12px }
svg { display: block; width: 100%; height: 110px; border-bottom: 1px solid currentColor }
polyline { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke }
table { width: 100%; margin: 10px 0; border-collapse: collapse }
td { padding: 3px 6px; border-bottom: 1px solid var(--st-border-color) } td + td { text-align: right } th { text-align: left; padding: 3px 6px }
"""
JS = """
export default function({ data, parentElement, setTriggerValue }) {
    const root = parentElement.querySelector(".root"), html = new TextDecoder().decode(data);
    if (root.shown !== html) { root.innerHTML = root.shown = html; root.busy = 0 }
    root.onclick = event => {  // the second click of two would come between, and open half of what the first one asked for
        const hit = event.target.closest("[data-open]");
        if (hit && !(root.busy > Date.now())) { root.busy = Date.now() + 700; setTriggerValue("open", hit.dataset.open) }
    };
}
"""
ELEMENT = {"html": '<div class="root"></div>', "css": CSS, "js": JS}


def plain(text: str) -> str:
    """Text that markdown leaves as it is."""
    return " ".join(text.split()).translate({ord(c): "\\" + c for c in "\\`*_{}[]()<>#$|:~!+-."})


def picture(jpeg: bytes, name: str) -> str:
    """A picture within the page: an address of its own might be gone before the browser asks for it."""
    return (
        f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" alt="{escape(name)}">'
    )


def pictures(shown: Iterable[tuple[int, bytes, list[str]]]) -> str:
    """A grid; shown: id, thumbnail (no bytes: damaged) and lines of text of each picture. Each opens its id."""
    return (
        '<div class="pictures">'
        + "".join(
            f'<button data-open="{i}">{picture(jpeg, lines[0]) if jpeg else "<div class=none>damaged</div>"}'
            f"{''.join(f'<p>{escape(line)}</p>' for line in lines)}</button>"
            for i, jpeg, lines in shown
        )
        + "</div>"
    )


def image(
    jpeg: bytes,
    rgb: np.ndarray,
    name: str,
    facts: list[str],
    captions: list[str],
    rankings: Iterable[tuple[str, list]],
) -> str:
    """A picture at full size and what is known of it; rgb: its pixels (H, W, 3)."""
    left = (
        picture(jpeg, name)
        + "<ul>"
        + "".join(f"<li>{escape(line)}</li>" for line in captions)
        + "</ul>"
    )
    right = "".join(
        [
            f"<h3>{escape(name)}</h3>",
            *(f"<p>{escape(line)}</p>" for line in facts),
            *(ranking(*r) for r in rankings),
            colours(rgb),
        ]
    )
    return f'<div class="image"><div>{left}</div><div>{right}</div></div>'


def filled(share: float) -> str:
    """The style of a bar that a text stands on."""
    return f"background-image:linear-gradient(90deg,rgb({BLUE} / 0.4) {100 * share:.1f}%,#0000 0)"


def class_histogram(flowers: Flowers, index: np.ndarray, chosen: str | None) -> str:
    """Images of each class at `index`, most first; each opens its number, `chosen` stands out."""
    counts = np.bincount(flowers.labels[index], minlength=len(flowers.class_names))
    bars = (
        (c, escape(flowers.class_names[c]), flowers.class_names[c] == chosen)
        for c in np.argsort(-counts, kind="stable")
        if counts[c]
    )
    return (
        '<div class="bars">'
        + "".join(
            f'<button data-open="{c}" class="{"on" * on}" title="{name}" style="{filled(counts[c] / counts.max())}"><span>{name}</span>{counts[c]}</button>'
            for c, name, on in bars
        )
        + "</div>"
    )


def hsv_curves(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Densities of a picture (H, W, 3): hue, by chroma, at 120 angles (none: 0), saturation and value at 65 levels from 0 to 1."""
    row, angle, level = (
        colour.measure(rgb, "none"),
        (np.arange(120) + 0.5) / 120,
        np.linspace(0, 1, 65),
    )
    hue = (
        colour.density(row, colour.HUE, angle) if row[colour.HUE].sum() else np.zeros(120)
    )  # grey has no hue
    return (
        hue,
        colour.density(row, colour.SATURATION, level),
        colour.density(row, colour.VALUE, level),
    )


def colours(rgb: np.ndarray) -> str:
    """The palette of a picture (H, W, 3), each colour at least wide enough for its name, and its HSV curves."""
    hue, *curves = hsv_curves(rgb)
    strip = "".join(
        f'<div style="flex:{max(share, 0.15):.3f}"><div style="height:36px;background:{shade};box-shadow:inset 0 0 0 1px #8888"></div>{shade}</div>'
        for shade, share in palette(rgb)
    )
    bars = "".join(
        f'<rect x="{k}" y="{100 - h:.1f}" width="1.05" height="{h:.1f}" fill="hsl({3 * k + 1.5} 85% 50%)"/>'
        for k, h in enumerate(100 * hue / max(hue.max(), 1e-9))
    )
    top = max(curve.max() for curve in curves)
    lines = "".join(
        f'<polyline stroke="rgb({shade})" points="{" ".join(f"{x},{100 - 97 * y / top:.1f}" for x, y in enumerate(curve))}"/>'
        for shade, curve in zip((BLUE, ORANGE), curves)
    )

    def chart(title, width, shapes, ticks):
        ticks = "".join(f"<span>{tick}</span>" for tick in ticks)
        return f'{title}<svg viewBox="0 0 {width} 100" preserveAspectRatio="none">{shapes}</svg><div class="strip">{ticks}</div>'

    keys = f'<b style="color:rgb({BLUE})">■</b> saturation and <b style="color:rgb({ORANGE})">■</b> value; density up to {top:.1f}'
    return (
        f'<div class="strip">{strip}</div>'
        + chart(
            f"hue (degrees), by chroma; density up to {hue.max():.1f}", 120, bars, range(0, 361, 60)
        )
        + chart(keys, 64, lines, (0, 0.25, 0.5, 0.75, 1))
    )


def ranking(title: str, best: Iterable[tuple[str, float]]) -> str:
    """Names with their probabilities."""
    rows = "".join(
        f'<tr style="{filled(share)}"><td>{escape(name)}</td><td>{100 * share:.1f}%</td></tr>'
        for name, share in best
    )
    return f"<table><tr><th>{escape(title)}</th></tr>{rows}</table>"


def confusion(names: list[str], true: np.ndarray, given: np.ndarray) -> str:
    """How many images of each class (row, by number) are given each name (column): the share of the row is the shade. Each cell opens 'true,given'."""
    shown = sorted(set(true.tolist()) | set(given.tolist()), key=lambda c: names[c])
    place = {c: k + 2 for k, c in enumerate(shown)}
    pairs, counts = np.unique(np.stack([true, given]), axis=1, return_counts=True)
    total = np.bincount(true)
    labels = "".join(
        f'<span style="grid-area:{k}/1">{escape(names[c])}</span><span class="top" style="grid-area:1/{k}">{escape(names[c])}</span>'
        for c, k in place.items()
    )
    cells = "".join(
        f'<button data-open="{t},{g}" title="{escape(names[t])} → {escape(names[g])}: {n} of {total[t]}" style="grid-area:{place[t]}/{place[g]};'
        f'background:rgb({BLUE if t == g else ORANGE} / {0.25 + 0.5 * n / total[t]:.2f})">{n if len(shown) <= 30 else ""}</button>'
        for t, g, n in zip(*pairs.tolist(), counts.tolist())
    )
    return f'<div class="matrix" style="grid-template-columns:max-content repeat({len(shown)},minmax(10px,1fr))">{labels}{cells}</div>'
