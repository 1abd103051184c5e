"""Which evaluated images are near-duplicates of one another, and what a run writes of it."""

import json

import numpy as np
import torch
import torch.nn.functional as F

from flowers.duplicates import near_duplicates, write_duplicates


def draw_images(n: int, resolution: int) -> torch.Tensor:
    """Smooth random pictures, (n, 3, R, R) uint8."""
    coarse = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return (255 * F.interpolate(coarse, (resolution, resolution), mode="bilinear")).byte()


def test_near_duplicates_are_found_and_nothing_else():
    for resolution in (64, 224):
        pixels = draw_images(40, resolution)
        pixels[7] = pixels[3]
        pixels[9] = (0.6 * pixels[3].float() + 30).byte()  # darker and paler
        pixels[20] = pixels[21].roll(resolution // 64, dims=-1)  # moved a little
        pixels[30] = pixels[31].flip(-1)  # mirrored: another picture
        pixels[32:34] = 128  # of one colour: like nothing
        clusters = near_duplicates(pixels, np.arange(40))
        groups = [np.flatnonzero(clusters == c).tolist() for c in np.unique(clusters)]
        assert [group for group in groups if len(group) > 1] == [[3, 7, 9], [20, 21]]


def test_what_is_written_is_about_the_evaluated_images(tmp_path):
    pixels = draw_images(1200, 64)  # several blocks
    pixels[1100] = pixels[5]
    pixels[600] = pixels[1101]
    names = [f"{i:04d}.jpg" for i in range(1200)]
    for index, groups in (
        (np.arange(1200), [["0005.jpg", "1100.jpg"], ["0600.jpg", "1101.jpg"]]),
        (np.array([1100, 600, 5]), [["0005.jpg", "1100.jpg"]]),
        (np.arange(10), []),
    ):
        write_duplicates(tmp_path, pixels, index, names)
        assert json.loads((tmp_path / "duplicates.json").read_text()) == {"groups": groups}
