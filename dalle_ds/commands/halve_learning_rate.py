"""Ask a run to halve its learning rate, by hand, after its next step.

    dalle-ds halve-learning-rate runs/prior

Leaves the file RUN/halve-learning-rate; a run that is not going takes it when it is resumed. When it is taken, the file
is renamed after the step: a run that dies before its next checkpoint then halves again after the same step.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the run folder that train-dvae or train-prior writes")


def run(args: argparse.Namespace) -> None:
    from dalle_ds.training.requests import ask_to_halve

    ask_to_halve(args.run)
    print(f"{args.run}: the learning rate is halved after the next step", flush=True)
