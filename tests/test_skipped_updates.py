"""Updates that are skipped in a row are told of, with the resblocks whose gradients were not finite."""

import types

import pytest
import torch

from dalle_ds.training.skipped_updates import MANY, SkippedUpdates


class Engine:
    """What the count needs of an engine: whether the last update was made, and events by resblock."""

    def __init__(self, n_resblocks, spoiled=()):
        events = None if n_resblocks is None else torch.zeros(n_resblocks, dtype=torch.int64)
        path = types.SimpleNamespace(spoiled=lambda: list(spoiled))
        self.extras = types.SimpleNamespace(scaling=types.SimpleNamespace(n_events=events), path=path)
        self.is_applied = True

    def was_step_applied(self):
        return self.is_applied

    def step(self, *, applied, bad=()):
        self.is_applied = applied
        for resblock in bad:
            self.extras.scaling.n_events[resblock] += 1


def run(engine, updates):
    skipped = SkippedUpdates(engine)
    for step, (applied, bad) in enumerate(updates, 1):
        engine.step(applied=applied, bad=bad)
        skipped.see(step)


@pytest.mark.parametrize(
    ("n_resblocks", "bad", "spoiled", "where"),
    [
        (None, (), (), "not finite; lower the learning rate, and look at the data"),
        (
            12,
            (3, 5),
            ("layers.1.mlp.up.weight",),
            "not finite, in resblocks 3, 5; lower the learning rate or resblock_gradient_scaling.lowest_scale",
        ),
        (12, range(10), (), "in resblocks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more; "),
        (12, (), (), "not finite, outside all resblocks; lower"),
        (
            12,
            (),
            ["a", "b"],
            "not finite in the sums and averages of a, b; lower the learning rate, look at the data, or",
        ),
        (None, (), "abcdefghij", "averages of a, b, c, d, e, f, g, h and 2 more; lower the learning rate"),
    ],
)
def test_every_hundred_in_a_row_are_a_line_that_says_where(capsys, n_resblocks, bad, spoiled, where):
    engine = Engine(n_resblocks, spoiled)
    if n_resblocks:
        engine.step(applied=False, bad=[11])  # long ago
    run(engine, [(True, ())] * 7 + [(False, bad)] * (2 * MANY + 50))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, n in zip(lines, (MANY, 2 * MANY), strict=True):
        assert line.startswith(f"warning: the last {n} updates were skipped, up to step {7 + n}: their gradients were")
        assert where in line


def test_one_that_is_made_now_and_then_is_how_scales_find_their_place(capsys):
    run(Engine(2), [(i % MANY == 0, [1] if i % MANY else ()) for i in range(10 * MANY)])
    assert capsys.readouterr().out == ""
