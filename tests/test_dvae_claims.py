"""The benchmark of the paper's claims about the dVAE: its arms, its measures, its verdicts, and that it runs."""

import dataclasses
import math

import pytest
import torch

from benchmarks import dvae_claims
from benchmarks.dvae_claims import ARMS, PAPER, WINDOW, rises, schedules, verdict
from dalle_ds.config import DVAEConfig
from dalle_ds.models.dvae import DVAE

STRETCH = 1 / 200


@pytest.fixture
def threads():
    """The benchmark sets the number of threads; the tests after it get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [name for name in ARMS if name != "paper"])
def test_each_arm_differs_from_the_papers_in_one_thing(name):
    differing = [
        field.name
        for field in dataclasses.fields(ARMS[name])
        if field.name != "label" and getattr(ARMS[name], field.name) != getattr(ARMS["paper"], field.name)
    ]
    assert len(differing) == 1


def test_the_papers_arm_runs_the_papers_schedules_stretched():
    assert schedules(ARMS["paper"], 0, STRETCH) == (1.0, 0.0, 1.0)
    middle = schedules(ARMS["paper"], 375, STRETCH)
    assert middle[0] == pytest.approx((1 + 1 / 16) / 2)  # of 750 steps
    assert schedules(ARMS["paper"], 6_000, STRETCH) == (1 / 16, 6.6, PAPER.lr_final_multiplier)


def test_linear_annealing_keeps_the_length_and_the_ends():
    halves = [schedules(ARMS["linear"], step, STRETCH)[0] for step in (0, 187.5, 375, 750, 900)]
    assert halves == pytest.approx([1.0, 1 - 15 / 64, 17 / 32, 1 / 16, 1 / 16])


def test_a_loss_that_falls_has_not_risen():
    assert rises([3 - step / 100 for step in range(300)]) == (0.0, 0.0)


def test_a_rise_that_is_won_back_is_no_divergence():
    largest, left = rises([1.0] * 100 + [2.0] * 100 + [0.5] * 100)
    assert largest == pytest.approx(1.0)
    assert left == 0.0


def test_a_rise_that_stays_or_a_loss_that_is_not_finite_is_left_at_the_end():
    assert rises([1.0] * 100 + [2.0] * WINDOW)[1] == pytest.approx(1.0)
    assert rises([1.0, math.nan]) == (math.inf, math.inf)


def test_a_verdict_needs_all_seeds_and_else_counts_them():
    assert verdict([2, 3], [1, 2], larger=True) == "**seen**"
    assert verdict([2, 3], [1, 2], larger=False) == "**the opposite**"
    assert verdict([2, 3], [1, 4], larger=True) == "in 1 of 2 seeds"
    assert verdict([0, 0], [0, 0], larger=True) == "no difference"


def test_without_a_temperature_to_speak_of_the_relaxed_bound_is_the_true_one():
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=32, n_hid=8, n_blk_per_group=1, n_init=16, vocab_size=32))
    images = dvae_claims.scenes(8, 1, 32)
    cold, warm = (dvae_claims.measure(dvae, images, temperature) for temperature in (1e-4, 1.0))
    assert cold["gap"] == pytest.approx(0, abs=1e-6)  # nats; float32 sums
    assert abs(warm["gap"]) > 1e-4
    assert cold["true"] == warm["true"]
    assert cold["true"] == pytest.approx(-cold["reconstruction"] - cold["kl_per_cell"] / 192)


@pytest.mark.slow
def test_a_quick_run_writes_a_table_and_a_plot(tmp_path, threads):
    dvae_claims.main(["--quick", "--out", str(tmp_path)])
    table, plot = sorted(tmp_path.iterdir())
    assert (table.suffix, plot.suffix) == (".md", ".png")
    assert plot.name in table.read_text()
    assert all(claim.says in table.read_text() for claim in dvae_claims.CLAIMS)
    assert all(arm.label in table.read_text() for arm in ARMS.values())
