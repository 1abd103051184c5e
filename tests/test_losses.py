"""The losses against their formulas and open_clip; what train.py makes of them.

GradCache and distinct prompts against plain steps.
"""

import math
from types import SimpleNamespace

import clip
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

import train
from flowers import UserError, devices, models
from flowers.choices import LOSSES, TEMPLATE
from flowers.data import open_flowers
from flowers.losses import (
    backward_in_chunks,
    best_bias,
    class_cross_entropy,
    info_nce,
    same_class,
    sigmoid_loss,
)
from flowers.pixels import load_pixels

# Twelve images of eight classes.
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 7])


def random_features(n=12, width=16):
    """Two tensors (n, width) with rows of length 1."""
    torch.manual_seed(0)
    image_features = F.normalize(torch.randn(n, width), dim=1)
    text_features = F.normalize(torch.randn(n, width), dim=1)
    return image_features, text_features


def test_plain_form_is_the_formula():
    image, text = random_features()
    tau, n = 0.07, len(image)
    s = (image @ text.t() / tau).tolist()
    total = 0.0
    for i in range(n):
        over_texts = sum(math.exp(s[i][j]) for j in range(n))
        over_images = sum(math.exp(s[j][i]) for j in range(n))
        total += math.log(math.exp(s[i][i]) / over_texts)
        total += math.log(math.exp(s[i][i]) / over_images)
    expected = -total / (2 * n)
    assert info_nce(image, text, 1 / tau).item() == pytest.approx(expected, rel=1e-5)

    from open_clip.loss import ClipLoss

    theirs = ClipLoss()(image, text, torch.tensor(1 / tau))
    assert theirs.item() == pytest.approx(expected, rel=1e-5)


def test_class_positives_average_over_all_matches():
    image, text = random_features()
    logits = 20 * image @ text.t()
    total = 0.0
    for i in range(12):
        classmates = [j for j in range(12) if LABELS[j] == LABELS[i]]
        of_texts = logits[i].log_softmax(0)[classmates].mean().item()
        of_images = logits[:, i].log_softmax(0)[classmates].mean().item()
        total -= of_texts + of_images
    loss = info_nce(image, text, 20, same_class(LABELS))
    assert loss.item() == pytest.approx(total / 24, rel=1e-5)

    # Where every class occurs once, only the pairs match.
    alone = info_nce(image, text, 20, same_class(torch.arange(12)))
    assert torch.allclose(alone, info_nce(image, text, 20))


def test_with_one_prompt_a_class_both_kinds_of_positives_agree():
    """What pairs of one class take from each other as negatives cancels if their texts agree."""
    image, prompts = random_features()
    text = prompts[LABELS]
    by_pair = info_nce(image, text, 20)
    by_class = info_nce(image, text, 20, same_class(LABELS))
    assert torch.allclose(by_pair, by_class, rtol=1e-5)


def test_cross_entropy_is_the_formula():
    image, texts = random_features()
    classes, targets = texts[:5], torch.tensor([0, 1, 4, 4, 2, 0, 0, 3, 1, 2, 4, 3])
    scale, total = 20.0, 0.0
    for i, target in enumerate(targets.tolist()):
        exponentials = [math.exp(scale * (image[i] @ text).item()) for text in classes]
        total -= math.log(exponentials[target] / sum(exponentials))
    loss = class_cross_entropy(image, classes, scale, targets)
    assert loss.item() == pytest.approx(total / 12, rel=1e-5)
    theirs = torch.nn.CrossEntropyLoss()(scale * image @ classes.t(), targets)
    assert torch.equal(loss, theirs)


