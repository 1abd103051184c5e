"""InfoNCE against its formula and open_clip; GradCache and distinct prompts against plain steps."""

import math

import clip
import pytest
import torch
import torch.nn.functional as F

from flowers import models
from flowers.losses import backward_in_chunks, info_nce, same_class

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
