"""Grids of pictures, charts and rankings as HTML. Nothing here knows of the state of the page.

Charts are drawn here, since a browser takes a second to load a library of charts. All names and
texts are escaped. An element with `data-open` opens something when it is clicked: ELEMENT, the
Streamlit component that shows the HTML, hands the value of `data-open` on.
"""

import base64
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from flowers.data import Flowers
from flowers.gallery.colours import hsv_curves, palette

# The first two colours of figures.PALETTE: legible on light and dark.
BLUE = "0 114 178"
ORANGE = "213 94 0"

FEW = 12  # pictures that one row of a wide window has room for
MIN_STRIP = 0.15  # of the palette's width: a colour is wide enough for its name

# A command in a message: the program with its flags, and not the words that follow.
VALUE = r"""(?:'[^']*'|"[^"]*"|[^\s;'"-][^\s;'"]*)+"""
FLAG = rf"(?: --(?=\s)| \[?--\w+\]?(?:[= ]{VALUE})?)"
COMMAND = re.compile(rf"(?:python (?:-m )?[\w./]+|streamlit run [\w./]+){FLAG}*(?<![.,)])")

MARKDOWN = "\\`*_{}[]()<>#$|:~!+-."  # characters with a meaning in markdown

_folder = Path(__file__).parent
ELEMENT = {
    "html": '<div class="root"></div>',
    "css": (_folder / "page.css").read_text(encoding="utf-8"),
    "js": (_folder / "page.js").read_text(encoding="utf-8"),
}

# Around the views: Streamlit leaves 90 pixels blank at the top, for a bar that is empty here, and
# writes the names of chosen runs in white on a light blue.
PAGE_STYLE = """
[data-testid=stMainBlockContainer] { padding: 1rem 2rem 2rem; }
[data-tag] { background: none !important; color: inherit !important; }
[data-tag] { border: 1px solid currentColor !important; }
[data-testid=stHeader] { height: 0; min-height: 0; background: none; }
#vg-tooltip-element img { width: 96px; max-width: none; max-height: none; }
@media (max-width: 640px) {
  [data-testid=stMainBlockContainer] { padding-left: 0.75rem; padding-right: 0.75rem; }
}
"""


def plain(text: str) -> str:
    """Return text that markdown shows as it is, on one line."""
    escapes = {ord(character): "\\" + character for character in MARKDOWN}
    return " ".join(text.split()).translate(escapes)


def message(text: str) -> str:
    """Return a message as markdown: its commands as code to be copied, the rest as it is.

    As text, `--` would become a dash, and underscores would be gone.
    """
    parts = []
    end = 0  # of what has been taken over
    for command in COMMAND.finditer(text):
        parts.append(plain(text[end : command.start()].lstrip(" ;.")))
        parts.append(f"\n```shell\n{command[0]}\n```\n")
        end = command.end()
    parts.append(plain(text[end:].lstrip(" ;.")))
    return "".join(parts).strip()


# -----------------------------------------------------------------------------
# pieces that several panels use


