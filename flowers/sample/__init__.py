"""The built-in sample dataset: drawn flowers in Oxford's layout, for use without a download."""

from flowers import opencv_import

with opencv_import():
    from flowers.sample.dataset import write_sample

__all__ = ["write_sample"]
