"""The prior: Figure 10's states, the layer plan, the weighted loss, causality, and sampling's cache."""

import math

import pytest
import torch
import torch.nn.functional as F

from dalle_ds.config import PriorConfig
from dalle_ds.generation.cache import KeyValueCache
from dalle_ds.models.prior import Prior, layer_kinds
from dalle_kernels.attention import allowed

# Figure 10 and 11's sizes: 6 text states, a 4 x 4 grid: 22 states.
TINY = PriorConfig(
    text_vocab_size=11, text_len=6, image_vocab_size=17, grid_size=4, n_layer=3, n_head=2, head_dim=8, conv_kernel=3
)
TEXT = torch.tensor([[4, 7, 2, 9, 9]])  # three tokens, then values that mean nothing
LENGTH = torch.tensor([3])
IMAGE = torch.arange(16)[None]  # token p at position p


def build_prior(config=TINY, seed=0):
    """A prior whose unembeddings, all zero when training starts, are random: outputs then depend on their inputs."""
    torch.manual_seed(seed)
    prior = Prior(config)
    for head in (prior.text_head, prior.image_head):
        torch.nn.init.normal_(head.unembed.weight)
    return prior


def input_states(prior, text=TEXT, length=LENGTH, image=IMAGE):
    return torch.cat([prior.text_states(text, length), prior.image_states(image[:, :-1])], dim=1)


def image_logits(prior, text=TEXT, length=LENGTH, image=IMAGE):
    return prior.image_head(prior.run_layers(input_states(prior, text, length, image))[:, prior.config.text_len :])


# What each row of each table reaches (Figure 10): start-of-text, three tokens, pads 4 and 5 without a position vector,
# start-of-image, and image tokens with the row and column of the token that they predict.
FIGURE_10 = {
    "text_states.start": {0: {0}},
    "text_states.tokens": {4: {1}, 7: {2}, 2: {3}},
    "text_states.position": {k: {k} for k in range(4)},
    "text_states.pad": {4: {4}, 5: {5}},
    "image_states.start": {0: {6}},
    "image_states.tokens": {p: {7 + p} for p in range(15)},  # the last token is never an input
    "image_states.row": {r: {6 + 4 * r + c for c in range(4)} for r in range(4)},
    "image_states.column": {c: {6 + 4 * r + c for r in range(4)} for c in range(4)},
}


@pytest.mark.parametrize("table", FIGURE_10)
def test_every_row_of_a_table_reaches_the_states_of_figure_10_and_no_other(table):
    prior = build_prior()
    before = input_states(prior)
    assert before.shape == (1, 22, TINY.dim)
    parameter = prior.get_parameter(table)
    for index in range(len(parameter)):
        with torch.no_grad():
            parameter[index] += 1.0
        change = input_states(prior) - before
        with torch.no_grad():
            parameter[index] -= 1.0
        reached = set(change[0].abs().amax(-1).gt(0.5).nonzero().flatten().tolist())
        assert reached == FIGURE_10[table].get(index, set()), f"row {index}"


def test_layer_plan_of_64_layers_is_the_papers():
    kinds = layer_kinds(64)
    assert [i + 1 for i, kind in enumerate(kinds) if kind == "column"] == list(range(2, 63, 4))
    assert kinds[-1] == "conv"
    assert kinds.count("row") == 47
    assert [layer.attention.mask.kind for layer in build_prior().layers] == ["row", "column", "conv"]


def test_full_size_has_twelve_billion_parameters():
    with torch.device("meta"):
        prior = Prior(PriorConfig())
    matrices = sum(p.numel() for p in prior.layers.parameters() if p.dim() == 2)
    assert matrices == 12 * 3968**2 * 64 == 12_092_178_432
    embeddings = (2 * (16_384 + 8192) + 2 + 2 * 256 + 2 * 32) * 3968
    # 9 vectors of width d (biases of 5 matrices, 2 gains, 2 biases) and one of 4 d a layer; a gain and a bias a head.
    vectors = (13 * 64 + 4) * 3968
    assert sum(p.numel() for p in prior.parameters()) == matrices + embeddings + vectors


def test_training_starts_at_the_loss_of_a_uniform_guess():
    torch.manual_seed(0)
    outputs = Prior(TINY)(TEXT, LENGTH, IMAGE)
    assert outputs["text_loss"].item() == pytest.approx(math.log(11), rel=1e-6)
    assert outputs["image_loss"].item() == pytest.approx(math.log(17), rel=1e-6)


