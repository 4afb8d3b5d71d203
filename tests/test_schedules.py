"""Schedules: the paper's values at the start, the middle and the end, and never a turn back."""

import pytest

from dalle_ds.training.schedules import cosine, warmup, warmup_cosine


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
