"""Captions to pictures.

python launch/sample.py --prior runs/prior --out pictures "a large red circle in the top left"
"""

from dalle_ds.cli import launch

if __name__ == "__main__":
    launch("sample")