def test_loss_weighs_two_means_each_over_its_own_tokens():
    prior = build_prior()
    text, lengths = torch.tensor([[4, 7, 2, 9, 9], [1, 3, 5, 8, 10]]), torch.tensor([2, 5])
    image = torch.stack([IMAGE[0], IMAGE[0].flip(0)])
    outputs = prior(text, lengths, image)
    x = prior.run_layers(input_states(prior, text, lengths, image))
    text_log, image_log = prior.text_head(x[:, :6]).log_softmax(-1), prior.image_head(x[:, 6:]).log_softmax(-1)
    # State k predicts token k of its kind, and the seven tokens count alike whichever caption they are of.
    text_terms = [-text_log[b, k, text[b, k]] for b in range(2) for k in range(int(lengths[b]))]
    image_terms = [-image_log[b, p, image[b, p]] for b in range(2) for p in range(16)]
    assert len(text_terms) == 7
    torch.testing.assert_close(outputs["text_loss"], torch.stack(text_terms).mean())
    torch.testing.assert_close(outputs["image_loss"], torch.stack(image_terms).mean())
    torch.testing.assert_close(outputs["loss"], outputs["text_loss"] / 8 + outputs["image_loss"] * 7 / 8)


def test_what_stands_past_the_caption_changes_nothing():
    prior = build_prior()
    other = TEXT.clone()
    other[0, 3:] = 0
    for name, value in prior(TEXT, LENGTH, IMAGE).items():
        assert prior(other, LENGTH, IMAGE)[name].equal(value), name


@pytest.mark.parametrize("lengths", [[0, 3], [0, 0]], ids=["one-of-two", "all"])
def test_an_empty_caption_gives_a_finite_loss_and_gradient(lengths):
    prior = build_prior()
    outputs = prior(TEXT.expand(2, -1), torch.tensor(lengths), IMAGE.expand(2, -1))
    assert outputs["loss"].isfinite()
    outputs["loss"].backward()
    assert all(p.grad.isfinite().all() for p in prior.parameters() if p.grad is not None)


def test_a_caption_may_fill_every_text_state():
    prior, full = build_prior(), torch.tensor([5])
    with torch.no_grad():
        prior.text_states.pad.fill_(math.nan)
    assert prior(TEXT, full, IMAGE)["loss"].isfinite()


def test_a_state_is_reached_exactly_by_what_the_masks_of_the_layers_let_through():
    prior = build_prior()
    x = input_states(prior).detach().requires_grad_()
    out = prior.run_layers(x)
    reach = torch.eye(22)
    for layer in prior.layers:
        reach = (allowed(layer.attention.mask).float() @ reach).gt(0).float()
    for i in range(22):
        weights = torch.randn(TINY.dim, generator=torch.Generator().manual_seed(i))
        (gradient,) = torch.autograd.grad((out[0, i] * weights).sum(), x, retain_graph=True)
        assert gradient[0].ne(0).any(-1).equal(reach[i].bool()), f"state {i}"
    assert not reach.triu(1).any()


def test_every_caption_token_moves_every_image_logit_even_in_a_full_caption():
    """The last token too: start-of-text takes one of the text_len states, so that no token is only a target."""
    prior, full = build_prior(), torch.tensor([5])
    before = image_logits(prior, length=full)
    for k in range(5):
        text = TEXT.clone()
        text[0, k] = 10
        change = (image_logits(prior, text, full) - before).abs().amax(-1)
        assert change.gt(1e-4).all(), f"caption token {k}"


def test_an_image_token_moves_later_image_logits_alone():
    prior = build_prior()
    before = image_logits(prior)
    for p in range(16):
        image = IMAGE.clone()
        image[0, p] = 16
        change = (image_logits(prior, image=image) - before)[0].abs().amax(-1)
        assert change[: p + 1].eq(0).all()
        if p < 15:
            assert change[p + 1] > 0


def test_states_one_by_one_through_the_cache_equal_the_whole_stream():
    prior = build_prior()
    text, lengths, image = TEXT.expand(2, -1), torch.tensor([3, 5]), torch.stack([IMAGE[0], IMAGE[0].flip(0)])
    whole = image_logits(prior, text, lengths, image)
    caches = [KeyValueCache(TINY.seq_len) for _ in prior.layers]
    prior.run_layers(prior.text_states(text, lengths), caches)
    for p in range(16):
        given = image[:, p - 1 : p] if p else image[:, :0]
        states = prior.run_layers(prior.image_states(given, first=p), caches)
        assert states.shape == (2, 1, TINY.dim)
        # float32 sums in another order, through three layers.
        torch.testing.assert_close(prior.image_head(states[:, -1]), whole[:, p], rtol=0, atol=2e-5)


def test_every_parameter_is_trained():
    prior = build_prior()
    prior(TEXT, LENGTH, IMAGE)["loss"].backward()
    untrained = {name for name, p in prior.named_parameters() if p.grad is None or p.grad.eq(0).all()}
    assert untrained == set()


def test_gelu_is_the_sigmoid_form():
    prior = build_prior()
    mlp, x = prior.layers[0].mlp, torch.randn(3, TINY.dim)
    hidden = F.linear(x, mlp.up.weight, mlp.up.bias)
    expected = F.linear(hidden * torch.sigmoid(1.702 * hidden), mlp.down.weight, mlp.down.bias)
    torch.testing.assert_close(mlp(x), expected)
