"""Pictures to token shards.

python launch/encode_images.py --dvae runs/dvae --data data/scenes/train --out data/tokens/train
"""

from dalle_ds.cli import launch

if __name__ == "__main__":
    launch("encode-images")
