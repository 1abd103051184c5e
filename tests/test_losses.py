"""InfoNCE against its written formula and open_clip; GradCache and distinct prompts against the plain step."""

import math

import clip
import pytest
import torch
import torch.nn.functional as F

from flowers import models
from flowers.losses import backward_in_chunks, info_nce, same_class


def features(n=12, d=16):
    torch.manual_seed(0)
    return (F.normalize(torch.randn(n, d), dim=1) for _ in range(2))


def test_plain_form_is_the_formula():
    image, text = features()
    tau, n = 0.07, len(image)
    s = (image @ text.t() / tau).tolist()
    expected = -sum(
        math.log(math.exp(s[i][i]) / sum(math.exp(v) for v in s[i]))
        + math.log(math.exp(s[i][i]) / sum(math.exp(s[j][i]) for j in range(n)))
        for i in range(n)
    ) / (2 * n)
    assert info_nce(image, text, 1 / tau).item() == pytest.approx(expected, rel=1e-5)
    from open_clip.loss import ClipLoss

    assert ClipLoss()(image, text, torch.tensor(1 / tau)).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_class_positives_average_over_all_matches():
    image, text = features()
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 7])
    s = 20 * image @ text.t()
    total = 0.0
    for i in range(12):
        kin = [j for j in range(12) if labels[j] == labels[i]]
        total -= sum(
            (s[i].log_softmax(0)[j] + s[:, i].log_softmax(0)[j]).item() for j in kin
        ) / len(kin)
    assert info_nce(image, text, 20, same_class(labels)).item() == pytest.approx(
        total / 24, rel=1e-5
    )
    assert torch.allclose(
        info_nce(image, text, 20, same_class(torch.arange(12))), info_nce(image, text, 20)
    )


def test_with_one_prompt_a_class_both_kinds_of_positives_agree():
    """What pairs of one class take from each other as negatives cancels exactly when their texts are the same."""
    image, prompts = features()
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 7])
    text = prompts[labels]
    assert torch.allclose(
        info_nce(image, text, 20), info_nce(image, text, 20, same_class(labels)), rtol=1e-5
    )


def step(model, images, tokens, labels, chunk=0, plain=False):
    """Loss and gradients: plain (a caption of 77 tokens for each image), or each distinct prompt once, cut, whole or in chunks."""
    model.zero_grad()
    if plain:
        image = F.normalize(model.encode_image(images), dim=1)
        text = F.normalize(model.encode_text(F.pad(tokens, (0, 77 - tokens.shape[1]))), dim=1)
        loss = info_nce(image, text, model.logit_scale.exp(), same_class(labels))
        loss.backward()
    else:
        distinct, inverse = torch.unique(tokens, dim=0, return_inverse=True)
        loss_of = lambda i, t: info_nce(
            i, t.index_select(0, inverse), model.logit_scale.exp(), same_class(labels)
        )
        loss = backward_in_chunks(
            [lambda x: models.encode_images(model, x), lambda t: models.encode_texts(model, t)],
            [images, distinct],
            loss_of,
            chunk or len(images),
        )
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("chunk", [0, 5])
def test_distinct_prompts_and_chunks_give_the_plain_gradient(chunk):
    torch.manual_seed(0)
    model = models.build("tiny")
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(0, 6, (16,))
    prompts = [
        f"an image of the {name} flower"
        for name in ("rose", "tree mallow", "mallow", "globe thistle", "iris", "lotus")
    ]
    tokens = models.tokenize(prompts)[labels]
    assert torch.equal(tokens, clip.tokenize([prompts[i] for i in labels])[:, : tokens.shape[1]])
    loss, grads = step(model, images, tokens, labels, chunk)
    expected_loss, expected = step(model, images, tokens, labels, plain=True)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for name, grad in expected.items():
        assert grads[name].allclose(grad, atol=1e-5, rtol=1e-3), name
    assert grads["logit_scale"].abs() > 0
