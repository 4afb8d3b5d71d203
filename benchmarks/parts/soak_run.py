"""The training run of the soak: made tokens, a tiny prior, and the full 16-bit hierarchical setting on 4 processes."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from parts.measuring import ROOT

from dalle_ds.config import TokenizerConfig
from dalle_ds.data.scenes import COLOURS, SHAPES
from dalle_ds.data.token_shards import TokenManifest, encode_codes, write_manifest
from dalle_ds.data.writer import write_shard
from dalle_ds.tokenizer import train_tokenizer

WORLD_SIZE = 4  # two machines of two, as cpu_hierarchical.json has them
GRID_SIZE, VOCAB_SIZE, TEXT_VOCAB_SIZE = 4, 32, 400
N_SHARD, SHARD_LEN, BATCH = 4, 24, 2
# Of a width of 16: the paper's ratio, a quarter.
MATRIX_RANK = 4
# Scales that soon come to where fp16 overflows, and back: so updates are skipped again and again.
SCALING = {"initial_scale": 2.0**18, "growth": 2**0.125, "patience": 4}
FLAGS = {
    "--model.n_layer": 2,
    "--model.n_head": 2,
    "--model.head_dim": 8,
    "--model.text_len": 12,
    "--model.dropout": 0.1,
    "--caption_dropout": 0.1,
    "--schedule.lr_warmup_steps": 0,
    "--schedule.lr_rule": "plateau",
    "--schedule.plateau_window": 20,
    "--averaging": 0.9,
    "--averaging_every": 2,
    "--data.shuffle_buffer": 32,
    "--loop.log_every": 1,
    "--loop.timeout_minutes": 2,
}


@dataclass(frozen=True)
class Inputs:
    """What the run reads: a folder with tokens, a tokenizer and a DeepSpeed JSON."""

    folder: Path

    def command(self, out: Path, *, steps: int, save_every: int, keep: int) -> list[str]:
        """Arguments of `dalle-ds` that begin the run in `out`, or go on with it."""
        arguments = {
            "--deepspeed_config": self.folder / "ds_config.json",
            "--tokenizer": self.folder / "tokenizer.model",
            "--data.train": self.folder / "tokens",
            "--out": out,
            "--resume": "auto",
            **FLAGS,
            "--loop.steps": steps,
            "--loop.save_every": save_every,
            "--loop.keep": keep,
        }
        return ["train-prior", *(str(word) for item in arguments.items() for word in item)]


def make_inputs(folder: Path, seed: int) -> Inputs:
    """Random tokens whose captions tell two of them, a tokenizer, and ds_configs/cpu_hierarchical.json for few."""
    rng = np.random.default_rng(seed)
    (folder / "tokens").mkdir(parents=True)
    names = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    captions = []
    for shard in range(N_SHARD):
        samples = []
        for _ in range(SHARD_LEN):
            codes = rng.integers(VOCAB_SIZE, size=(GRID_SIZE, GRID_SIZE))
            captions.append(f"{names[codes[0, 0] % len(names)]} beside {names[codes[0, 1] % len(names)]}")
            samples.append({"npy": encode_codes(codes), "txt": captions[-1].encode()})
        write_shard(folder / "tokens", shard, samples)
    write_manifest(
        folder / "tokens",
        TokenManifest(
            n_samples=len(captions), grid_size=GRID_SIZE, vocab_size=VOCAB_SIZE, dvae="none", dvae_sha256="none"
        ),
    )
    train_tokenizer(captions, TokenizerConfig(vocab_size=TEXT_VOCAB_SIZE), folder / "tokenizer.model")
    config = json.loads((ROOT / "ds_configs" / "cpu_hierarchical.json").read_text())
    config["train_micro_batch_size_per_gpu"] = BATCH
    config["gradient_compression"]["matrix_rank"] = MATRIX_RANK
    config["resblock_gradient_scaling"] = SCALING
    (folder / "ds_config.json").write_text(json.dumps(config))
    return Inputs(folder)
