"""The built-in sample dataset: drawn flowers in Oxford's layout, for use without a download."""

from flowers.sample.dataset import write_sample

__all__ = ["write_sample"]
