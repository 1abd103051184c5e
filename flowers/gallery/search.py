"""The nearest images to an image, a sentence, or a visitor's picture."""

import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from flowers.choices import TEMPLATE
from flowers.data import Flowers
from flowers.gallery.predictions import model_arguments
from flowers.images import UndecodableImage, read_rgb

# One lock for each dataset, so that two sessions do not make its pixels and features twice.
_locks = defaultdict(threading.Lock)


def nearest(
    features: np.ndarray, query: np.ndarray, leave_out: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rank the rows of features (N, D) by their dot product with query (D,).

    Returns the indices of the rows and their products, largest first, without row `leave_out` and
    those of images that can't be read, which are nan.
    """
    scores = features @ query  # (N,)
    # Stable, so that equal scores keep the order of the dataset and a page shows the same twice.
    order = np.argsort(-scores, kind="stable")
    order = order[(order != leave_out) & ~np.isnan(scores[order])]
    return order, scores[order]


class Searcher:
    """A run's model with its features of every image, which are stored in the cache folder.

    Attributes:
        features: image features (N, D) float32 of length 1; nan for images that can't be read.
        temperature: divides the logits of `ranking`; None where the run has found none on val.

    Raises UserError if the model or its calibration.json is damaged.
    """

    def __init__(self, flowers: Flowers, folder: Path):
        # Loaded here, as the first view needs no torch.
        from flowers import evaluate, weights

        self.model = weights.load_model(str(folder))
        with _locks[flowers.root]:
            try:
                self.features = self._features(flowers)
            except UndecodableImage:
                readable = _readable(flowers)
                features = self._features(_subset(flowers, readable))
                self.features = np.full((len(flowers.files), features.shape[1]), np.nan, "f4")
                self.features[readable] = features

        self.head, prompts = run_head(folder, self.model, flowers.class_names)
        self.temperature = evaluate.own_temperature(folder, flowers.class_names, *prompts)

    def _features(self, flowers: Flowers) -> np.ndarray:
        """Return the features (N, D) of all images, whatever their split."""
        import torch

        from flowers import frozen, pixels

        images = pixels.load_pixels(flowers, self.model.visual.input_resolution)
        everything = torch.arange(len(flowers.files))
        return frozen.image_activations(self.model, flowers, images, everything).float().numpy()

    def is_cut(self, sentence: str) -> bool:
        """Return whether a sentence is longer than what the model reads."""
        from flowers.models import encode

        return len(encode(sentence)) > self.model.context_length

    def of_text(self, sentence: str) -> np.ndarray:
        """Return the features (D,) of a sentence, of length 1."""
        from flowers.models import text_features

        return text_features(self.model, [sentence])[0].numpy()

    def of_picture(self, picture: np.ndarray) -> np.ndarray:
        """Return the features (D,) of a picture (H, W, 3) uint8, of length 1.

        It is resized, cropped and normalised as the images of the dataset are.
        """
        import torch

        from flowers.models import image_features
        from flowers.pixels import resize_and_crop

        image = torch.from_numpy(picture).permute(2, 0, 1)  # (3, H, W)
        pixels = resize_and_crop(image, self.model.visual.input_resolution)
        return image_features(self.model, pixels[None], torch.tensor([0]))[0].numpy()

    def ranking(self, features: np.ndarray) -> np.ndarray:
        """Return the probabilities (C,) of the classes for features (D,): calibrated, if the run
        has a temperature, else at the head's scale.
        """
        weight, bias = self.head[0].numpy(), self.head[1].numpy()  # (C, D), (C,)
        logits = (weight @ features + bias) / (self.temperature or 1.0)
        exponentials = np.exp(logits - logits.max())  # of at most 0: no overflow
        return exponentials / exponentials.sum()


def _readable(flowers: Flowers) -> np.ndarray:
    """Return the indices of the images that can be decoded."""

    def is_readable(file: Path) -> bool:
        try:
            read_rgb(file)
        except UndecodableImage:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        return np.flatnonzero(list(pool.map(is_readable, flowers.files)))


def _subset(flowers: Flowers, index: np.ndarray) -> Flowers:
    """Return the dataset with the images at `index` alone, without splits."""
    files = tuple(flowers.files[i] for i in index)
    return replace(flowers, files=files, labels=flowers.labels[index], splits={})


def run_head(
    folder: Path, model, class_names: Sequence[str]
) -> tuple[tuple, tuple[list[str] | None, str | None]]:
    """Return the head of a run's model, and the run's templates and file of prompts.

    The head, weight (C, D) and bias (C,), is its own, learned one, or made from the prompts it was
    trained with. Raises UserError if it is damaged or of other classes.
    """
    from flowers import evaluate

    learned = (folder / "classifier.pt").exists()
    templates, prompts_file = (None, None) if learned else own_prompts(folder)
    sentences = None
    if prompts_file:
        sentences = evaluate.read_prompts(prompts_file, class_names)
        evaluate.warn_of_changed_prompts(str(folder), prompts_file)
    head, _ = evaluate.load_head(str(folder), model, class_names, templates, TEMPLATE, sentences)
    return head, (templates, prompts_file)


def own_prompts(folder: Path) -> tuple[list[str] | None, str | None]:
    """Return the templates of a run and its file of prompts; None for what it has not.

    They are None, too, if its arguments have none that can be used. Raises UserError if they are no
    texts.
    """
    arguments = model_arguments(folder)
    templates = arguments.get("prompt_template") or []
    usable = templates and all("{}" in template for template in templates)
    return templates if usable else None, arguments.get("prompts") or None
