"""Stage 2 on any number of processes.

    deepspeed launch/train_prior.py --deepspeed_config ds_configs/cpu_zero3.json --preset tiny \\
        --tokenizer runs/tokenizer.model --data.train data/tokens/train --out runs/prior
"""

from dalle_ds.cli import launch

if __name__ == "__main__":
    launch("train-prior")
