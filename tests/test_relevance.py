"""Where a run looks: the maps against numpy and finite differences, the deletion test on a trained
model, what a run started from, and the maps on the page.
"""

import importlib.util
import json
import os
import random
import re
import shutil
import sys
from html import unescape

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, call, write_dataset
from PIL import Image
from streamlit.testing.v1 import AppTest

from flowers import UserError, models, weights
from flowers.choices import Shape
from flowers.data import open_flowers
from flowers.files import save_tensors
from flowers.gallery.relevance import (
    crop_box,
    load_run,
    load_start,
    paint,
    relevance,
)
from flowers.gallery.search import own_prompts
from flowers.pixels import read_square

PATIENCE = 180  # seconds that a busy machine may take for one run of the page


# -----------------------------------------------------------------------------
# an implementation of its own, in numpy


def norm(x, layer):
    """LayerNorm of the rows of x (n, width)."""
    centred = x - x.mean(1, keepdims=True)
    scaled = centred / np.sqrt(x.var(1, keepdims=True) + layer.eps)
    return scaled * array(layer.weight) + array(layer.bias)


def array(tensor):
    return tensor.detach().double().numpy()


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cosine(features, direction):
    return features @ direction / np.linalg.norm(features)


class NumpyViT:
    """The image tower of a CLIP for one image, whose attention can be disturbed."""

    def __init__(self, model, image, direction):
        self.visual, self.direction = model.visual, array(direction)
        kernel = array(self.visual.conv1.weight)  # (width, 3, patch, patch)
        patch, pixels = kernel.shape[-1], array(image)
        rows = [array(self.visual.class_embedding)]
        for y in range(0, pixels.shape[1], patch):
            for x in range(0, pixels.shape[2], patch):
                rows.append((kernel * pixels[:, y : y + patch, x : x + patch]).sum((1, 2, 3)))
        tokens = np.stack(rows) + array(self.visual.positional_embedding)
        self.tokens = norm(tokens, self.visual.ln_pre)

    def run(self, disturbance):
        """The score, and the attention of each layer and head.

        disturbance: added to the attention, (layers, heads, n, n).
        """
        x, attentions = self.tokens, []
        for block, added in zip(self.visual.transformer.resblocks, disturbance):
            mixed, attention = self.attend(norm(x, block.ln_1), block.attn, added)
            x = x + mixed
            attentions.append(attention)
            hidden = norm(x, block.ln_2) @ array(block.mlp.c_fc.weight).T
            hidden = hidden + array(block.mlp.c_fc.bias)
            hidden = hidden / (1 + np.exp(-1.702 * hidden))  # QuickGELU
            x = x + hidden @ array(block.mlp.c_proj.weight).T + array(block.mlp.c_proj.bias)
        features = norm(x[:1], self.visual.ln_post)[0] @ array(self.visual.proj)
        return cosine(features, self.direction), np.array(attentions)

    def attend(self, x, attn, added):
        width, head = x.shape[1], x.shape[1] // attn.num_heads
        weight, bias = array(attn.in_proj_weight), array(attn.in_proj_bias)
        q, k, v = np.split(x @ weight.T + bias, 3, axis=1)
        attentions, mixed = [], np.zeros((len(x), width))
        for h in range(attn.num_heads):
            part = slice(h * head, (h + 1) * head)
            attention = softmax(q[:, part] @ k[:, part].T / np.sqrt(head))
            attentions.append(attention)
            mixed[:, part] = (attention + added[h]) @ v[:, part]
        return mixed @ array(attn.out_proj.weight).T + array(attn.out_proj.bias), attentions

    def relevance(self, step=1e-5):
        """The map, with the gradient of each weight of the attention by central differences."""
        heads = self.visual.transformer.resblocks[0].attn.num_heads
        layers, n = len(self.visual.transformer.resblocks), len(self.tokens)
        still = np.zeros((layers, heads, n, n))
        _, attentions = self.run(still)
        gradients = np.zeros_like(still)
        for place in np.ndindex(still.shape):
            moved = still.copy()
            moved[place] = step
            gradients[place] = (self.run(moved)[0] - self.run(-moved)[0]) / (2 * step)
        total = np.eye(n)
        for attention, gradient in zip(attentions, gradients):
            of_layer = np.zeros((n, n))
            for h in range(heads):
                of_layer += np.maximum(attention[h] * gradient[h], 0) / heads
            total = total + of_layer @ total
        return total[0, 1:]


