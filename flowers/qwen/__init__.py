"""Qwen-VL: models, prompts, the exact ranking of class names, kept features."""
