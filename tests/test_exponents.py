"""What a 16-bit format does to gradients, from their histograms: equal to what torch's own casts do."""

import json

import pytest
import torch

from dalle_ds.reporting.exponents import CUSTOM, FP16, TOLERABLE, Histogram, read_exponents
from dalle_ds.training.histograms import as_histogram, count_exponents
from dalle_kernels.compression.formats import ERROR_BUFFER, decode, encode


def histogram(values):
    return Histogram(**as_histogram(count_exponents(values).tolist()))


def gradients(log2_size, spread, n=100_000):
    """Entries of many sizes, as gradients are; no two a half or a whole power of two, which a histogram cannot tell."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.exp2(log2_size + spread * torch.randn(n, generator=generator, dtype=torch.float64))
    return (sizes * torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)).float()


@pytest.mark.parametrize("constant", [-6, 0, 5, 12])
@pytest.mark.parametrize(
    ("format", "cast"),
    [
        pytest.param(FP16, lambda x: x.half().float(), id="fp16"),
        pytest.param(CUSTOM, lambda x: decode(encode(x, ERROR_BUFFER), ERROR_BUFFER), id="1-6-9"),
    ],
)
def test_what_is_flushed_is_what_a_cast_makes_zero(format, cast, constant):
    values = gradients(format.smallest + 1, 3.0)
    lost = (cast(values * 2.0**constant) == 0).double().mean()
    assert histogram(values).flushed(format, constant) == pytest.approx(float(lost), abs=1e-12)
    assert 0 < float(lost) < 1 or constant == 12


def test_what_overflows_in_fp16_is_what_a_cast_makes_infinite():
    """But for entries in the last 2^-11 of the top binade, which round up to infinity."""
    values = gradients(15.0, 2.0)
    infinite = values.half().isinf().double().mean()
    assert histogram(values).overflowing(FP16) == pytest.approx(float(infinite), abs=3e-4)
    assert histogram(values).overflowing(FP16, -20) == 0


def test_the_constants_for_fp16_lose_nothing_that_counts_and_those_beside_them_do():
    values = gradients(-30.0, 2.5)
    least, most = histogram(values).constants(FP16)
    assert least < most
    for constant in (least, most):
        scaled = (values * 2.0**constant).half()
        assert scaled.isfinite().all()
        assert (scaled == 0).double().mean() <= TOLERABLE
    assert ((values * 2.0 ** (least - 1)).half() == 0).double().mean() > TOLERABLE
    assert (values * 2.0 ** (most + 1)).half().isinf().any()
    assert histogram(gradients(-20.0, 12.0)).constants(FP16) is None, "they are too far apart"
    assert histogram(torch.zeros(3)).constants(FP16) is None


def test_quantiles_lie_where_the_entries_have_them():
    values = gradients(-20.0, 3.0)
    for share in (0.05, 0.5, 0.95):
        exact = float(torch.quantile(values.abs().log2(), share))
        assert histogram(values).quantile(share) == pytest.approx(exact, abs=0.1)  # even within a bin is not quite so
    assert histogram(torch.zeros(3)).quantile(0.5) is None
    assert histogram(torch.tensor([0.0, 1.0, 2.0])).shares() == ([0, 1], [1 / 3, 1 / 3])


def test_lines_are_read_by_step_and_what_does_not_read_is_left_out(tmp_path):
    path = tmp_path / "histograms.jsonl"
    assert read_exponents(path) == []
    row = {"first": -3, "counts": [1, 2], "zeros": 4, "nonfinite": 0}
    lines = [{"step": step, "kinds": {"gains": {**row, "zeros": step}}, "resblocks": [row, None]} for step in (20, 10)]
    lines += [{"step": 30, "kinds": {"gains": {"first": 1}}, "resblocks": []}, [1], {"step": 40, "kinds": []}]
    again = json.dumps({**lines[0], "kinds": {}})
    path.write_text("\n".join([*map(json.dumps, lines), again, '{"step": 50, "ki']))
    read = read_exponents(path)
    assert [exponents.step for exponents in read] == [10, 20]
    assert read[0].kinds["gains"] == Histogram(first=-3, counts=[1, 2], zeros=10, nonfinite=0)
    assert read[0].resblocks == [Histogram(**row), None]
    assert read[1].kinds == {}
