"""Gradients that add up without being compressed: in 16 bits nothing is lost on average, and memory stays small."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from live_bytes import LiveBytes

from dalle_kernels.compression.factors import PowerSGDOptions
from dalle_kernels.compression.powersgd import PowerSGD
from dalle_kernels.compression.uncompressed import NoCompression, NoCompressionOptions

CODED = NoCompressionOptions(buffers="1-6-9")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **settings: mock.Mock())


@pytest.mark.parametrize("size", [2.0**-50, 1e-8, 1.0, 100.0, 8000.0])
def test_buffers_of_sixteen_bits_hold_large_gradients_and_small_ones(size):
    """In the format's own range an entry of 16 would be infinite, and no scale could help: the update never came."""
    compressor = NoCompression(CODED)
    gradients = {"layers.0.mlp.up": size * torch.randn(24, 6).clamp(-1.5, 1.5), "tokens": torch.ones(3)}
    compressor.declare(gradients)
    for half in range(2):
        compressor.add({name: (0.25 + 0.5 * half) * gradient for name, gradient in gradients.items()})
    assert compressor.finish(None).squared_norm.isfinite()
    averages = compressor.take(gradients)
    # Two roundings to 9 bits, or to what is the smallest number there.
    torch.testing.assert_close(averages["layers.0.mlp.up"], gradients["layers.0.mlp.up"], rtol=2**-8, atol=2**-56)
    assert not compressor.take(gradients)["layers.0.mlp.up"].any()


@pytest.mark.parametrize(
    "compressor",
    [NoCompression(CODED), PowerSGD(PowerSGDOptions(matrix_rank=2, wire="full"))],
    ids=["none", "powersgd"],
)
def test_in_32_bits_there_are_never_more_than_two_resblocks(compressor):
    """Else the 12b model's gradients, 2 bytes each while they add up, would take 4 more before each update."""
    n_block, shape = 12, (64, 64)
    gradients = {f"layers.{i}.mlp.{name}": torch.randn(shape) for i in range(n_block) for name in ("up", "down")}
    compressor.declare(gradients)
    resblock = 2 * 4 * 64 * 64
    with LiveBytes() as live:
        for i in reversed(range(n_block)):
            compressor.add({name: gradients[name] for name in (f"layers.{i}.mlp.up", f"layers.{i}.mlp.down")})
            compressor.send(f"layers.{i}.mlp", None)
        compressor.finish(None)
        for names in compressor.blocks.values():
            compressor.take(names)
    assert live.peak < 5 * resblock  # with what one needs to work in


@pytest.mark.parametrize("ratio", [1.0, 0.05], ids=["alike", "small-beside-noise"])
def test_the_sum_of_many_micro_steps_is_their_sum_on_average(ratio):
    """Rounded to nearest, a sum of 9 bits would lose what is less than 1/1024 of it: 28% of 128 equal parts."""
    n_micro_step = 128
    compressor, generator = NoCompression(CODED), torch.Generator().manual_seed(0)
    part = torch.randn(64, 64, generator=generator)
    compressor.declare({"layers.0.mlp.up": part})
    total = torch.zeros(64, 64)
    for _ in range(n_micro_step):
        gradient = ratio * part + (1 - ratio) * torch.randn(64, 64, generator=generator)
        compressor.add({"layers.0.mlp.up": gradient}, 1 / n_micro_step)
        total += gradient / n_micro_step
    compressor.finish(None)
    summed = compressor.take(["layers.0.mlp.up"])["layers.0.mlp.up"]
    lost = ((total - summed) * part).sum() / (total * part).sum()  # along what all have in common
    assert abs(lost) < 5e-3
    assert (summed - total).norm() < 0.02 * total.norm()


def test_errors_of_another_compressor_are_refused():
    with pytest.raises(ValueError, match="not of a run without compression"):
        NoCompression().load_state_dict({"n_updates": 3, "errors": {"layers.0.mlp.up": torch.zeros(2, 2)}})