def numpy_pool(pool, cells, direction):
    """The score of what enters a ResNet's attention pool, (channels, side, side)."""
    tokens = cells.reshape(len(cells), -1).T
    tokens = np.vstack([tokens.mean(0), tokens]) + array(pool.positional_embedding)
    q, k, v = (
        tokens @ array(layer.weight).T + array(layer.bias)
        for layer in (pool.q_proj, pool.k_proj, pool.v_proj)
    )
    head = q.shape[1] // pool.num_heads
    pooled = np.zeros(q.shape[1])
    for h in range(pool.num_heads):
        part = slice(h * head, (h + 1) * head)
        pooled[part] = softmax(q[0, part] @ k[:, part].T / np.sqrt(head)) @ v[:, part]
    return cosine(pooled @ array(pool.c_proj.weight).T + array(pool.c_proj.bias), direction)


# -----------------------------------------------------------------------------
# the maps


def some(model, n=2, seed=0):
    """n random images of a model's size, and a direction of length 1 for each."""
    generator = torch.Generator().manual_seed(seed)
    side, width = model.visual.input_resolution, model.text_projection.shape[1]
    images = torch.randn(n, 3, side, side, generator=generator)
    directions = torch.randn(n, width, generator=generator)
    return images, torch.nn.functional.normalize(directions, dim=1)


@pytest.fixture(scope="module")
def small_vit():
    """Two layers of two heads, four patches."""
    torch.manual_seed(0)
    shape = Shape(8, 16, 2, 16, 8, 64, 1, 1)
    model = models.build_shape(shape, settings=models.OPENAI._replace(image_head_width=8))
    with torch.no_grad():
        for name, parameter in model.visual.named_parameters():
            # Strong attention, and biases and norms that are not at 0 and 1.
            scale = 0.5 if parameter.ndim == 1 else 2 / parameter[0].numel() ** 0.5
            offset = 1 if "ln_" in name and name.endswith("weight") else 0
            parameter.copy_(offset + scale * torch.randn_like(parameter))
    return model


def test_a_vits_map_is_that_of_explicit_matrices(small_vit):
    images, directions = some(small_vit)
    maps, scores = relevance(small_vit, images, directions)
    assert maps.shape == (2, 2, 2)
    for i in range(2):
        by_hand = NumpyViT(small_vit, images[i], directions[i])
        still = np.zeros((2, 2, 5, 5))
        assert scores[i].item() == pytest.approx(by_hand.run(still)[0], abs=1e-5)
        expected = by_hand.relevance()
        assert expected.max() > 0.01 and np.ptp(expected) > 0.005  # not all alike
        assert maps[i].flatten().numpy() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_resnets_map_is_how_the_score_grows_with_each_cell():
    torch.manual_seed(0)
    model = models.build("tiny-rn")
    with torch.no_grad():  # else the random places would count for more than the picture
        model.visual.attnpool.positional_embedding.mul_(0.02)
    images, directions = some(model, n=4)
    maps, scores = relevance(model, images, directions)
    cells, growths = [], []
    hook = model.visual.attnpool.register_forward_pre_hook(lambda _, x: cells.append(x[0]))
    features = models.encode_images(model, images)
    hook.remove()
    assert scores.numpy() == pytest.approx(array((features * directions).sum(1)), abs=1e-5)
    for i in range(4):
        activation, direction = array(cells[0][i]), array(directions[i])
        growth = np.zeros(activation.shape[1:])
        for place in np.ndindex(growth.shape):
            # The derivative by a factor of the cell is the sum of its channels times gradients.
            values = []
            for factor in (1 + 1e-4, 1 - 1e-4):
                scaled = activation.copy()
                scaled[:, *place] *= factor
                values.append(numpy_pool(model.visual.attnpool, scaled, direction))
            growth[place] = (values[0] - values[1]) / 2e-4
        assert maps[i].numpy() == pytest.approx(growth, rel=1e-2, abs=1e-5)
        growths.append(growth)
    assert np.max(growths) > 3e-4 and np.min(growths) < -3e-4


