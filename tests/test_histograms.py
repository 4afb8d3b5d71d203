"""Exponent histograms of gradients: exact in every format, by kind and resblock, and summed over ranks."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import run_distributed

from dalle_ds.config import PriorConfig
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.gradient_scaling import resblock_index
from dalle_ds.models.prior import Prior
from dalle_ds.presets import PRESETS
from dalle_ds.training import histograms
from dalle_ds.training.histograms import (
    KINDS,
    LOWEST,
    N_BIN,
    NONFINITE,
    ZERO,
    GradientHistograms,
    as_histogram,
    count_exponents,
    parameter_kind,
)


def expected_counts(values):
    """The oracle: Python's own floats, one by one."""
    counts = [0] * N_BIN
    for value in values:
        if not math.isfinite(value):
            counts[NONFINITE] += 1
        else:
            counts[ZERO if value == 0 else math.frexp(value)[1] - 1 - LOWEST] += 1
    return counts


def awkward(dtype):
    """All powers of two of the format with their neighbours, subnormal numbers, both zeros, and what is not finite."""
    info = torch.finfo(dtype)
    powers = torch.tensor([2.0**e for e in range(LOWEST, 128)], dtype=torch.float64).to(dtype)
    tiny = info.tiny * torch.tensor([1 / 2, 3 / 4, info.eps, 3 * info.eps], dtype=torch.float64).to(dtype)
    others = torch.tensor([0.0, -0.0, info.max, -info.max, math.inf, -math.inf, math.nan], dtype=dtype)
    return torch.cat([powers, -powers, torch.nextafter(powers.float(), torch.tensor(0.0)).to(dtype), tiny, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exponents_are_counted_as_pythons_floats_have_them(dtype):
    values = awkward(dtype)
    assert count_exponents(values).tolist() == expected_counts(values.tolist())


@pytest.mark.parametrize("scale", [2.0**13, 2.0**-3, torch.tensor(2.0**20)])
def test_a_scale_that_is_a_power_of_two_moves_the_counts_by_its_exponent(scale):
    values = torch.randn(1_000, generator=torch.Generator().manual_seed(1)) * 1e-4
    moved, shift = count_exponents(values, scale), int(math.log2(scale))
    assert shift != 0
    assert moved[:ZERO].equal(torch.roll(count_exponents(values)[:ZERO], -shift))


def test_pieces_add_up(monkeypatch):
    values = torch.randn(10, 101, generator=torch.Generator().manual_seed(1)).half()
    whole = count_exponents(values)
    monkeypatch.setattr(histograms, "PIECE", 7)
    assert count_exponents(values).equal(whole)
    assert whole.sum() == values.numel()
    assert count_exponents(torch.empty(0)).sum() == 0


def test_every_parameter_of_the_prior_has_its_kind_and_its_resblock():
    with torch.device("meta"):
        config = PriorConfig(n_layer=3, n_head=2, head_dim=8)
        names = dict(Prior(config).named_parameters())
    kinds = {}
    for name in names:
        kinds.setdefault(parameter_kind(name), []).append(name)
    assert set(kinds) == set(KINDS) - {"other"}
    assert all(names[name].dim() == 2 for kind in list(KINDS)[:2] for name in kinds[kind])
    assert (len(kinds["attention matrices"]), len(kinds["MLP matrices"]), len(kinds["gains"])) == (
        3 * 4,
        3 * 2,
        3 * 2 + 2,
    )
    assert sorted(kinds["embeddings"]) == ["image_states.tokens", "text_states.tokens"]
    assert {resblock_index(name) for name in names} == {None, *range(6)}
    assert resblock_index("layers.2.mlp_norm.bias") == resblock_index("module.layers.2.mlp.up.weight") == 5
    assert resblock_index("layers.2.attention_norm.bias") == 4
    with torch.device("meta"):
        sandwich = dict(Prior(dataclasses.replace(config, sandwich_norm=True)).named_parameters())
    assert {parameter_kind(name) for name in sandwich.keys() - names.keys()} == {"gains", "biases"}
    assert "other" not in map(parameter_kind, sandwich)
    with torch.device("meta"):
        dvae = DVAE(PRESETS["tiny"].dvae.model)
    assert {parameter_kind(name) for name, _ in dvae.named_parameters()} == {"biases", "other"}


def test_the_json_form_is_as_narrow_as_what_it_holds():
    counts = count_exponents(torch.tensor([1.0, 0.25, 0.3, 0.0, math.nan]))
    assert as_histogram(counts.tolist()) == {"first": -2, "counts": [2, 0, 1], "zeros": 1, "nonfinite": 1}
    assert as_histogram(count_exponents(torch.zeros(3)).tolist()) == {
        "first": LOWEST,
        "counts": [0],
        "zeros": 3,
        "nonfinite": 0,
    }
    assert as_histogram([0] * N_BIN) is None


def gradients():
    """Gradients of one step, times their scales, which differ by resblock."""
    generator = torch.Generator().manual_seed(3)
    for name, exponent, scale in [
        ("layers.0.attention.query.weight", -20, 2.0**13),
        ("layers.0.mlp.up.weight", -24, 2.0**15),
        ("layers.1.mlp_norm.weight", -10, 2.0**9),
        ("image_states.tokens", -30, 1.0),
    ]:
        values = torch.randn(16, 8, generator=generator) * 2.0**exponent
        yield name, (values * scale).to(torch.float16 if "mlp.up" in name else torch.float32), torch.tensor(scale)


def write_shares(folder):
    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.metrics import MetricsLog

    with process_group() as ranks:
        log = MetricsLog(Path(folder) / "histograms.jsonl") if ranks.is_first else None
        recorded = GradientHistograms(2, 4, ranks.device, log)
        for step in range(1, 5):
            if recorded.is_due(step):
                for name, gradient, scale in gradients():
                    recorded.add(name, resblock_index(name), gradient.flatten()[ranks.rank :: ranks.world_size], scale)
                recorded.write(step)


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_sum_their_shares_into_lines_that_count_every_entry_once(tmp_path, world_size):
    run_distributed(write_shares, world_size, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "histograms.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [(2, "gradients"), (4, "gradients")]
    assert all(line["kinds"] == lines[0]["kinds"] for line in lines), "each line begins anew"
    unscaled = {name: gradient.float() / scale for name, gradient, scale in gradients()}
    expected = {parameter_kind(name): as_histogram(count_exponents(x).tolist()) for name, x in unscaled.items()}
    assert lines[0]["kinds"] == expected
    blocks = lines[0]["resblocks"]
    assert blocks == [expected["attention matrices"], expected["MLP matrices"], None, expected["gains"]]
    assert sum(expected["attention matrices"]["counts"]) == 128
