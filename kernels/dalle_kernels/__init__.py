"""Kernels of dalle-ds: block-sparse attention over a text-and-image stream. Needs torch alone."""