@pytest.mark.parametrize("name", ["tiny", "tiny-16", "tiny-rn"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_stays_as_it_was(name, frozen):
    torch.manual_seed(0)
    model = models.build(name).requires_grad_(not frozen)
    images, directions = some(model, n=3)
    before = models.encode_images(model, images).detach()
    with torch.no_grad():  # a caller's
        maps, scores = relevance(model, images, directions)
    assert torch.equal(models.encode_images(model, images), before)
    assert torch.allclose(scores, (before * directions).sum(1), atol=1e-5)
    assert not maps.requires_grad and not scores.requires_grad
    assert all(p.grad is None and p.requires_grad != frozen for p in model.parameters())
    # Images do not see one another.
    alone, _ = relevance(model, images[1:2], directions[1:2])
    assert torch.allclose(alone[0], maps[1], rtol=1e-3, atol=1e-6)


# -----------------------------------------------------------------------------
# where a map lies on its picture


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (150, 150), (341, 256), (73, 90)])
def test_the_colours_lie_on_what_the_model_sees(size, tmp_path):
    """A picture that is white in the crop's place alone is white all over to the model."""
    width, height = size
    top, bottom, left, right = crop_box(height, width, 64)
    assert bottom - top == pytest.approx(min(size), abs=1)
    assert right - left == pytest.approx(min(size), abs=1)
    assert 0 <= top < bottom <= height and 0 <= left < right <= width
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    file = tmp_path / "picture.png"
    Image.fromarray(pixels).save(file)
    square = read_square(file, 64)
    assert square[:, 2:-2, 2:-2].min() > 250  # blurred at the edge
    # And what is beside it would be seen.
    values = np.zeros((4, 4))
    values[0, 3] = 1  # top right
    with Image.open(paint_to(tmp_path / "painted.jpg", file, values)) as image:
        painted = np.asarray(image).astype(int)
    assert painted.shape == pixels.shape
    is_coloured = np.ptp(painted, axis=2) > 30
    rows, columns = np.nonzero(is_coloured)
    edges = (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)
    assert edges == pytest.approx((top, bottom, left, right), abs=8)  # blocks of a JPEG
    # viridis: yellow at 1, violet at 0; half of each pixel.
    step = (bottom - top) / 4
    yellow = painted[int(top + step / 2), int(right - step / 2)]
    violet = painted[int(bottom - step / 2), int(left + step / 2)]
    assert yellow == pytest.approx((255 + np.array([253, 231, 37])) / 2, abs=8)
    assert violet == pytest.approx((255 + np.array([68, 1, 84])) / 2, abs=8)


def paint_to(path, file, values):
    path.write_bytes(paint(file, values, 64))
    return path


# -----------------------------------------------------------------------------
# a trained model


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("relevance") / "discs", per_class=20)


@pytest.fixture(scope="module")
def runs(discs):
    """A run of `tiny` on discs, and one of `linear` with its weights and a head that is made up."""
    folder = discs.parent / "runs"
    flags = {"data_root": discs, "runs": folder, "name": "tuned", "wandb": "disabled"}
    flags |= {"architecture": "tiny", "epochs": 3, "lr": 1e-3, "batch_size": 16, "seed": 3}
    call("train.py", *(f"--{key}={value}" for key, value in flags.items()))

    linear = folder / "linear"
    linear.mkdir()
    shutil.copy(folder / "tuned" / "model.pt", linear)
    arguments = {"job": "train", "strategy": "linear", "seed": 0, "prompt_template": ["a {}"]}
    arguments["architecture"] = str(folder / "tuned")
    (linear / "args.json").write_text(json.dumps(arguments))
    weight = torch.randn(len(NAMES), 128, generator=torch.Generator().manual_seed(0))
    head = {"weight": 3 * weight, "bias": torch.arange(6.0), "class_names": NAMES}
    save_tensors(linear / "classifier.pt", head)
    # The newest run is the page's default.
    os.utime(folder / "linear", (1, 1))
    return folder


@pytest.fixture(scope="module")
def flowers(discs):
    return open_flowers(str(discs))


