"""Drawing image tokens: the distribution, what top_k and top_p keep, and that a picture stands alone."""

import math

import pytest
import torch

from dalle_ds.config import PriorConfig, SamplingConfig
from dalle_ds.generation.sampling import draw, filter_logits, guide, sample_tokens
from dalle_ds.models.prior import Prior

TINY = PriorConfig(
    text_vocab_size=11, text_len=6, image_vocab_size=17, grid_size=3, n_layer=3, n_head=2, head_dim=8, conv_kernel=3
)
TEXT = torch.tensor([[4, 7, 2, 0, 0], [1, 3, 5, 8, 10], [6, 0, 0, 0, 0]])
LENGTHS = torch.tensor([3, 5, 1])
LOGITS = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5, -3.0])


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    prior = Prior(TINY).eval()
    torch.nn.init.normal_(prior.image_head.unembed.weight)
    return prior


def kept(logits, **settings):
    return filter_logits(logits, SamplingConfig(**settings)).isfinite()


def test_temperature_zero_takes_the_likeliest_token():
    logits = torch.randn(20, 9)
    drawn = draw(logits, torch.rand(20), SamplingConfig(temperature=0))
    assert drawn.equal(logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_over_evenly_spaced_uniform_numbers_have_the_softmax_frequencies(temperature):
    """Inverting the cumulative distribution at n evenly spaced numbers counts n p to within 1 a token."""
    n = 10_000
    uniform = (torch.arange(n) + 0.5) / n
    drawn = draw(LOGITS.expand(n, -1), uniform, SamplingConfig(temperature=temperature))
    expected = (LOGITS / temperature).softmax(-1) * n
    assert (drawn.bincount(minlength=6) - expected).abs().max() <= 1.01  # 0.01 for float32 sums


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_uniform_interval_draw_tokens_that_may_be_drawn(uniform):
    logits = torch.full((1, 5), -math.inf)
    logits[0, 3] = 0.0
    assert draw(logits, torch.tensor([uniform]), SamplingConfig()).tolist() == [3]
    ends = draw(LOGITS[None], torch.tensor([uniform]), SamplingConfig(top_k=2)).item()
    assert ends in (0, 2)


def test_top_k_keeps_the_k_likeliest():
    assert kept(LOGITS, top_k=3).tolist() == [True, False, True, False, True, False]
    assert kept(LOGITS, top_k=1).sum() == 1
    for all_of_them in (0, 6, 100):
        assert kept(LOGITS, top_k=all_of_them).all()


def test_top_p_keeps_the_smallest_set_with_that_probability():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    for top_p, expected in ((0.3, [1]), (0.6, [1, 2]), (0.8, [1, 2, 3]), (0.95, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert kept(logits, top_p=top_p).nonzero().flatten().tolist() == expected, top_p


def test_top_p_counts_after_top_k():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the two kept, 0.4 / 0.7 = 0.57 is less than 0.6: both stay. Of all four, 0.4 + 0.3 is needed as well.
    assert kept(logits, top_k=2, top_p=0.6).tolist() == [True, True, False, False]
    assert kept(logits, top_k=2, top_p=0.5).tolist() == [True, False, False, False]


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"top_k": 3, "top_p": 0.01}])
def test_the_likeliest_token_always_stays(settings):
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)) * 5
    filtered = filter_logits(logits, SamplingConfig(**settings))
    assert filtered.argmax(-1).equal(logits.argmax(-1))
    assert filtered.amax(-1).isfinite().all()


def test_only_kept_tokens_are_drawn():
    config = SamplingConfig(top_k=2)
    drawn = draw(LOGITS.expand(1000, -1), torch.linspace(0, 0.9999, 1000), config)
    assert set(drawn.tolist()) == {0, 2}


def test_codes_are_a_grid_of_tokens_and_every_position_is_told(prior):
    told = []
    codes = sample_tokens(
        prior, TEXT, LENGTHS, SamplingConfig(), sample_seeds=[1, 2, 3], on_token=lambda: told.append(len(told))
    )
    assert codes.shape == (3, 3, 3)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < 17
    assert told == list(range(9))


def test_a_picture_does_not_depend_on_its_neighbours(prior):
    together = sample_tokens(prior, TEXT, LENGTHS, SamplingConfig(), sample_seeds=[1, 2, 3])
    for i in (0, 1, 2):
        alone = sample_tokens(prior, TEXT[i : i + 1], LENGTHS[i : i + 1], SamplingConfig(), sample_seeds=[i + 1])
        assert alone[0].equal(together[i])


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(prior):
    text, lengths = TEXT[:1].expand(3, -1), LENGTHS[:1].expand(3)
    codes = sample_tokens(prior, text, lengths, SamplingConfig(), sample_seeds=[7, 7, 8])
    assert codes[0].equal(codes[1])
    assert not codes[0].equal(codes[2])


def test_greedy_sampling_equals_recomputing_the_whole_stream_for_each_token(prior):
    codes = sample_tokens(prior, TEXT, LENGTHS, SamplingConfig(temperature=0), sample_seeds=[0, 0, 0]).flatten(1)
    text_states = prior.text_states(TEXT, LENGTHS)
    for p in range(9):
        states = torch.cat([text_states, prior.image_states(codes[:, :p])], dim=1)
        assert prior.image_head(prior.run_layers(states)[:, -1]).argmax(-1).equal(codes[:, p])


def test_sampling_draws_from_the_distribution_that_training_fits(prior):
    """The first token of 2,000 pictures of one caption against the softmax of the first image state."""
    n = 2000
    with torch.no_grad():
        x = torch.cat([prior.text_states(TEXT[:1], LENGTHS[:1]), prior.image_states(TEXT[:1, :0])], dim=1)
        probability = prior.image_head(prior.run_layers(x)[:, -1]).softmax(-1)[0]
    uniform = torch.stack([torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in range(n)])
    drawn = draw(probability.log().expand(n, -1), uniform, SamplingConfig())
    first = sample_tokens(
        prior, TEXT[:1].expand(20, -1), LENGTHS[:1].expand(20), SamplingConfig(), sample_seeds=range(20)
    )[:, 0, 0]
    assert first.equal(drawn[:20])
    # Five standard deviations of a frequency.
    bound = 5 * (probability * (1 - probability) / n).sqrt()
    assert ((drawn.bincount(minlength=17) / n - probability).abs() <= bound).all()


def test_guidance_of_one_is_the_caption_alone_and_of_zero_no_caption():
    captioned, plain = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    logits = torch.cat([captioned, plain])
    torch.testing.assert_close(guide(logits, 1.0), captioned.log_softmax(-1))
    torch.testing.assert_close(guide(logits, 0.0), plain.log_softmax(-1))
    # Two steps from the plain distribution through the captioned one.
    stretched = 2 * captioned.log_softmax(-1) - plain.log_softmax(-1)
    torch.testing.assert_close(guide(logits, 2.0), stretched)


def test_guided_pictures_do_not_depend_on_their_neighbours(prior):
    config = SamplingConfig(guidance=2.0)
    together = sample_tokens(prior, TEXT, LENGTHS, config, sample_seeds=[1, 2, 3])
    assert together.shape == (3, 3, 3)
    for i in range(3):
        assert sample_tokens(prior, TEXT[i : i + 1], LENGTHS[i : i + 1], config, sample_seeds=[i + 1]).equal(
            together[i : i + 1]
        )
