"""The benchmark of gradient scales: gains change nothing in exact arithmetic, and that it runs."""

import dataclasses

import pytest
import torch
from helpers import run_distributed

from benchmarks import gradient_scaling
from benchmarks.gradient_scaling import (
    GAINS,
    SETTINGS,
    TASKS,
    Size,
    Steepness,
    add_gains,
    draw_batch,
    factor,
    late_flushes,
)
from dalle_ds.models.prior import Prior

SIZE = Size(batch_size=2, model=dataclasses.replace(Size().model, n_layer=2))


def test_a_picture_repeats_its_caption():
    text, lengths, codes = draw_batch(SIZE, 3)
    assert (lengths == 7).all()
    assert codes[:, :7].equal(text)
    assert codes[:, 7:].equal(text[:, :2])


def test_gains_with_the_matrices_that_make_up_for_them_change_no_loss_and_scale_gradients():
    torch.manual_seed(0)
    plain = Prior(SIZE.model)
    torch.nn.init.normal_(plain.image_head.unembed.weight)
    steep = Prior(SIZE.model)
    steep.load_state_dict(plain.state_dict())
    add_gains(steep, SETTINGS[GAINS])
    with torch.no_grad():
        for name, parameter in steep.named_parameters():
            parameter.mul_(factor(name, SETTINGS[GAINS]))
    losses = [prior(*draw_batch(SIZE, 0))["loss"] for prior in (plain, steep)]
    assert losses[0].equal(losses[1])  # powers of two
    for loss in losses:
        loss.backward()
    for (name, parameter), other in zip(plain.named_parameters(), steep.parameters(), strict=True):
        if parameter.grad is not None:
            assert other.grad.equal(parameter.grad / factor(name, SETTINGS[GAINS]))


def test_a_plain_setting_has_no_gains():
    assert {Steepness().gain(resblock) for resblock in range(4)} == {1.0}


def test_flushes_are_averaged_over_the_second_half():
    result = gradient_scaling.Result(
        setting="",
        arm="",
        losses=[],
        flushed={0: [1.0, 1.0], 1: [1.0, 1.0], 2: [0.5, 0.0], 3: [0.0, 0.0]},
        skipped=0,
        ended=False,
        seconds=0,
    )
    assert late_flushes(result) == [0.25, 0.0]


def run_quick(out):
    gradient_scaling.main(["--quick", "--out", out])


@pytest.mark.slow
def test_a_quick_run_writes_a_table_and_a_plot(tmp_path):
    run_distributed(run_quick, 1, str(tmp_path), timeout=300)
    table, plot = sorted(tmp_path.iterdir())
    assert (table.suffix, plot.suffix) == (".md", ".png")
    assert plot.name in table.read_text()
    assert all(f"| {setting} | {arm} |" in table.read_text() for setting, arm in TASKS)