@pytest.fixture(scope="module")
def deletion_curves():
    """That of benchmarks/relevance.py: the folder is no package."""
    path = ROOT / "benchmarks" / "relevance.py"
    spec = importlib.util.spec_from_file_location("relevance_of", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.deletion_curves


def test_covering_the_most_relevant_patches_lowers_the_score_first(runs, flowers, deletion_curves):
    run = load_run(runs / "tuned", flowers.class_names)
    index = flowers.splits["test"]
    images = torch.cat([run._read(flowers.files[i]) for i in index])
    names = [flowers.class_names[flowers.labels[i]] for i in index]
    right = [run.predict(flowers.files[i]) == name for i, name in zip(index, names)]
    assert np.mean(right) > 0.8  # it has learned the colours
    directions = torch.stack([run.class_target(name).direction for name in names])
    maps, _ = relevance(run.model, images, directions)

    def areas(order):
        return deletion_curves(run.model, images, directions, order).mean(1)

    relevant = areas(maps.flatten(1).argsort(1, descending=True))
    generator = torch.Generator().manual_seed(0)
    at_random = [
        areas(torch.rand(len(index), 64, generator=generator).argsort(1)) for _ in range(3)
    ]
    expected = torch.stack(at_random).mean(0)
    # The margin is what a random order does not reach.
    assert (relevant < expected).float().mean() > 0.9
    assert relevant.mean() < expected.mean() - 0.1


def test_the_score_of_a_linear_head_is_its_logit(runs, flowers):
    run = load_run(runs / "linear", flowers.class_names)
    file = flowers.files[5]
    features = models.encode_images(run.model, run._read(file)).detach()  # (1, D)
    weight, bias = run.head
    logits = (features @ weight.t() + bias)[0]
    target = run.class_target("mallow")
    values, score = run.explain(file, target)
    assert target.unit == "logit"
    assert score == pytest.approx(logits[NAMES.index("mallow")].item(), abs=1e-4)
    assert values.shape == (8, 8) and values.min() >= 0 and values.max() == 1
    assert run.predict(file) == NAMES[logits.argmax()]
    # A sentence is still one for the text tower.
    assert run.text_target("a mallow").unit == "cosine"


def test_the_score_of_a_text_is_its_cosine(runs, flowers):
    run = load_run(runs / "tuned", flowers.class_names)
    file = flowers.files[5]
    features = models.encode_images(run.model, run._read(file)).detach()[0]
    for target in (run.class_target("rose"), run.text_target("an image of the rose flower")):
        text = models.text_features(run.model, ["an image of the rose flower"])[0]
        _, score = run.explain(file, target)
        assert target.unit == "cosine"
        assert score == pytest.approx((features @ text).item(), abs=1e-5)
    assert "its first 77 tokens" in run.text_target("rose " * 100).name


def test_a_run_starts_from_the_weights_that_it_started_from(runs, flowers):
    random.seed(1)
    expected = random.random()
    random.seed(1)
    start = load_start(runs / "tuned", flowers.class_names)
    assert random.random() == expected  # the page's own random pictures go on
    torch.manual_seed(3)  # that of the run
    drawn = weights.load_model("tiny").state_dict()
    tuned = weights.load_model(str(runs / "tuned")).state_dict()
    for name, weight in start.model.state_dict().items():
        assert torch.equal(weight, drawn[name])
    assert not torch.equal(drawn["visual.proj"], tuned["visual.proj"])
    assert start.origin == "random (tiny)"

    # A linear head leaves the weights: before it, the same model answered by its prompts.
    start = load_start(runs / "linear", flowers.class_names)
    assert torch.equal(start.model.visual.proj, tuned["visual.proj"])
    text = models.text_features(start.model, ["a rose"])[0]
    assert torch.allclose(start.class_target("rose").direction, text, atol=1e-5)
    assert start.origin == str(runs / "tuned")


@pytest.mark.parametrize("start", ["ViT-B/32", "hf:nobody/nothing", "open_clip:ViT-B-32/openai"])
def test_a_start_is_not_downloaded(runs, flowers, start, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = shutil.copytree(runs / "tuned", tmp_path / "run")
    arguments = json.loads((folder / "args.json").read_text()) | {"architecture": start}
    (folder / "args.json").write_text(json.dumps(arguments))
    with pytest.raises(UserError, match=f"started from {start}, which is not on this machine"):
        load_start(folder, flowers.class_names)


@pytest.mark.parametrize(
    "damage",
    [
        {"architecture": None},
        {"architecture": 5},
        {"prompt_template": 7},
        {"prompt_template": [{"{}": 1}]},
        {"prompts": 5},
    ],
)
def test_damaged_arguments_are_a_sentence(runs, flowers, damage, tmp_path):
    folder = shutil.copytree(runs / "linear", tmp_path / "run")
    arguments = json.loads((folder / "args.json").read_text()) | damage
    (folder / "args.json").write_text(json.dumps(arguments))
    with pytest.raises(UserError, match=r"args.json .*damaged"):
        load_start(folder, flowers.class_names)
    if "architecture" not in damage:
        with pytest.raises(UserError, match=r"args.json .*damaged"):
            own_prompts(folder)


def test_a_model_that_diverged_has_no_map(runs, flowers):
    run = load_run(runs / "tuned", flowers.class_names)
    run.model.visual.proj.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="diverged"):
        run.explain(flowers.files[0], run.class_target("rose"))


# -----------------------------------------------------------------------------
# the page


@pytest.fixture
def page(monkeypatch, discs, runs):
    """page(image=..., ...): the page at that address, without any error."""

    def opened(runs=runs, **address):
        flags = ["--data_root", str(discs), "--runs", str(runs)]
        monkeypatch.setattr(sys, "argv", ["web.py", *flags])
        at = AppTest.from_file(str(ROOT / "web.py"), default_timeout=PATIENCE)
        at.query_params.update(address)
        at.run()
        assert not at.exception and not at.error
        return at

    return opened


def rows_of_maps(at):
    """Of each row of maps, the lines of text of each of them; each must have a picture."""
    drawn = [e.proto for e in at.get("bidi_component") if e.proto.id.endswith("-maps")]
    html = drawn[0].bytes.decode() if drawn else ""
    rows = []
    for row in html.split('<div class="maps">')[1:]:
        cells = [cell.split("<img")[0] for cell in row.split("<div>")[1:]]
        assert row.count('<img src="data:image/jpeg;base64,/9j/') == len(cells)
        rows.append([[unescape(line) for line in re.findall("<p>(.*?)</p>", c)] for c in cells])
    return rows


def test_the_page_shows_where_a_run_looks_before_and_after(page):
    at = page(image="8")  # a lotus
    assert at.segmented_control(key="where").value == "hidden"
    assert rows_of_maps(at) == []
    at.segmented_control(key="where").set_value("shown").run()
    (row,) = rows_of_maps(at)  # it predicts the true class
    before, after = row
    assert before[:2] == ["Before: random (tiny)", "true and predicted class: lotus"]
    assert after[:2] == ["After: tuned", "true and predicted class: lotus"]
    scores = [float(cell[2].removeprefix("cosine ")) for cell in row]
    assert scores[1] > 0.5 > scores[0]

    at.text_input(key="words").set_value("a <b>red</b> disc").run()
    assert rows_of_maps(at)[1][1][1] == "sentence: a <b>red</b> disc"
    at.selectbox(key="target").set_value("rose").run()
    at.text_input(key="words").set_value("").run()
    at.selectbox(key="looker").set_value("linear").run()
    (row,) = rows_of_maps(at)
    assert [cell[1] for cell in row] == ["chosen class: rose"] * 2
    assert [cell[2].split()[0] for cell in row] == ["cosine", "logit"]
    address = {"image": "8", "where": "shown", "target": "rose", "looker": "linear"}
    # AppTest gives what was set as text, and what was opened as a list.
    assert {key: "".join(value) for key, value in at.query_params.items()} == address
    assert rows_of_maps(page(**address)) == [row]


def test_what_can_not_be_shown_is_said(page, runs, tmp_path):
    folder = tmp_path / "runs"
    for name in ("alone", "damaged"):
        (folder / name).mkdir(parents=True)
        shutil.copy(runs / "tuned" / "model.pt", folder / name)
    (folder / "damaged" / "model.pt").write_bytes(b"no model")
    at = page(runs=folder, image="8", where="shown", looker="alone")
    assert "no map from before" in at.info[0].value
    assert [len(row) for row in rows_of_maps(at)] == [1]

    at = page(runs=folder, image="8", where="shown", looker="damaged")
    assert "damaged" in at.warning[0].value and rows_of_maps(at) == []
    at = page(runs=folder, image="8", where="shown", looker="gone")
    assert "There is no run gone" in at.warning[0].value and rows_of_maps(at) == []
    at = page(runs=tmp_path / "none", image="8", where="shown")
    assert rows_of_maps(at) == []


def test_the_map_from_before_is_of_the_start_as_it_is_now(page, runs, tmp_path):
    """Not of the file that was there when the map was first made."""
    start = tmp_path / "start.pt"
    folder = shutil.copytree(runs / "tuned", tmp_path / "runs" / "run")
    arguments = json.loads((folder / "args.json").read_text()) | {"architecture": str(start)}
    fingerprint = arguments.pop("start")  # an older run knows none, and takes what there is

    def before(seed, **recorded):
        torch.manual_seed(seed)
        torch.save(models.build("tiny").state_dict(), start)
        os.utime(start, (seed, seed))
        # Of the run itself nothing changes from here on.
        if recorded or seed == 3:
            (folder / "args.json").write_text(json.dumps(arguments | recorded))
        at = page(runs=folder.parent, image="8", where="shown", looker="run")
        (row,) = rows_of_maps(at)
        return [cell[2] for cell in row], [note.value for note in at.info]

    (first, after), _ = before(3)
    (second, same), _ = before(4)
    assert first != second and same == after
    _, (note,) = before(4, start=fingerprint)
    assert "no map from before" in note and "has changed since" in note
