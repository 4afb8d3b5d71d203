"""Schedules: the paper's values at the start, the middle and the end; halvings that follow the loss or a hand."""

import json
import os

import pytest
import torch
from helpers import run_distributed

from dalle_ds.config import LR_RULES, PriorScheduleConfig
from dalle_ds.presets import PRESETS
from dalle_ds.training.schedules import (
    PRIOR_RATES,
    PlateauRate,
    ScheduledRate,
    cosine,
    prior_learning_rate,
    warmup,
    warmup_cosine,
)


@pytest.mark.parametrize(
    ("start", "end", "steps", "middle"),
    [
        pytest.param(0.0, 6.6, 5_000, 3.3, id="kl_weight"),
        pytest.param(1.0, 1 / 16, 150_000, 0.53125, id="temperature"),
        pytest.param(1e-4, 1.25e-6, 1_200_000, 5.0625e-5, id="learning_rate"),
    ],
)
def test_the_papers_cosines_have_their_ends_and_middle(start, end, steps, middle):
    assert cosine(0, start, end, steps) == start
    assert cosine(steps // 2, start, end, steps) == pytest.approx(middle, rel=1e-12)
    assert cosine(steps, start, end, steps) == end
    assert cosine(10 * steps, start, end, steps) == end
    values = [cosine(step, start, end, steps) for step in range(0, steps + 1, steps // 100)]
    assert values == sorted(values, reverse=start > end)


@pytest.mark.parametrize(
    ("start", "end", "steps"), [(0.0, 6.6, 5_000), (1.0, 1 / 16, 150_000), (1.0, 1 / 80, 1_200_000)]
)
def test_a_schedule_in_a_thousandth_of_the_steps_has_the_same_values_at_a_thousandth_of_the_step(start, end, steps):
    """To the last digits: the fraction of the way is the same number, whatever it was divided from."""
    for step in (0, 1_000, 3_000, 5_000, 75_000, 150_000, 600_000, 1_200_000, 3_000_000):
        assert cosine(step // 1_000, start, end, steps // 1_000) == pytest.approx(
            cosine(step, start, end, steps), rel=1e-12
        )


def test_cosine_over_no_steps_is_at_its_end_at_once():
    assert cosine(0, 0.0, 6.6, 0) == 6.6


def test_warmup_rises_by_equal_parts_and_stays():
    assert [warmup(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup(0, 0) == 1.0


def test_learning_rate_warms_up_to_its_peak_and_falls_to_its_final_multiplier():
    """Stage 2: 5,000 steps of warm-up, and five halvings' worth of decay, 1/32, at the end."""
    values = [
        warmup_cosine(step, 5_000, 1 / 32, 430_000) for step in (0, 2_499, 4_999, 5_000, 217_500, 430_000, 999_999)
    ]
    assert values == pytest.approx([1 / 5000, 0.5, 1.0, 1.0, (1 + 1 / 32) / 2, 1 / 32, 1 / 32], rel=1e-12)


def test_a_warmup_longer_than_the_schedule_does_not_fail():
    assert warmup_cosine(15, 10, 0.1, 5) == 0.1
    assert warmup_cosine(9, 10, 0.1, 5) == 1.0


# --- learning rates ---------------------------------------------------------------------------------------------------

WARMUP, WINDOW = 3, 4


def alone(values):
    return values.tolist()


def plateau(sum_over_ranks=alone, **settings):
    rule = {"warmup_steps": WARMUP, "window": WINDOW, "improvement": 0.1, "patience": 2, "halvings": 5}
    return PlateauRate(**{**rule, **settings}, sum_over_ranks=sum_over_ranks)


def halvings(rate, losses):
    """Steps after which the rate was halved by its rule; every multiplier is checked against them."""
    found = []
    for step, loss in enumerate(losses):
        assert rate.multiplier(step) == min(1, (step + 1) / WARMUP) / 2**rate.n_halved
        before = rate.n_halved
        if rate.observe(step, torch.tensor(loss)):
            found.append(step)
        assert rate.n_halved == before + (found[-1:] == [step])
    return found


def windows(*means):
    """Losses of a warm-up, which count for nothing, and of one window for each mean."""
    return [100.0] * WARMUP + [mean + part for mean in means for part in (-0.5, 0.25, 0.5, -0.25)]


def end(window):
    """The last step of the window of that number."""
    return WARMUP + WINDOW * (window + 1) - 1


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        pytest.param([8, 7, 6, 5, 4, 3, 2], [], id="it falls"),
        pytest.param([8, 8, 6, 6, 4, 4, 2], [], id="no two bad windows in a row"),
        pytest.param([8, 8, 8, 8], [2], id="it stands"),
        pytest.param([8, 7.5, 7.25], [2], id="it falls by less than a tenth"),
        pytest.param([8, 7.5, 7.0], [], id="it falls by more than a tenth in two windows"),
        pytest.param([8, 6, 7, 6.5, 5, 5, 5], [3, 6], id="it is the best mean that counts, of any rate"),
        pytest.param([-8, -9, -9, -9], [3], id="losses below 0"),
        pytest.param([8] * 20, [2, 4, 6, 8, 10], id="five at most"),
    ],
)
def test_the_rate_is_halved_where_means_of_windows_stop_falling(means, expected):
    rate = plateau()
    assert halvings(rate, windows(*means)) == [end(window) for window in expected]
    assert rate.multiplier(1_000) == 0.5 ** len(expected)


def test_five_halvings_leave_the_papers_final_rate():
    rate = plateau()
    halvings(rate, windows(*[8] * 20))
    assert 4.5e-4 * rate.multiplier(10**6) == pytest.approx(1.40625e-5, rel=1e-12)


def test_a_halving_by_hand_works_from_the_next_step_on_counts_and_gives_the_new_rate_its_patience():
    rate, losses = plateau(halvings=2), windows(*[8] * 8)
    assert halvings(rate, losses[: end(1) + 3]) == []  # one bad window, and part of the next
    rate.halve()
    assert rate.multiplier(end(1) + 3) == 0.5
    found = [step for step in range(end(1) + 3, len(losses)) if rate.observe(step, torch.tensor(losses[step]))]
    assert found == [end(3)], "without the hand it would have been at the end of window 2"
    rate.halve()
    assert rate.multiplier(1_000) == 1 / 8, "a hand may go beyond"


def test_a_scheduled_rate_is_halved_by_hand_alone_and_remembers_it():
    rate = ScheduledRate(lambda step: warmup_cosine(step, 10, 0.1, 100))
    assert not any(rate.observe(step, torch.tensor(8.0)) for step in range(100))
    assert rate.multiplier(20) == warmup_cosine(20, 10, 0.1, 100)
    rate.halve()
    resumed = ScheduledRate(rate.schedule)
    resumed.load_state_dict(json.loads(json.dumps(rate.state_dict())))
    assert resumed.multiplier(20) == rate.multiplier(20) == warmup_cosine(20, 10, 0.1, 100) / 2


def noisy(n):
    """Losses of a run that falls to a plateau, float32 as training has them."""
    noise = torch.randn(n, generator=torch.Generator().manual_seed(1))
    return (2 + 6 * torch.exp(-torch.arange(n) / 30) + 0.3 * noise).tolist()


@pytest.mark.parametrize("stop", [1, WARMUP, 40, 41, 42, 43, 60, 90])
def test_resuming_within_a_window_equals_not_stopping_bit_for_bit(stop):
    losses = noisy(200)
    whole, first, second = (plateau(improvement=0.01) for _ in range(3))
    expected = halvings(whole, losses)
    assert len(expected) == 5
    found = halvings(first, losses[:stop])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [step for step in range(stop, 200) if second.observe(step, torch.tensor(losses[step]))]
    assert found == expected
    assert second.state_dict() == whole.state_dict()


def follow_plateau(stop):
    """Each rank sees its share of the losses of a step; stopped once, and resumed from rank 0's state."""
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.schedules import sum_over_ranks

    calls, found, states = [], [], []

    def counted(values):
        calls.append(1)
        return sum_over_ranks(values)

    with process_group() as ranks:
        rank, world_size = int(os.environ["RANK"]), ranks.world_size
        rate = plateau(counted, improvement=0.01)
        for step, loss in enumerate(noisy(200)):
            if step == stop:
                states.append(json.dumps(rate.state_dict()))
                rate = plateau(counted, improvement=0.01)
                rate.load_state_dict(json.loads(states[0]))
                calls.clear()
            # The two ranks' losses lie apart, and their mean is the loss that one rank would see.
            apart = 0.5 * (2 * rank - world_size + 1)
            if rate.observe(step, torch.tensor(loss, dtype=torch.float64) + apart):
                found.append(step)
    return found, states, len(calls)


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_agree_with_each_other_and_with_a_single_one_and_meet_at_the_ends_of_windows_alone(world_size):
    stop = 42
    expected = halvings(plateau(improvement=0.01), noisy(200))
    results = run_distributed(follow_plateau, world_size, stop)
    assert all(result == results[0] for result in results), "state and halvings are the same on all ranks"
    found, _, n_calls = results[0]
    assert found == expected
    last = expected[-1]
    assert n_calls == sum(1 for step in range(stop, last + 1) if (step + 1 - WARMUP) % WINDOW == 0)


def test_the_rules_are_those_that_the_configuration_names_and_the_papers_presets_take_the_papers():
    assert tuple(PRIOR_RATES) == LR_RULES
    for name, preset in PRESETS.items():
        rate = prior_learning_rate(preset.prior.schedule)
        assert isinstance(rate, ScheduledRate if name == "tiny" else PlateauRate), name
    paper = prior_learning_rate(PRESETS["12b"].prior.schedule)
    assert [paper.multiplier(step) for step in (0, 2_499, 4_999, 5_000)] == [1 / 5_000, 0.5, 1.0, 1.0]
    assert paper.halvings == 5
    with_cosine = prior_learning_rate(PriorScheduleConfig(lr_rule="cosine"))
    assert with_cosine.multiplier(217_500) == pytest.approx((1 + 1 / 32) / 2)


@pytest.mark.parametrize("rule", LR_RULES)
def test_a_run_may_go_on_by_another_rule_with_the_halvings_it_had(rule):
    """Bug: from cosine to plateau was a KeyError."""
    rate = prior_learning_rate(PriorScheduleConfig(lr_rule=rule, lr_warmup_steps=0))
    of_cosine, of_plateau = {"n_halved": 1}, {"n_halved": 1, "n_bad": 2, "best": 0.5, "seen": [3.0, 2.0]}
    rate.load_state_dict(of_cosine if rule == "plateau" else of_plateau)
    assert rate.multiplier(0) == pytest.approx(0.5)
    assert not rate.observe(0, torch.tensor(1.0))
