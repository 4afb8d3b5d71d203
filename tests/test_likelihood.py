"""logit-Laplace, KL and Gumbel-softmax against torch's own distributions and closed forms."""

import math

import pytest
import torch
from torch.distributions import Categorical, Laplace, SigmoidTransform, TransformedDistribution, kl_divergence

from dalle_ds.models.likelihood import (
    gumbel_softmax,
    kl_to_uniform,
    logit_laplace_log_density,
    map_pixels,
    unmap_pixels,
)

K = 8192


def test_density_equals_the_sigmoid_of_a_laplace_variable():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1000, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    mu, log_b = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    oracle = TransformedDistribution(Laplace(mu, log_b.exp()), [SigmoidTransform()])
    assert (logit_laplace_log_density(x, mu, log_b) - oracle.log_prob(x)).abs().max() < 1e-12


@pytest.mark.parametrize(("mu", "log_b"), [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.5)])
def test_density_integrates_to_one(mu, log_b):
    # Equal steps in logit(x) resolve both ends; dx = x (1 - x) d logit. The tails past +-60 hold less than 1e-15.
    logit = torch.linspace(-60, 60, 1_200_001, dtype=torch.float64)
    x = torch.sigmoid(logit[logit.abs() < 30])  # past 30, 1 - x loses its digits; the mass there is below 1e-7
    density = logit_laplace_log_density(x, torch.tensor(mu), torch.tensor(log_b)).exp()
    total = float((density * x * (1 - x)).sum() * 1e-4)
    assert total == pytest.approx(1, abs=1e-6)


def test_density_gradient_passes_gradcheck_away_from_the_kink():
    x = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    mu = torch.tensor([1.0, -1.0, 0.3], dtype=torch.float64, requires_grad=True)
    log_b = torch.tensor([0.1, -0.7, 0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, b: logit_laplace_log_density(x, m, b), (mu, log_b))


def test_half_precision_inputs_are_computed_in_float32():
    half = logit_laplace_log_density(*(torch.tensor([v]).half() for v in (0.5, 0.25, -1.0)))
    full = logit_laplace_log_density(*(torch.tensor([v]) for v in (0.5, 0.25, -1.0)))
    assert half.dtype == torch.float32
    assert half.equal(full)  # the inputs are exact in half precision


def test_all_256_bytes_survive_mapping_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    mapped = map_pixels(pixels)
    assert mapped.dtype == torch.float32
    assert mapped[0].item() == pytest.approx(0.1)
    assert mapped[-1].item() == pytest.approx(0.9)
    assert unmap_pixels(mapped).equal(pixels)


def test_values_outside_the_mapped_range_are_clamped():
    assert unmap_pixels(torch.tensor([0.0, 0.05, 0.95, 1.0])).tolist() == [0, 0, 255, 255]


def test_kl_equals_torch_and_its_two_extremes():
    logits = torch.randn(2, K, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    uniform = Categorical(logits=torch.zeros(2, 3, 3, K, dtype=torch.float64))
    oracle = kl_divergence(Categorical(logits=logits.permute(0, 2, 3, 1)), uniform)
    torch.testing.assert_close(kl_to_uniform(logits), oracle, rtol=0, atol=1e-10)
    assert kl_to_uniform(torch.zeros(1, K, 1, 1)).item() == pytest.approx(0, abs=1e-5)
    certain = torch.zeros(1, K, 1, 1)
    certain[0, 17] = 200.0
    assert kl_to_uniform(certain).item() == pytest.approx(math.log(K), abs=1e-5)  # 9.0109


def test_gumbel_softmax_gives_weights_that_are_differentiable():
    logits = torch.randn(2, 7, 3, 3, requires_grad=True)
    weights = gumbel_softmax(logits, 0.5, torch.Generator().manual_seed(0))
    assert weights.shape == logits.shape
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 3, 3))
    (weights * torch.randn_like(weights)).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.ne(0).any()


def test_a_small_temperature_makes_the_same_draw_one_hot():
    logits = torch.randn(4, 7, 5)
    soft, hard = (gumbel_softmax(logits, t, torch.Generator().manual_seed(3)) for t in (1.0, 1e-4))
    assert soft.argmax(1).equal(hard.argmax(1))
    # A cell whose two best differ by less than 1e-3 may stay soft; none of these 20 does.
    assert hard.amax(1).min() > 0.99


def test_the_largest_weight_is_distributed_as_the_softmax():
    n = 100_000
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    draws = gumbel_softmax(logits.view(1, 4, 1).expand(1, 4, n), 1.0, torch.Generator().manual_seed(0)).argmax(1)
    frequency = draws.flatten().bincount(minlength=4) / n
    # Five standard deviations of a frequency near 1/2.
    assert (frequency - logits.softmax(0)).abs().max() < 5 * 0.5 / n**0.5


def test_the_same_generator_seed_gives_the_same_noise():
    logits = torch.zeros(1, 4, 9)
    first, second, other = (gumbel_softmax(logits, 1.0, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.equal(second)
    assert not first.equal(other)


def test_noise_is_never_infinite():
    """exponential_ may underflow to 0 in float32 for some generators: its logarithm would be -inf, the weight nan."""
    weights = gumbel_softmax(torch.zeros(1, 2, 2_000_000), 1 / 16, torch.Generator().manual_seed(0))
    assert weights.isfinite().all()
