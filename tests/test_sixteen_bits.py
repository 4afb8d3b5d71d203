"""The benchmark of training in sixteen bits: its arms, its verdict, and that it runs."""

import pytest
from helpers import run_distributed

from benchmarks import sixteen_bits
from benchmarks.sixteen_bits import ARMS, REFERENCE, Result, verdict


def result(arm, seed, loss):
    return Result(arm=arm, seed=seed, losses=[9.0] * 9 + [loss], validation=loss, skipped=0, state_bytes={}, seconds=1)


def test_the_last_training_loss_is_the_mean_over_a_tenth_of_the_updates():
    assert result(REFERENCE, 0, 2.0).training == 2.0


@pytest.mark.parametrize(("losses", "word"), [((2.0, 1.01), "holds"), ((2.03, 1.02), "**fails**")])
def test_the_claim_is_judged_by_the_mean_of_ratios_seed_by_seed(losses, word):
    arm = next(name for name, arm in ARMS.items() if arm.claims)
    results = [result(REFERENCE, 0, 2.0), result(REFERENCE, 1, 1.0)]
    results += [result(arm, seed, loss) for seed, loss in enumerate(losses)]
    assert verdict(arm, results).endswith(f"{word}.")


def test_without_the_demo_it_says_what_is_missing(tmp_path, capsys):
    sixteen_bits.main(["--demo", str(tmp_path)])
    assert "run make demo" in capsys.readouterr().out


def run_quick(demo, out):
    sixteen_bits.main(["--quick", "--demo", demo, "--out", out])


@pytest.mark.slow
def test_a_quick_run_writes_a_table_and_a_plot(chain, tmp_path):
    run_distributed(run_quick, 1, str(chain.root), str(tmp_path), timeout=300)
    table, plot = sorted(tmp_path.iterdir())
    assert (table.suffix, plot.suffix) == (".md", ".png")
    assert plot.name in table.read_text()
    assert all(f"| {arm} |" in table.read_text() for arm in ARMS)
