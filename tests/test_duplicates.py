"""Which evaluated images are near-duplicates of one another, and what a run writes of it."""

import json

import numpy as np
import torch
import torch.nn.functional as F

from flowers.duplicates import _descriptors, near_duplicates, write_duplicates


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


def test_the_resolution_does_not_change_the_groups():
    """Every third pixel of 224 was compared: of fine texture, that is another picture."""
    generator = torch.Generator().manual_seed(0)
    texture = 50 * torch.randn(6, 1, 448, 448, generator=generator)
    large = (draw_images(6, 448) + texture).clamp(0, 255)
    large[1] = large[0]
    large[3] = (0.4 * large[2] + 0.6 * large[4]).floor()
    described = []
    for resolution in (64, 224, 448):
        pixels = F.interpolate(large, (resolution, resolution), mode="bicubic", antialias=True)
        pixels = pixels.clamp(0, 255).byte()
        assert near_duplicates(pixels, np.arange(6)).tolist() == [0, 0, 1, 2, 3, 4]
        described.append(torch.cat(_descriptors(pixels, torch.arange(6)), dim=1))
    for other in described[1:]:
        assert ((described[0] * other).sum(1) / 3).min() > 0.99


def test_one_shape_in_two_colours_is_no_near_duplicate():
    """Drawn flowers of one shape, and orchids before a dark wall, were joined by their outlines."""
    grey = draw_images(4, 64).float().mean(1, keepdim=True).expand(-1, 3, -1, -1).clone()
    grey[1] = grey[0]  # without any colour, and twice
    grey[3] = grey[2]
    tint = torch.tensor([[1.0, 0.5, 0.1], [0.1, 0.5, 1.0]])
    grey[2:] *= tint[:, :, None, None]  # red and blue
    assert near_duplicates(grey.byte(), np.arange(4)).tolist() == [0, 0, 1, 2]


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
