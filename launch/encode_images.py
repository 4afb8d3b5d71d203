"""Pictures to token shards, on any number of processes; a run that was stopped goes on with the same command.

python launch/encode_images.py --dvae runs/dvae --data data/scenes/train --out data/tokens/train
torchrun --nproc_per_node 8 launch/encode_images.py --dvae runs/dvae --data data/scenes/train --out data/tokens/train
"""

from dalle_ds.cli import launch

if __name__ == "__main__":
    launch("encode-images")