def paragraphs(lines: Iterable[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def picture(jpeg: bytes, name: str) -> str:
    """Return a picture with its bytes in it.

    A picture at an address of its own might be gone before the browser asks for it.
    """
    text = base64.b64encode(jpeg).decode()
    return f'<img src="data:image/jpeg;base64,{text}" alt="{escape(name)}">'


def bar(fraction: float) -> str:
    """Return the style of an element whose background is a bar of this length, from 0 to 1."""
    percent = 100 * fraction
    return f"background-image:linear-gradient(90deg,rgb({BLUE} / 0.4) {percent:.1f}%,#0000 0)"


# -----------------------------------------------------------------------------
# pictures


def pictures(items: Iterable[tuple[int, str, bytes, list[str]]], left: int | None = None) -> str:
    """Return a grid of pictures that open their ids.

    items: id, link, JPEG (no bytes: the file is damaged) and lines of text of each picture. left:
    the id of the picture that a visitor comes back from, which stands out.
    """
    links = []
    for i, link, jpeg, lines in items:
        shown = picture(jpeg, lines[0]) if jpeg else "<div class=none>damaged</div>"
        emphasis = ' class="on"' if i == left else ""
        attributes = f'data-open="{i}" href="{escape(link)}"{emphasis}'
        links.append(f"<a {attributes}>{shown}{paragraphs(lines)}</a>")
    few = " few" if len(links) <= FEW else ""
    return f'<div class="pictures{few}">{"".join(links)}</div>'


def image(
    jpeg: bytes,
    rgb: np.ndarray,
    name: str,
    facts: list[str],
    captions: list[str],
    rankings: Iterable[tuple[str, list]],
    note: str = "",
) -> str:
    """Return a picture at full size beside its class name, facts, rankings and colours.

    rgb: the pixels of the picture, (H, W, 3) uint8. rankings: the two arguments of `ranking`
    for each run. note: stands below them.
    """
    sentences = "".join(f"<li>{escape(caption)}</li>" for caption in captions)
    left = f"{picture(jpeg, name)}<ul>{sentences}</ul>"
    tables = "".join(ranking(title, best) for title, best in rankings)
    notes = paragraphs([note] if note else [])
    middle = f"<h3>{escape(name)}</h3>{paragraphs(facts)}{tables}{notes}"
    columns = "".join(f"<div>{column}</div>" for column in (left, middle, colours(rgb)))
    return f'<div class="image">{columns}</div>'


def ranking(title: str, best: Iterable[tuple[str, float]]) -> str:
    """Return a table of names with their probabilities, each a bar."""
    rows = []
    for name, probability in best:
        cells = f"<td>{escape(name)}</td><td>{100 * probability:.1f}%</td>"
        rows.append(f'<tr style="{bar(probability)}">{cells}</tr>')
    return f"<table><tr><th>{escape(title)}</th></tr>{''.join(rows)}</table>"


def table(rows: Sequence[dict[str, str]], meanings: dict[str, str]) -> str:
    """Return a table of texts, a row each, under the names of their columns.

    rows: a row may lack columns. meanings: of columns, shown under the mouse.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    heads = []
    for name in names:
        title = f' title="{escape(meanings[name])}"' if name in meanings else ""
        heads.append(f"<th{title}>{escape(name)}</th>")
    lines = [f"<tr>{''.join(heads)}</tr>"]
    for row in rows:
        cells = "".join(f"<td>{escape(row.get(name, ''))}</td>" for name in names)
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="table"><table>{"".join(lines)}</table></div>'


def maps(rows: Iterable[Sequence[tuple[bytes, list[str]]]], shades: Sequence[str]) -> str:
    """Return pictures with maps painted over them, and the legend of their colours.

    rows: those that stand side by side, each a JPEG and the lines of text above it. shades: the
    colours of the map from 0 to the most relevant place, as '#rrggbb'.
    """
    html = []
    for row in rows:
        cells = []
        for jpeg, lines in row:
            cells.append(f"<div>{paragraphs(lines)}{picture(jpeg, ', '.join(lines))}</div>")
        html.append(f'<div class="maps">{"".join(cells)}</div>')
    gradient = f"background:linear-gradient(90deg,{','.join(shades)})"
    ends = "<span>not at all</span><span>the most relevant place of each map</span>"
    bar = f'<div class="legend"><div style="{gradient}"></div><div class="strip">{ends}</div></div>'
    return f'{bar}<div class="rows">{"".join(html)}</div>'


# -----------------------------------------------------------------------------
# colours of one picture


def colours(rgb: np.ndarray) -> str:
    """Return the palette of a picture (H, W, 3) uint8 and its HSV curves."""
    hue, saturation, value = hsv_curves(rgb)
    top = max(saturation.max(), value.max())
    hue_title = (
        "hue in degrees, vivid pixels counting more than pale ones; "
        f"the top of the chart is a density of {hue.max():.1f}"
    )
    hue_chart = chart(hue_title, len(hue), hue_bars(hue), range(0, 361, 60))
    curves_title = (
        f'<b style="color:rgb({BLUE})">■</b> saturation and '
        f'<b style="color:rgb({ORANGE})">■</b> value (brightness), both from 0 to 1; '
        f"the top of the chart is a density of {top:.1f}"
    )
    curves = polyline(saturation, top, BLUE) + polyline(value, top, ORANGE)
    curves_chart = chart(curves_title, len(value) - 1, curves, (0, 0.25, 0.5, 0.75, 1))
    return palette_strip(rgb) + hue_chart + curves_chart


def palette_strip(rgb: np.ndarray) -> str:
    """Return the main colours of a picture side by side, as wide as they are frequent."""
    blocks = []
    for shade, fraction in palette(rgb):
        style = f"height:36px;background:{shade};box-shadow:inset 0 0 0 1px #8888"
        width = max(fraction, MIN_STRIP)
        blocks.append(f'<div style="flex:{width:.3f}"><div style="{style}"></div>{shade}</div>')
    return f'<div class="strip">{"".join(blocks)}</div>'


def hue_bars(hue: np.ndarray) -> str:
    """Return a density of hue as bars in the colours of their hues, 1 wide and at most 100 high."""
    degrees = 360 / len(hue)  # of one bar
    heights = 100 * hue / max(hue.max(), 1e-9)  # a grey picture has no hue
    bars = []
    for k, height in enumerate(heights):
        middle = degrees * (k + 0.5)
        # A little wider than 1, or the background would shine through between two bars.
        size = f'x="{k}" y="{100 - height:.1f}" width="1.05" height="{height:.1f}"'
        bars.append(f'<rect {size} fill="hsl({middle} 85% 50%)"/>')
    return "".join(bars)


def polyline(curve: np.ndarray, top: float, colour: str) -> str:
    """Return a curve of values from 0 to `top` as a line, each step 1 wide, and 97 high at most."""
    # y points down; 97 leaves room for the width of the line.
    points = " ".join(f"{x},{100 - 97 * y / top:.1f}" for x, y in enumerate(curve))
    return f'<polyline stroke="rgb({colour})" points="{points}"/>'


def chart(title: str, width: int, shapes: str, ticks: Iterable[float]) -> str:
    """Return shapes on a plane `width` x 100, stretched to the width there is, with their ticks.

    The title is HTML.
    """
    view = f'viewBox="0 0 {width} 100" preserveAspectRatio="none"'
    labels = "".join(f"<span>{tick}</span>" for tick in ticks)
    return f'{title}<svg {view}>{shapes}</svg><div class="strip">{labels}</div>'


# -----------------------------------------------------------------------------
# counts of many images


def class_histogram(flowers: Flowers, index: np.ndarray, chosen: str | None) -> str:
    """Return the number of images at `index` of each class, the largest first.

    A bar opens the number of its class; the class with the name `chosen` stands out.
    """
    counts = np.bincount(flowers.labels[index], minlength=len(flowers.class_names))
    bars = []
    for c in np.argsort(-counts, kind="stable"):
        if counts[c] == 0:
            continue
        name = escape(flowers.class_names[c])
        emphasis = "on" if flowers.class_names[c] == chosen else ""
        attributes = f'data-open="{c}" class="{emphasis}" title="{name}"'
        style = bar(counts[c] / counts.max())
        bars.append(f'<button {attributes} style="{style}"><span>{name}</span>{counts[c]}</button>')
    return f'<div class="bars">{"".join(bars)}</div>'


def confusion(
    names: Sequence[str],
    classes: Sequence[int],
    true: np.ndarray,
    predicted: np.ndarray,
    other: np.ndarray | None = None,
) -> str:
    """Return a matrix of how many images of each class (row) are given each name (column).

    names: of all classes; classes: those that have a row and a column, in order; true, predicted:
    class numbers of each image, (n,) int. The stronger a cell is shaded, the larger its part of the
    row. With `other`, the names that another run gives, the cells say how many images more that run
    puts there, or fewer. Each cell opens 'true,predicted', as numbers.
    """
    line_of = {c: k for k, c in enumerate(classes, 2)}  # of the grid; line 1 holds the names
    labels = "".join(matrix_labels(names[c], line) for c, line in line_of.items())
    counts = count_pairs(true, predicted)
    if other is not None:
        before = counts
        counts = count_pairs(true, other)
        counts.subtract(before)
    row_totals = np.bincount(true)
    cells = []
    for (t, p), count in counts.items():
        if count == 0:
            continue
        total = row_totals[t]
        said = f"{count} of {total}" if other is None else f"{count:+d} of {total}"
        title = f"{escape(names[t])} → {escape(names[p])}: {said}"
        colour = BLUE if (t == p if other is None else count > 0) else ORANGE
        shade = f"rgb({colour} / {0.25 + 0.5 * abs(count) / total:.2f})"
        # The outline is as strong in every cell: a single image must be seen, too.
        outline = f"border-color:rgb({colour})"
        style = f"grid-area:{line_of[t]}/{line_of[p]};background:{shade};{outline}"
        number = count if other is None else f"{count:+d}"
        attributes = f'data-open="{t},{p}" title="{title}" style="{style}"'
        cells.append(f"<button {attributes}>{number}</button>")

    columns = f"grid-template-columns:max-content repeat({len(classes)},minmax(var(--cell),60px))"
    corner = '<span class="corner">true ↓ named →</span>'
    return f'<div class="matrix" style="{columns}">{corner}{labels}{"".join(cells)}</div>'


def count_pairs(true: np.ndarray, predicted: np.ndarray) -> Counter:
    """Return how many images have each pair of class and name."""
    return Counter(zip(true.tolist(), predicted.tolist()))


def legend(*meanings: str) -> str:
    """Return what the blue and the orange cells of a matrix mean, as HTML."""
    colours = (BLUE, ORANGE)
    return "&emsp;".join(
        f'<b style="color:rgb({colour})">■</b> {escape(meaning)}'
        for colour, meaning in zip(colours, meanings)
    )


def matrix_labels(name: str, line: int) -> str:
    """Return the name of a class at the left of its row and above its column."""
    left = f'<span style="grid-area:{line}/1">{escape(name)}</span>'
    above = f'<span class="top" style="grid-area:1/{line}">{escape(name)}</span>'
    return left + above
