"""The linear probe that starts from the text classifier, and prompts as training samples."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import error_line
from sklearn.linear_model import LogisticRegression

from flowers import devices, evaluate, models, strategies, weights
from flowers.choices import TEMPLATE
from flowers.data import open_flowers
from flowers.files import load_tensors
from flowers.pixels import load_pixels

NO_WANDB = ("--wandb", "disabled")
SCALE = 20.0


@pytest.fixture(scope="module")
def samples():
    """Features (120, 16) and labels (120,) of the classes 0, 1, 3 and 4 of five."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 3, 4]).repeat(30)
    noise = torch.randn(120, 16, generator=generator)
    return F.normalize(noise + 2 * torch.eye(5, 16)[labels], dim=1), labels


@pytest.fixture(scope="module")
def zero_shot():
    """A head of five text features (5, 16), some way off the images."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.eye(5, 16) + 0.5 * torch.randn(5, 16, generator=generator)
    return SCALE * F.normalize(texts, dim=1), torch.zeros(5)


def objective(classifier, start, features, rows, sample_weight, pull, scale=SCALE):
    """The loss of the probe, written once more."""
    losses = F.cross_entropy(scale * features @ classifier.t(), rows, reduction="none")
    return (sample_weight * losses).sum() + pull * ((classifier - start) ** 2).sum()


def test_the_gradient_is_that_of_autograd(samples, zero_shot):
    features, labels = samples[0].double(), samples[1]
    start = zero_shot[0].double() / SCALE
    classifier = (start + 0.1 * torch.randn(5, 16).double()).requires_grad_()
    sample_weight = torch.rand(120).double()
    sample_weight /= sample_weight.sum()
    expected = objective(classifier, start, features, labels, sample_weight, 0.3)
    expected.backward()
    loss, gradient = strategies.pulled_loss(
        classifier.detach(), features, labels, sample_weight, start, SCALE, 0.3
    )
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradient, classifier.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pull", [0.01, 1.0])
def test_pulled_to_nothing_it_is_scikit_learn_s_regression(samples, pull):
    """With w = scale * v, mean CE + pull |v|^2 is C * sum CE + |w|^2 / 2 by a constant factor."""
    features, labels = samples
    nothing = torch.zeros(5, 16), torch.zeros(5)
    weighted = np.random.default_rng(0).uniform(0.5, 1.5, 120)
    for sample_weight in (None, weighted):
        head, _, _ = strategies.fit_pulled(
            features, labels, nothing, SCALE, pull, sample_weight=sample_weight
        )
        total = 120 if sample_weight is None else sample_weight.sum()
        c = SCALE**2 / (2 * total * pull)
        regression = LogisticRegression(C=c, fit_intercept=False, tol=1e-10, max_iter=10_000)
        regression.fit(features.double().numpy(), labels.numpy(), sample_weight)
        assert np.abs(head[0][[0, 1, 3, 4]].numpy() - regression.coef_).max() < 2e-3
        assert not head[0][2].any() and not head[1].any()


def test_a_pull_leads_from_the_text_classifier_to_the_images(samples, zero_shot):
    features, labels = samples
    distances = []
    for pull in (1e6, *strategies.PULLS):
        (weight, bias), used, iterations = strategies.fit_pulled(
            features, labels, zero_shot, SCALE, pull
        )
        assert used == pull and iterations < strategies.MAX_ITERATIONS
        assert torch.equal(weight[2], zero_shot[0][2]), "a class without images"
        assert not bias.any()
        distances.append((weight - zero_shot[0]).norm().item())
    assert distances == sorted(distances)
    assert distances[0] < 1e-3 < 1 < distances[-1]


def test_the_pull_is_the_best_on_val(samples, zero_shot):
    features, labels = samples
    few, rest = slice(0, 8), slice(8, 120)
    val = features[rest], labels[rest]

    def accuracy(pull):
        head, _, _ = strategies.fit_pulled(features[few], labels[few], zero_shot, SCALE, pull)
        logits = val[0] @ head[0].t()
        logits[:, 2] = -torch.inf  # it has no training images
        return (logits.argmax(1) == val[1]).float().mean().item()

    scores = {pull: accuracy(pull) for pull in strategies.PULLS}
    best = max(scores.values())
    assert min(scores.values()) < best, "otherwise nothing is chosen"
    strongest = max(pull for pull, score in scores.items() if score == best)
    fit = strategies.fit_pulled(features[few], labels[few], zero_shot, SCALE, val=val)
    assert fit[1] == strongest
    # Where all are alike, as on a class without training images, the strongest wins.
    hopeless = features[:3], torch.full((3,), 2)
    fit = strategies.fit_pulled(features[few], labels[few], zero_shot, SCALE, val=hopeless)
    assert fit[1] == max(strategies.PULLS)
    # What is said beforehand is not chosen, and without val there is a default.
    said = strategies.fit_pulled(features[few], labels[few], zero_shot, SCALE, 3.0, val)
    assert said[1] == 3.0
    default = strategies.fit_pulled(features[few], labels[few], zero_shot, SCALE)
    assert default[1] == strategies.DEFAULT_PULL


def test_images_and_texts_weigh_the_same():
    together = strategies.modality_weights(30, 6)
    assert together.shape == (36,)
    assert together[:30].sum() == pytest.approx(15)
    assert together[30:].sum() == pytest.approx(15)
    assert len(set(together[:30])) == len(set(together[30:])) == 1


def train(cli, small, tmp_path, name, *options):
    place = ("--data_root", small, "--runs", tmp_path, "--name", name, *NO_WANDB)
    return cli("train.py", *place, "--architecture", "tiny", "--strategy", "linear", *options)


def features_of(flowers, model, split):
    pixels = load_pixels(flowers, model.visual.input_resolution)
    index = flowers.splits[split]
    features = models.image_features(model, pixels, torch.from_numpy(index.copy()))
    return features, torch.from_numpy(flowers.labels[index])


def test_a_pulled_and_cross_modal_run(small, tmp_path, cli):
    """Its head is an optimum of the objective, written here anew, and every script uses it."""
    templates = ("a {}", "an image of the {} flower")
    options = ("--start_from", "zero_shot", "--cross_modal", "--classes", "base", "--holdout")
    prompts = [part for template in templates for part in ("--prompt_template", template)]
    code, out, err = train(cli, small, tmp_path, "run", *options, *prompts)
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    pull = result["fitted_pull"]
    assert pull in strategies.PULLS and result["chosen_on"] == "val"
    assert f"LAMBDA = {pull:g} (chosen on val)" in out
    assert result["start_from"] == "zero_shot" and result["cross_modal"] is True
    # Three classes are trained on, without a bias, at the model's temperature.
    assert result["trainable_head"] == 3 * 128
    assert result["tau"] == pytest.approx(0.07, abs=1e-6)
    assert "fitted_C" not in result and result["prompts"] == "none (a linear head)"
    assert {"val/base_top1", "val/new_top1", "val/harmonic_mean"} <= result.keys()

    devices.seed_everything(0)
    model = weights.load_model("tiny")
    flowers = open_flowers(small, holdout=True)
    images, labels = features_of(flowers, model, "train")
    images, labels = images[labels < 3], labels[labels < 3]
    names = flowers.class_names[:3]
    texts = models.text_features(model, evaluate.fill_templates(names, templates))
    features = torch.cat([images, texts]).double()
    rows = torch.cat([labels, torch.arange(3).repeat_interleave(2)])
    halves = [torch.full((len(part),), 0.5 / len(part)) for part in (images, texts)]
    head = evaluate.zero_shot_head(model, flowers.class_names, templates)
    scale = model.logit_scale.exp().item()

    saved = load_tensors(tmp_path / "run" / "classifier.pt")
    assert torch.equal(saved["weight"][3:], head[0][3:]) and not saved["bias"].any()
    classifier = (saved["weight"][:3].double() / scale).requires_grad_()
    start = head[0][:3].double() / scale
    sample_weight = torch.cat(halves).double()
    objective(classifier, start, features, rows, sample_weight, pull, scale).backward()
    assert classifier.grad.abs().max() < 1e-4
    at_start = start.clone().requires_grad_()
    objective(at_start, start, features, rows, sample_weight, pull, scale).backward()
    assert at_start.grad.abs().max() > 1e-2, "it has come a long way"

    place = ("--runs", tmp_path, "--name", "eval", "--split", "val", *NO_WANDB)
    code, out, err = cli("baseline_eval.py", "--architecture", tmp_path / "run", *place)
    assert code == 0 and "prompts: none (a linear head)" in out, err
    predictions = (tmp_path / "run" / "predictions.csv").read_bytes()
    assert (tmp_path / "eval" / "predictions.csv").read_bytes() == predictions

    # Without its head it would be evaluated as its start.
    (tmp_path / "run" / "classifier.pt").unlink()
    command = ("baseline_eval.py", "--architecture", tmp_path / "run", *NO_WANDB)
    assert "lacks its classifier.pt" in error_line(cli(*command, "--runs", tmp_path))


def test_a_plain_cross_modal_run_is_scikit_learn_s_with_weights(small, tmp_path, cli):
    code, _, err = train(cli, small, tmp_path, "run", "--cross_modal")
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["trainable_head"] == 6 * (128 + 1) and "tau" not in result
    assert result["fitted_C"] == strategies.DEFAULT_C and result["chosen_on"] == "default"

    devices.seed_everything(0)
    model = weights.load_model("tiny")
    flowers = open_flowers(small)
    images, labels = features_of(flowers, model, "train")
    prompts = evaluate.fill_templates(flowers.class_names, [TEMPLATE])
    # Images and prompts in turn, so that there are as many of both: six prompts, n images.
    texts = models.text_features(model, prompts).repeat(len(images) // 6, 1)
    regression = LogisticRegression(C=strategies.DEFAULT_C / 2, max_iter=1000)
    both = torch.cat([images, texts]).numpy()
    regression.fit(both, np.concatenate([labels, np.arange(len(texts)) % 6]))
    saved = load_tensors(tmp_path / "run" / "classifier.pt")
    assert saved["weight"].numpy() == pytest.approx(regression.coef_, abs=5e-2)


def test_a_penalty_that_is_said_is_not_chosen(samples, zero_shot, small, tmp_path, cli):
    features, labels = samples
    head, used, _ = strategies.fit_linear(features, labels, zero_shot, 0.3, val=samples)
    assert used == 0.3
    expected = LogisticRegression(C=0.3, max_iter=1000).fit(features.numpy(), labels.numpy())
    assert head[0][[0, 1, 3, 4]].numpy() == pytest.approx(expected.coef_, abs=1e-3)

    code, out, err = train(cli, small, tmp_path, "run", "--holdout", "--inverse_penalty", 0.3)
    assert code == 0 and "C = 0.3," in out, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["fitted_C"] == result["inverse_penalty"] == 0.3
    assert result["chosen_on"] == "--inverse_penalty"


def test_flags_of_the_probe_that_mean_nothing(small, tmp_path, cli):
    def error(*options):
        return error_line(train(cli, small, tmp_path, "run", *options))

    full = ("--strategy", "full")
    assert "need --strategy linear" in error(*full, "--start_from", "zero_shot")
    assert "need --strategy linear" in error(*full, "--cross_modal")
    assert "nothing to pull to" in error("--pull", 1)
    assert "needs --strategy linear" in error(*full, "--inverse_penalty", 1)
    pulled = ("--start_from", "zero_shot", "--inverse_penalty", 1)
    assert "--start_from random" in error(*pulled)
    for penalty in (0, -1, "nan", "inf"):
        assert "a number above 0" in error(f"--inverse_penalty={penalty}")
    for pull in (0, -1, "nan", "inf"):
        line = error("--start_from", "zero_shot", f"--pull={pull}")
        assert "--pull must be a number above 0" in line
    assert not (tmp_path / "run").exists()
