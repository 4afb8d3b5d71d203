"""dalle-ds: train a DALL-E from your own image-text pairs, at any scale, on DeepSpeed."""

__version__ = "0.1.0"
