"""The benchmark of the paper's claims about compression: its arms, its data, its verdicts, and that it runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compression_claims
from benchmarks.compression_claims import ARMS, CLAIMS, Claim, Settings, compression, ratios, verdict
from dalle_kernels.compression import PowerSGDOptions

ROOT = Path(__file__).parents[1]
EQUAL = Claim(says="", arm="fixed", other="none")
HURTS = Claim(says="", arm="resampled", other="fixed", hurts=True)


def test_arms_that_are_compared_differ_in_one_thing():
    for claim in CLAIMS:
        arm, other = ARMS[claim.arm], ARMS[claim.other]
        differences = arm.changes.items() ^ other.changes.items()
        assert len(differences) + (arm.rank_to_width != other.rank_to_width) == 1


def test_ranks_are_the_papers_part_of_the_width():
    options = compression(ARMS["fixed"], Settings())
    assert options.pop("type") == "powersgd"
    assert PowerSGDOptions(**options).matrix_rank == Settings().dim / 4
    assert 896 / 3968 < compression_claims.PAPERS < 512 / 1920  # Table 1


def test_scenes_of_both_splits_share_words_and_codebook_and_no_scene():
    train, validation = compression_claims.make_tokens(48, 16)
    assert train.text.shape == (48, 6)
    assert validation.codes.shape == (16, 16)
    assert train.codes.max() < train.image_vocab_size
    assert len(train.codes.unique()) > 16
    together = torch.cat([train.codes, validation.codes])
    assert len(together.unique(dim=0)) > 56  # small pictures of few colours may well share their tokens


def test_a_verdict_needs_all_seeds_and_else_counts_them():
    assert verdict(EQUAL, [0.995, 1.009]) == "**seen**"
    assert verdict(EQUAL, [0.995, 1.02]) == "in 1 of 2 seeds"
    assert verdict(EQUAL, [0.995, 0.95]) == "never worse; the same in 1 of 2 seeds"
    assert verdict(HURTS, [1.001, 1.2]) == "**seen**"
    assert verdict(HURTS, [0.999, 1.2]) == "in 1 of 2 seeds"
    assert verdict(HURTS, [0.99, 0.98]) == "**the opposite**"


def test_ratios_are_those_of_one_seed():
    results = [
        compression_claims.Result(arm=arm, seed=seed, steps=[0, 1], losses=[9.0, last], seconds=0.0)
        for seed, arm, last in ((0, "none", 1.0), (0, "fixed", 2.0), (1, "fixed", 6.0), (1, "none", 2.0))
    ]
    assert ratios(results, "fixed", "none") == [2.0, 3.0]


@pytest.mark.slow
def test_a_quick_run_writes_a_table_and_a_plot(tmp_path):
    command = [sys.executable, "benchmarks/compression_claims.py", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table, plot = sorted(tmp_path.iterdir())
    assert (table.suffix, plot.suffix) == (".md", ".png")
    text = table.read_text()
    assert plot.name in text
    assert all(claim.says in text for claim in CLAIMS)
    assert all(arm.label in text for arm in ARMS.values())