@pytest.mark.parametrize("per_class", [1, 2])
def test_cross_entropy_is_half_of_info_nce_where_all_classes_are_equally_often_in_the_batch(
    per_class,
):
    """The half in which an image looks for its text, but for the constant log(images a class)."""
    image, prompts = random_features()
    targets = torch.arange(12 // per_class).repeat(per_class)
    classes = prompts[: 12 // per_class]
    text, matches = classes[targets], same_class(targets)
    of_texts = F.cross_entropy(20 * text @ image.t(), matches / per_class)
    half = 2 * info_nce(image, text, 20, matches) - of_texts
    loss = class_cross_entropy(image, classes, 20, targets)
    assert (half - loss).item() == pytest.approx(math.log(per_class), abs=1e-5)

    # Where a class is more often in the batch than another, or missing, they differ by more.
    targets[0] = 1
    text = classes[targets]
    of_texts = info_nce(image, text, 20, same_class(targets))
    other = class_cross_entropy(image, classes, 20, targets)
    assert abs(of_texts - other).item() > 0.01


def test_sigmoid_is_the_formula():
    image, text = random_features()
    scale, bias = 10.0, -3.0
    s = (scale * image @ text.t() + bias).tolist()

    def expected(matches):
        total = 0.0
        for i in range(12):
            for j in range(12):
                z = 1 if matches[i][j] else -1
                total -= math.log(1 / (1 + math.exp(-z * s[i][j])))
        return total / 12

    by_pair = sigmoid_loss(image, text, scale, bias).item()
    assert by_pair == pytest.approx(expected(torch.eye(12).tolist()), rel=1e-5)
    by_class = sigmoid_loss(image, text, scale, bias, same_class(LABELS)).item()
    assert by_class == pytest.approx(expected(same_class(LABELS).tolist()), rel=1e-5)
    # Not so with InfoNCE: one text is a match and none at once, where only its own pair counts.
    shared = text[LABELS]
    by_class = sigmoid_loss(image, shared, scale, bias, same_class(LABELS))
    assert not torch.allclose(sigmoid_loss(image, shared, scale, bias), by_class)

    from open_clip.loss import SigLipLoss

    theirs = SigLipLoss()(image, text, torch.tensor(scale), torch.tensor(bias))
    assert theirs.item() == pytest.approx(by_pair, rel=1e-6)


@pytest.mark.parametrize("matches", [None, same_class(LABELS)])
def test_the_best_bias_is_the_lowest_point_of_the_loss(matches):
    image, text = random_features()
    best = best_bias(image, text, 100, matches)

    def loss(bias):
        return sigmoid_loss(image.double(), text.double(), 100, bias, matches).item()

    search = minimize_scalar(loss, bounds=(-100, 100), method="bounded", options={"xatol": 1e-9})
    assert best == pytest.approx(search.x, abs=1e-4)
    # SigLIP's own start is for its scale of 10.
    assert loss(best) < loss(-10.0)
    with pytest.raises(UserError, match="--logit_bias"):
        best_bias(image, text, 100, torch.ones(12, 12, dtype=torch.bool))


def test_equal_logits_have_the_bias_of_the_share_of_matches():
    features = torch.ones(4, 1)
    assert best_bias(features, features, 30) == pytest.approx(math.log(1 / 3) - 30)


def plain_step(model, images, tokens, labels):
    """Loss and gradients with a caption of 77 tokens for each image, as CLIP was trained."""
    model.zero_grad()
    padded = F.pad(tokens, (0, 77 - tokens.shape[1]))
    image_features = F.normalize(model.encode_image(images), dim=1)
    text_features = F.normalize(model.encode_text(padded), dim=1)
    scale = model.logit_scale.exp()
    loss = info_nce(image_features, text_features, scale, same_class(labels))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def our_step(model, images, tokens, labels, chunk_size):
    """Loss and gradients with each distinct prompt encoded once, not padded, in chunks."""
    model.zero_grad()
    distinct, inverse = torch.unique(tokens, dim=0, return_inverse=True)

    def encode_images(x):
        return models.encode_images(model, x)

    def encode_texts(x):
        return models.encode_texts(model, x)

    def loss_of(image_features, text_features):
        scale = model.logit_scale.exp()
        return info_nce(image_features, text_features[inverse], scale, same_class(labels))

    encoders, inputs = [encode_images, encode_texts], [images, distinct]
    loss = backward_in_chunks(encoders, inputs, loss_of, chunk_size)
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunk_size", [16, 5])
def test_distinct_prompts_and_chunks_give_the_plain_gradient(chunk_size):
    torch.manual_seed(0)
    model = models.build("tiny")
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(0, 6, (16,))
    names = ["rose", "tree mallow", "mallow", "globe thistle", "iris", "lotus"]
    prompts = [f"an image of the {name} flower" for name in names]
    tokens = models.tokenize(prompts)[labels]
    padded = clip.tokenize([prompts[i] for i in labels])
    assert torch.equal(tokens, padded[:, : tokens.shape[1]])

    loss, gradients = our_step(model, images, tokens, labels, chunk_size)
    expected_loss, expected = plain_step(model, images, tokens, labels)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for name, gradient in expected.items():
        assert gradients[name].allclose(gradient, atol=1e-5, rtol=1e-3), name
    assert gradients["logit_scale"].abs() > 0


# -----------------------------------------------------------------------------
# the losses in train.py

ONE_PROCESS = devices.Processes(0, 1, torch.device("cpu"))
TEMPLATES = [TEMPLATE, "a photo of a {}.", "{}"]


def training_data(small, loss, classes="all", logit_bias=None):
    """A small model, its encoders and the data of a run, as train.py makes them."""
    torch.manual_seed(0)
    model = models.build("tiny")
    flowers = open_flowers(small)
    config = SimpleNamespace(
        loss=loss,
        positives=None if loss == "cross_entropy" else "class",
        logit_bias=logit_bias,
        temperature=0.05,
        learn_temperature=True,
        strategy="full",
        blocks=1,
        rank=1,
        context_tokens=4,
        augment="crop",
        seed=0,
        chunk_size=5,
        trains=True,
        captions=None,
        compile=False,
        records_steps=False,
        eval_split="test",
        classes=classes,
        shots=None,
        val_shots=None,
        processes=1,
    )
    train.prepare_model(model, config)
    index, _ = train.choose_images(flowers, config)
    texts = train.make_texts(flowers, None, TEMPLATES, None, 77)
    pixels = load_pixels(flowers, 64)
    data = train.TrainingData(flowers, index, texts, pixels, None, model, config)
    return model, train.make_encoders(model, None, texts, None, config), data


@pytest.mark.parametrize("classes", ["all", "base"])
def test_cross_entropy_takes_one_text_of_each_class_that_is_trained_on(classes, small):
    _, _, data = training_data(small, "cross_entropy", classes=classes)
    trained_classes = range(3) if classes == "base" else range(6)
    drawn = set()
    # The images are those of InfoNCE's batches, in their order.
    order = torch.randperm(len(data.index), generator=devices.generator(0, 1))
    for positions, batch in zip(order.split(4), data.batches(1, 4, ONE_PROCESS)):
        assert [row // len(TEMPLATES) for row in batch.text_rows.tolist()] == [*trained_classes]
        assert batch.text_of_image.tolist() == data.labels[data.index[positions]].tolist()
        assert batch.matches is None
        drawn |= set(batch.text_rows.tolist())
    assert len(drawn) > len(trained_classes), "anew in each step"

    # A class that is not trained on is no column of the loss.
    _, _, data = training_data(small, "cross_entropy", classes="new")
    batch = next(data.batches(0, 4, ONE_PROCESS))
    assert len(batch.text_rows) == 3
    assert set(batch.text_of_image.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_give_the_gradient_of_the_whole_batch_for_each_loss(loss, small):
    model, encoders, data = training_data(small, loss)
    if loss == "sigmoid":
        train.fit_bias(model, encoders, data, 12, ONE_PROCESS)
    loss_of = train.choose_loss(loss, model, ONE_PROCESS)
    batch = next(data.batches(0, 12, ONE_PROCESS))
    inputs = [batch.images, batch.text_rows]
    features = [encode(tensor) for encode, tensor in zip(encoders, inputs)]
    whole = loss_of(*features, batch)
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    chunked = backward_in_chunks(encoders, inputs, lambda *f: loss_of(*f, batch), chunk_size=5)
    assert chunked.item() == pytest.approx(whole.item(), abs=1e-5)
    for name, p in model.named_parameters():
        assert p.grad.allclose(expected[name], atol=2e-5, rtol=1e-3), name
    # At the best bias the loss is flat in it, so its gradient is nothing but rounding.
    if loss == "sigmoid":
        assert abs(model.logit_bias.grad) < 1e-4
    assert model.logit_scale.grad.abs() > 0
    assert ("logit_bias" in expected) == (loss == "sigmoid")


def test_the_bias_starts_where_it_is_told_to(small):
    model, _, _ = training_data(small, "sigmoid", logit_bias=-20.0)
    assert model.logit_bias.item() == -20
    assert model.logit_bias.requires_grad


def test_the_bias_learns_at_the_rate_of_the_temperature_without_decay(small):
    model, _, data = training_data(small, "sigmoid")
    config = SimpleNamespace(lr=1e-3, lr_decay=1.0, wd=0.1, tau_lr=0.5)
    optimizer = train.make_optimizer(model, dict(model.named_parameters()), config)
    groups = [g for g in optimizer.param_groups if any(p is model.logit_bias for p in g["params"])]
    assert [(g["peak"], g["weight_decay"], len(g["params"])) for g in groups] == [(0.5, 0.0, 2)]
