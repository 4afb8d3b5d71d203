"""The rules of the gradient scales (Appendix D), update by update."""

import json

import pytest
import torch

from dalle_ds.config import InputError
from dalle_ds.training.gradient_scales import GradientScales, NoScaling, ScalingOptions

GROWTH, SHRINK = 2 ** (1 / 1000), 2**0.5
START, LOW, HIGH = 2.0**13, 2.0**7, 2.0**24


def make(n_blocks=1, n_ranks=1, **options):
    return GradientScales(ScalingOptions(**options), n_blocks, n_ranks, "cpu")


def run(scales, events):
    """One update a character for a single resblock: `.` finite, `x` not."""
    for event in events:
        scales.update(torch.tensor([event == "x"]))
    return scales.values.item()


# Name -> what happens, and the exponents of growth and of 1 / shrink that the scale ends with.
RULES = {
    "starts": ("", 0, 0),
    "grows": (".", 1, 0),
    "doubles-in-1000": ("." * 1000, 1000, 0),
    "is-divided": ("x", 0, 1),
    "divided-then-grows": ("x.", 1, 1),
    "grown-then-divided": (".x", 1, 1),
    "second-event-at-once": ("xx", 0, 1),
    "stays-for-125-updates": ("x" * 126, 0, 1),
    "is-divided-again-after-them": ("x" * 127, 0, 2),
    "grows-while-it-waits": ("x" + "." * 60 + "x" * 65, 60, 1),
    "finite-updates-count-as-waiting": ("x" + "." * 125 + "x", 125, 2),
    "last-waiting-update": ("x" + "." * 124 + "x", 124, 1),
    "waits-anew-after-the-second": ("x" * 127 + "x" * 125, 0, 2),
    "and-then-a-third": ("x" * 127 + "x" * 126, 0, 3),
}


@pytest.mark.parametrize("name", RULES)
def test_a_scale_follows_the_papers_rules(name):
    events, grown, divided = RULES[name]
    # Float32 holds it rounded once.
    assert run(make(), events) == pytest.approx(START * GROWTH**grown / SHRINK**divided, rel=2**-24)


def test_a_thousand_good_updates_double_a_scale_to_the_last_bit_of_float32():
    assert run(make(), "." * 1000) == 2 * START
    assert run(make(), "." * 5000) == 32 * START


def test_a_scale_stays_between_its_bounds():
    assert run(make(initial_scale=HIGH / 1.001), "." * 100) == HIGH
    assert run(make(initial_scale=LOW * 1.1, patience=0), "x" * 100) == LOW
    assert run(make(initial_scale=LOW), "x.") == pytest.approx(LOW * GROWTH, rel=2**-24)


@pytest.mark.parametrize("n_ranks", [1, 8, 1024])
def test_start_and_bounds_are_multiplied_by_the_number_of_ranks(n_ranks):
    assert make(n_ranks=n_ranks).values.item() == n_ranks * START
    assert run(make(n_ranks=n_ranks, initial_scale=HIGH), ".") == n_ranks * HIGH
    assert run(make(n_ranks=n_ranks, initial_scale=LOW), "x") == n_ranks * LOW
    assert make(n_ranks=n_ranks, per_rank=False).values.item() == START


def test_every_resblock_goes_its_own_way():
    together = make(n_blocks=4)
    apart = [make() for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        nonfinite = torch.rand(4, generator=generator) < torch.tensor([0.0, 0.01, 0.1, 1.0])
        together.update(nonfinite)
        for scales, event in zip(apart, nonfinite, strict=True):
            scales.update(event[None])
    assert together.values.equal(torch.cat([scales.values for scales in apart]))
    assert together.n_events.equal(torch.cat([scales.n_events for scales in apart]))
    assert together.n_events[0] == 0
    assert together.n_events[3] == 400
    assert together.values.unique().numel() == 4


def test_the_tensor_of_values_is_changed_in_place():
    scales = make(n_blocks=2)
    values, view = scales.values, scales.values[1]
    scales.update(torch.tensor([False, True]))
    assert scales.values is values
    assert view.item() == pytest.approx(START / SHRINK, rel=2**-24)
    scales.load_state_dict(make(n_blocks=2).state_dict())
    assert scales.values is values
    assert view.item() == START


def test_a_run_that_is_stopped_goes_on_as_if_it_were_not():
    events = "..x" + "." * 50 + "xx" + "." * 80 + "x" + "." * 20
    whole = make()
    run(whole, events)
    for cut in (0, 3, 40, 100, 140):
        first, second = make(), make()
        run(first, events[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        run(second, events[cut:])
        assert second.state_dict() == whole.state_dict()


def test_a_state_fits_another_number_of_ranks():
    eight = make(n_ranks=8)
    run(eight, "." * 10 + "x..")
    two = make(n_ranks=2)
    two.load_state_dict(eight.state_dict())
    assert two.values.equal(eight.values / 4)
    assert run(two, "x" * 123) == eight.values.item() / 4
    # Two roundings to float32, of both sides.
    assert run(two, "x") == pytest.approx(eight.values.item() / 4 / SHRINK, rel=2**-23)
    assert two.n_events.item() == 125
    fixed = make(n_ranks=2, per_rank=False)
    fixed.load_state_dict(make(n_ranks=8, per_rank=False, initial_scale=HIGH).state_dict())
    assert fixed.values.item() == HIGH


def test_a_state_outside_of_the_bounds_of_now_is_brought_within():
    narrow = make(initial_scale=2.0**10, highest_scale=2.0**11)
    narrow.load_state_dict(make().state_dict())
    assert narrow.values.item() == 2.0**11


def test_a_state_of_another_model_is_refused_and_an_empty_one_changes_nothing():
    scales = make(n_blocks=4)
    with pytest.raises(InputError, match=r"^gradient scales of 6 resblocks do not fit a model of 4: .*$"):
        scales.load_state_dict(make(n_blocks=6).state_dict())
    scales.load_state_dict(NoScaling().state_dict())
    assert scales.values.eq(START).all()


def test_no_scaling_has_the_signature_of_scaling():
    off, on = NoScaling(), make()
    names = {name for name in dir(on) if not name.startswith("_")} - {"options"}
    assert names == {name for name in dir(off) if not name.startswith("_")}
    off.update(torch.tensor([True]))
    off.load_state_dict(on.state_dict())
    assert off.values is None
    assert off.state_dict() == {}


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("growth", 0.9, "must be at least 1"),
        ("shrink", 1.0, "must be above 1"),
        ("patience", -1, "must not be negative"),
        ("lowest_scale", 0.0, "must be positive"),
        ("initial_scale", 64.0, "must lie between lowest_scale 128.0 and highest_scale 16777216.0"),
        ("highest_scale", 2.0**10, "must lie between"),
        ("growth", float("nan"), "must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(field, value, reason):
    with pytest.raises(InputError, match=reason) as error:
        ScalingOptions(**{field: value})
    assert field in str(error.value)
    assert "\n" not in str(error.value)
