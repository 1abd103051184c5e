"""The parts of web.py that know nothing of its state: the grid of pictures and the charts."""
import altair as alt
import numpy as np
import pandas as pd

from flowers import colour
from flowers.data import Flowers
from flowers.gallery import palette

GRID_CSS = """
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 8px; font: 13px/1.3 var(--st-font); color: var(--st-text-color) }
button { all: unset; display: flex; flex-direction: column; cursor: pointer; border-radius: 6px; padding: 3px; border: 1px solid transparent; min-width: 0 }
button:hover, button:focus-visible { border-color: var(--st-text-color) }
img, .none { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 4px; background: var(--st-secondary-background-color) }
.none { display: grid; place-items: center }
p { margin: 2px 0 0; overflow-wrap: anywhere }
"""
GRID_JS = """
export default function({ data, parentElement, setTriggerValue }) {
    const grid = parentElement.querySelector(".grid");
    grid.replaceChildren(...data.map(picture => {
        const button = document.createElement("button");
        const image = document.createElement(picture.src ? "img" : "div");
        if (picture.src) { image.src = picture.src; image.alt = picture.lines[0] } else { image.className = "none"; image.textContent = "damaged" }
        button.append(image, ...picture.lines.map(line => Object.assign(document.createElement("p"), { textContent: line })));
        button.onclick = () => setTriggerValue("open", picture.id);
        return button;
    }));
    grid.onkeydown = event => {  // arrows go from picture to picture, Enter opens
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], all = [...grid.children];
        if (step) { event.stopPropagation(); event.preventDefault(); all[all.indexOf(grid.getRootNode().activeElement) + step]?.focus() }
    };
}
"""
GRID = {"html": '<div class="grid"></div>', "css": GRID_CSS, "js": GRID_JS}
LABELS = {"labelOverlap": "greedy", "labelLimit": 110}  # on a narrow screen every second or third name


def plain(text: str) -> str:
    """Text that markdown leaves as it is."""
    return " ".join(text.split()).translate({ord(c): "\\" + c for c in "\\`*_{}[]()<>#$|:~!+-."})


def class_histogram(flowers: Flowers, splits: np.ndarray, index: np.ndarray, chosen: str | None) -> alt.Chart:
    """Images of each class at `index`, stacked by split; `chosen` stands out; the selection `bar` holds the class that was clicked."""
    table = pd.DataFrame({"class": np.array(flowers.class_names)[flowers.labels[index]], "split": splits[index]}).value_counts().reset_index(name="images")
    return alt.Chart(table, height=300).mark_bar().encode(
        alt.X("class:N", sort="-y", title=None, axis=alt.Axis(labelAngle=-90, **LABELS)), alt.Y("images:Q", axis=alt.Axis(tickCount=4)),
        alt.Color("split:N", sort=["train", "val", "test"], legend=alt.Legend(orient="top", title=None)), tooltip=["class", "split", "images"],
        opacity=alt.condition(alt.datum["class"] == chosen, alt.value(1.0), alt.value(0.35)) if chosen else alt.value(1.0),
    ).add_params(alt.selection_point("bar", fields=["class"]))


def hsv_curves(rgb: np.ndarray) -> tuple[alt.Chart, alt.Chart]:
    """Densities of hue, over the hues themselves, and of saturation and value, of a picture (H, W, 3)."""
    row = colour.measure(rgb, "none")
    angle, level = np.arange(0, 360, 3), np.linspace(0, 1, 65)
    hue = colour.density(row, colour.HUE, (angle + 1.5) / 360) if row[colour.HUE].sum() else np.zeros(len(angle))  # grey has no hue
    hues = pd.DataFrame({"from": angle, "to": angle + 3, "density": hue, "colour": [f"hsl({a + 1.5} 85% 50%)" for a in angle]})
    density = alt.Y("density:Q", axis=alt.Axis(tickCount=4))
    first = alt.Chart(hues, height=170).mark_rect().encode(
        alt.X("from:Q", title="hue (degrees), by chroma", scale=alt.Scale(domain=[0, 360]), axis=alt.Axis(values=list(range(0, 361, 60)))), alt.X2("to"),
        density, alt.Y2(datum=0), alt.Color("colour:N", scale=None))
    curves = {"saturation": colour.SATURATION, "value": colour.VALUE}
    levels = pd.concat([pd.DataFrame({"level": level, "density": colour.density(row, channel, level), "of": name}) for name, channel in curves.items()])
    second = alt.Chart(levels, height=240).mark_line().encode(
        alt.X("level:Q", title="saturation, value (0 to 1)", axis=alt.Axis(tickCount=5)), density,
        alt.Color("of:N", legend=alt.Legend(orient="top", title=None)))
    return first, second


def palette_html(pixels: np.ndarray) -> str:
    """The palette as a strip, each colour at least wide enough for its name."""
    return '<div style="display:flex;gap:2px;font:10px monospace">' + "".join(
        f'<div style="flex:{max(share, 0.15):.3f}"><div style="height:36px;background:{shade};box-shadow:inset 0 0 0 1px #8888"></div>{shade}</div>'
        for shade, share in palette(pixels)) + "</div>"


def confusion(true: np.ndarray, given: np.ndarray, dark: bool) -> alt.Chart:
    """Share of each class's images (row) that are given each name (column); the selection `cell` holds the two names that were clicked."""
    cells = pd.DataFrame({"true": true, "predicted": given}).value_counts().reset_index(name="images")
    cells["share"] = 100 * cells["images"] / cells.groupby("true")["images"].transform("sum")
    names = sorted(set(true) | set(given))
    axis = {"type": "nominal", "scale": alt.Scale(domain=names)}
    return alt.Chart(cells, height=260 + 18 * len(names)).mark_rect().encode(
        alt.X("predicted", axis=alt.Axis(labelAngle=-90, **LABELS), **axis), alt.Y("true", axis=alt.Axis(**LABELS), **axis),
        alt.Color("share:Q", title="share of the true class (%)", legend=alt.Legend(orient="top"),
                  scale=alt.Scale(scheme="blues", domain=[0, 100], reverse=dark)),
        tooltip=["true", "predicted", "images", alt.Tooltip("share", format=".1f")]).add_params(alt.selection_point("cell", fields=["true", "predicted"]))
