"""Stage 1 on any number of processes.

    deepspeed launch/train_dvae.py --deepspeed_config ds_configs/cpu_dvae.json --preset tiny \\
        --data.train data/scenes/train --data.validation data/scenes/validation --out runs/dvae
"""

from dalle_ds.cli import launch

if __name__ == "__main__":
    launch("train-dvae")
