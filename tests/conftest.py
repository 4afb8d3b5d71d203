"""A chain of commands at the smallest scale, made once for the tests that need trained models."""

from pathlib import Path

import pytest
from helpers import call_commands, run_distributed

from dalle_ds.cli import main

CONFIGS = Path(__file__).parents[1] / "ds_configs"
N_TRAIN, N_PIECES, VOCAB_SIZE, GRID_SIZE = 60, 400, 32, 4
DVAE_FLAGS = {
    "--model.image_size": 32,
    "--model.n_hid": 8,
    "--model.n_init": 16,
    "--model.vocab_size": VOCAB_SIZE,
    "--schedule.warm_start_steps": 2,
    "--schedule.lr_warmup_steps": 0,
    "--loop.steps": 3,
    "--loop.log_every": 1,
}
PRIOR_FLAGS = {
    "--model.n_layer": 2,
    "--model.n_head": 2,
    "--model.head_dim": 8,
    "--model.text_len": 12,
    "--schedule.lr_warmup_steps": 0,
    "--loop.steps": 3,
    "--loop.log_every": 1,
}
SMALL_DVAE, SMALL_PRIOR = ([word for item in flags.items() for word in item] for flags in (DVAE_FLAGS, PRIOR_FLAGS))


class Chain:
    """A folder with scenes, tokenizer.model, dvae, tokens and prior; and the command lines that go on from there."""

    def __init__(self, root):
        self.root = root

    def __truediv__(self, name):
        return self.root / name

    def train_dvae(self, out, *flags, data=None):
        data = data or self / "scenes/train"
        config = ["--deepspeed_config", CONFIGS / "cpu_dvae.json"]
        return ["train-dvae", *config, "--data.train", data, "--out", out, *SMALL_DVAE, *flags]

    def train_prior(self, out, *flags, data=None, tokenizer=None):
        config = [
            "--deepspeed_config",
            CONFIGS / "cpu_zero3.json",
            "--tokenizer",
            tokenizer or self / "tokenizer.model",
        ]
        data = data or self / "tokens/train"
        return ["train-prior", *config, "--data.train", data, "--out", out, *SMALL_PRIOR, *flags]


def run_here(*arguments):
    """A command that needs no process group, in this process."""
    assert main([str(argument) for argument in arguments]) == 0


def refusal(capsys, *command):
    """The one line that a command says of bad input."""
    capsys.readouterr()
    assert main([str(word) for word in command]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def run_in_ranks(world_size, *commands):
    """The commands one after the other on all ranks; returns the standard output and error of each, of rank 0."""
    by_rank = run_distributed(call_commands, world_size, *commands)
    for results in by_rank:
        assert [code for code, _, _ in results] == [0] * len(commands), results
    return [(out, err) for _, out, err in by_rank[0]]


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    chain = Chain(tmp_path_factory.mktemp("chain"))
    sizes = ["--image_size", 32, "--n_train", N_TRAIN, "--n_validation", 20, "--n_held_out", 12]
    run_here("make-scenes", chain / "scenes", *sizes, "--samples_per_shard", 20)
    run_here(
        "train-tokenizer", "--data", chain / "scenes/train", "--out", chain / "tokenizer.model", "--vocab_size", 400
    )
    validation = ["--data.validation", chain / "scenes/validation"]
    other = chain.train_dvae(chain / "other_dvae", "--loop.seed", "1")
    run_in_ranks(1, chain.train_dvae(chain / "dvae", *validation), other)
    for split in ("train", "validation"):
        data = ["--data", chain / "scenes" / split, "--out", chain / "tokens" / split]
        run_here("encode-images", "--dvae", chain / "dvae", *data)
    run_in_ranks(1, chain.train_prior(chain / "prior", "--data.validation", chain / "tokens/validation"))
    return chain
