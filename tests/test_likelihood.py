"""logit-Laplace, KL and Gumbel-softmax against torch's own distributions and closed forms."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chi2
from torch.distributions import Categorical, Laplace, SigmoidTransform, TransformedDistribution, kl_divergence

from dalle_ds.models.likelihood import (
    gumbel_noise,
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


@pytest.mark.parametrize(("mu", "log_b"), [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.5), (0.3, -4.0)])
def test_density_integrates_to_one(mu, log_b):
    def density(x):
        values = (torch.tensor(v, dtype=torch.float64) for v in (x, mu, log_b))
        return math.exp(logit_laplace_log_density(*values))

    median = 1 / (1 + math.exp(-mu))
    # b < 1: bounded at both ends; b > 1: it grows without bound there, slowly enough to be integrated.
    parts = [quad(density, low, high, limit=200) for low, high in ((0, median), (median, 1))]
    assert sum(value for value, _ in parts) == pytest.approx(1, abs=1e-6)


def test_density_gradient_passes_gradcheck_away_from_the_kink():
    x = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    mu = torch.tensor([1.0, -1.0, 0.3], dtype=torch.float64, requires_grad=True)
    log_b = torch.tensor([0.1, -0.7, 0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, b: logit_laplace_log_density(x, m, b), (mu, log_b))


DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)


@DTYPES
def test_inputs_of_any_precision_are_computed_in_float32_or_wider(dtype):
    x, mu, log_b = (torch.tensor([v], dtype=dtype) for v in (0.5, 0.25, -1.0))  # exact in every one of them
    wide = torch.promote_types(dtype, torch.float32)
    logits = torch.tensor([[[1.0], [2.0], [-0.5]]], dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    given = logit_laplace_log_density(x, mu, log_b), kl_to_uniform(logits), gumbel_softmax(logits, 0.5, generator)
    generator = torch.Generator().manual_seed(0)
    wanted = (
        logit_laplace_log_density(x.to(wide), mu.to(wide), log_b.to(wide)),
        kl_to_uniform(logits.to(wide)),
        gumbel_softmax(logits.to(wide), 0.5, generator),
    )
    for one, other in zip(given, wanted, strict=True):
        assert one.dtype == wide
        assert one.equal(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_density_and_gradients_are_finite_for_all_that_a_half_can_hold(dtype):
    extremes = torch.tensor([-65504.0, -100.0, -60.0, -1.0, -6e-8, 0.0, 1.0, 88.0, 65504.0], dtype=dtype)
    x = torch.tensor([0.1, 0.5, 0.9], dtype=dtype)
    mu, log_b = (t.clone().requires_grad_() for t in torch.broadcast_tensors(extremes[:, None], extremes[None, :]))
    density = logit_laplace_log_density(x[:, None, None], mu, log_b)
    density.sum().backward()
    for values in (density, mu.grad, log_b.grad):
        assert values.isfinite().all()
    # Far too small a scale, some way off the median: the way out is upwards, also below the floor.
    assert (log_b.grad[extremes.abs() >= 60][:, extremes <= -60] > 0).all()


@DTYPES
def test_divergence_and_relaxation_are_finite_for_all_that_a_half_can_hold(dtype):
    logits = torch.tensor([-65504.0, 65504.0, 0.0, 1.0, 6e-8], dtype=dtype).view(1, 5, 1).requires_grad_()
    kl = kl_to_uniform(logits)
    assert kl.item() == pytest.approx(math.log(5))
    weights = gumbel_softmax(logits, 1 / 16, torch.Generator().manual_seed(0))
    assert weights.flatten().tolist() == [0, 1, 0, 0, 0]
    (kl.sum() + (weights * torch.arange(5.0).view(1, 5, 1)).sum()).backward()
    assert logits.grad.isfinite().all()


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


def test_kl_of_two_tokens_equals_the_closed_form():
    """ln 2 minus the entropy of a coin."""
    logit = torch.linspace(-5, 5, 11, dtype=torch.float64)
    p = torch.sigmoid(logit)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    kl = kl_to_uniform(torch.stack([logit, torch.zeros(11, dtype=torch.float64)])[None])
    torch.testing.assert_close(kl[0], math.log(2) - entropy, rtol=0, atol=1e-14)


def test_gumbel_softmax_is_soft_forwards_and_backwards():
    """The gradient is that of softmax((logits + noise) / temperature) itself, and the weights are no one-hot."""
    temperature = 0.5
    logits = torch.randn(2, 7, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = gumbel_softmax(logits, temperature, torch.Generator().manual_seed(1))
    noise = gumbel_noise(logits, torch.Generator().manual_seed(1))
    expected = torch.softmax((logits + noise) / temperature, dim=1)
    torch.testing.assert_close(weights, expected)
    assert weights.amax(1).min() < 0.9
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 3, 3))
    weight = torch.randn(2, 7, 3, 3, generator=torch.Generator().manual_seed(2))
    ours, theirs = (torch.autograd.grad((soft * weight).sum(), logits)[0] for soft in (weights, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_small_temperature_makes_the_same_draw_one_hot():
    logits = torch.randn(4, 7, 5)
    soft, hard = (gumbel_softmax(logits, t, torch.Generator().manual_seed(3)) for t in (1.0, 1e-4))
    assert soft.argmax(1).equal(hard.argmax(1))
    # A cell whose two best differ by less than 1e-3 may stay soft; none of these 20 does.
    assert hard.amax(1).min() > 0.99


@pytest.mark.parametrize("temperature", [1.0, 1 / 16])
def test_the_largest_weight_is_distributed_as_the_softmax(temperature):
    """Whatever the temperature: it sharpens the weights, not the choice."""
    n = 50_000
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -3.0])
    draws = gumbel_softmax(logits.view(1, 5, 1).expand(1, 5, n), temperature, torch.Generator().manual_seed(0)).argmax(
        1
    )
    counts, expected = draws.flatten().bincount(minlength=5), logits.double().softmax(0) * n
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # The seed is fixed; a right sampler would fail for one seed in a hundred thousand.
    assert statistic < chi2.isf(1e-5, df=4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_generator_for_each_sample_makes_noise_that_does_not_depend_on_the_cut(layout):
    logits = torch.zeros(6, 5, 3, 3).contiguous(memory_format=layout)

    def generators(indices):
        return [torch.Generator().manual_seed(i) for i in indices]

    whole = gumbel_noise(logits, generators(range(6)))
    assert whole.equal(torch.cat([gumbel_noise(logits[i : i + 2], generators(range(i, i + 2))) for i in (0, 2, 4)]))
    assert len(whole.unique()) > 6 * 5 * 9 * 0.99
    with pytest.raises(ValueError, match="zip"):
        gumbel_noise(logits, generators(range(5)))


def test_the_same_generator_seed_gives_the_same_noise():
    logits = torch.zeros(1, 4, 9)
    first, second, other = (gumbel_softmax(logits, 1.0, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.equal(second)
    assert not first.equal(other)


def test_noise_is_never_infinite():
    """exponential_ may underflow to 0 in float32 for some generators: its logarithm would be -inf, the weight nan."""
    weights = gumbel_softmax(torch.zeros(1, 2, 2_000_000), 1 / 16, torch.Generator().manual_seed(0))
    assert weights.isfinite().all()
