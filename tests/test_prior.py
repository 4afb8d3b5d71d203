"""The prior: Figure 10's states, the layer plan, the weighted loss, causality, and sampling's cache."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from dalle_ds.config import PriorConfig
from dalle_ds.generation.cache import KeyValueCache
from dalle_ds.models.layers import LayerNorm
from dalle_ds.models.prior import Prior, layer_kinds
from dalle_ds.presets import PRESETS
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
    expected = F.linear(hidden * torch.sigmoid(1.702 * hidden), mlp.down.weight.T, mlp.down.bias)
    torch.testing.assert_close(mlp(x), expected)


def test_sizes_of_table_1_have_the_closed_form_s_number_of_parameters():
    """12 d^2 a layer in matrices, 13 d in vectors; tables and heads of both vocabularies; two final norms."""
    for name, billions in {"1.3b": 1.3, "2.8b": 2.8, "5.6b": 5.6, "12b": 12.0}.items():
        config = PRESETS[name].prior.model
        with torch.device("meta"):
            prior = Prior(config)
        in_layers = sum(p.numel() for p in prior.layers.parameters())
        assert in_layers == config.n_layer * (12 * config.dim**2 + 13 * config.dim)
        tables = 2 * (16_384 + 8192) + 2 + 2 * 256 + 2 * 32
        assert sum(p.numel() for p in prior.parameters()) == in_layers + (tables + 4) * config.dim
        # Table 1 rounds, and counts what is in the layers.
        assert in_layers / 1e9 == pytest.approx(billions, rel=0.08 if name == "1.3b" else 0.02), name


def gradients(prior, *batch):
    prior.zero_grad()
    prior(*batch)["loss"].backward()
    return {name: p.grad.clone() for name, p in prior.named_parameters()}


def test_recomputed_activations_give_the_same_gradients_bit_for_bit():
    plain, batch = build_prior(), (TEXT, LENGTH, IMAGE)
    lean = Prior(TINY, checkpoint_activations=True)
    lean.load_state_dict(plain.state_dict())
    for name, gradient in gradients(plain, *batch).items():
        assert gradient.equal(gradients(lean, *batch)[name]), name


def test_dropout_is_off_by_default_and_drops_ends_of_resblocks_in_training_alone():
    assert PriorConfig().dropout == 0
    prior = build_prior(dataclasses.replace(TINY, dropout=0.5))
    first, second = (prior(TEXT, LENGTH, IMAGE)["loss"] for _ in range(2))
    assert first != second
    prior.eval()
    plain = build_prior()
    assert prior(TEXT, LENGTH, IMAGE)["loss"] == plain(TEXT, LENGTH, IMAGE)["loss"]


def test_sandwich_norm_bounds_what_a_resblock_adds_to_the_stream():
    prior = build_prior(dataclasses.replace(TINY, sandwich_norm=True))
    layer, x = prior.layers[0], torch.randn(1, 22, TINY.dim)
    with torch.no_grad():
        layer.mlp.down.weight.mul_(1e6)
        grown = layer(x) - x
    # The two branches each have unit variance.
    assert grown.abs().max() < 2 * math.sqrt(TINY.dim)


def test_relaxed_layer_norm_is_the_plain_one_without_its_overflow():
    plain, relaxed = LayerNorm(8), LayerNorm(8, relaxed=True)
    x = torch.randn(5, 8)
    # The epsilon of 1e-5 stands beside a variance that the division has changed.
    torch.testing.assert_close(relaxed(x), plain(x), rtol=1e-3, atol=1e-4)
    huge = x * 1e30
    assert relaxed(huge).isfinite().all()
    assert not plain(huge).allclose(plain(x), atol=1e-3)
    assert relaxed(torch.zeros(1, 8)).eq(0).all()


def test_text_loss_may_be_divided_by_the_mean_over_ranks():
    """Two ranks with 2 and 5 tokens: the mean of their losses is that of one rank with both captions."""
    prior = build_prior()
    text, lengths = torch.tensor([[4, 7, 2, 9, 9], [1, 3, 5, 8, 10]]), torch.tensor([2, 5])
    image = torch.stack([IMAGE[0], IMAGE[0].flip(0)])
    whole = prior(text, lengths, image)["loss"]
    parts = [prior(text[i : i + 1], lengths[i : i + 1], image[i : i + 1], torch.tensor(3.5))["loss"] for i in range(2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.slow
def test_a_training_step_of_two_layers_in_the_12b_shape_runs_and_lowers_its_own_loss():
    config = dataclasses.replace(PRESETS["12b"].prior.model, n_layer=2)
    torch.manual_seed(0)
    prior = Prior(config).bfloat16()
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(config.text_vocab_size, (1, 255), generator=generator)
    image = torch.randint(config.image_vocab_size, (1, 1024), generator=generator)
    batch = (text, torch.tensor([40]), image)
    before = prior(*batch)["loss"]
    assert before.item() == pytest.approx(math.log(config.text_vocab_size) / 8 + math.log(8192) * 7 / 8, rel=1e-4)
    before.backward()
    with torch.no_grad():
        for name, p in prior.named_parameters():
            # With unembeddings of zero the first step moves them alone.
            assert p.grad.isfinite().all(), name
            p.sub_(p.grad)
        assert prior(*batch)["loss"] < before - 0.1


def test_the_convolutional_mask_closes_its_window_unless_told_not_to():
    with torch.device("meta"):
        masks = [
            Prior(dataclasses.replace(PriorConfig(), n_layer=1, conv_wrap=wrap)).layers[0].attention.mask
            for wrap in (True, False)
        ]
    last = torch.tensor(masks[0].seq_len - 1)
    seen = [int(mask.sees(last, torch.arange(256, 1280)).sum()) for mask in masks]
    # The last state stands at the right edge: windows reach to the left in its row, and across the edge above.
    assert seen == [66, 61]


# The smallest stream that takes the CPU's path over windows: three masks, one layer each, and the plan's three layers.
LARGER = dataclasses.replace(TINY, grid_size=12, text_len=9)


@pytest.mark.parametrize("n_layer", [1, 2, 3], ids="{}-layers".format)
def test_an_image_logit_depends_on_the_whole_caption_and_on_no_later_token_by_gradient(n_layer):
    """One layer is conv alone, two are row and conv, three row, column and conv."""
    prior = build_prior(dataclasses.replace(LARGER, n_layer=n_layer))
    text, length = torch.randint(11, (1, 8)), torch.tensor([8])
    x = input_states(prior, text, length, torch.randint(17, (1, 144))).detach().requires_grad_()
    out = prior.run_layers(x)
    for p in (0, 1, 13, 77, 143):
        (gradient,) = torch.autograd.grad(prior.image_head(out[:, 9 + p]).square().sum(), x, retain_graph=True)
        touched = gradient[0].ne(0).any(-1)
        assert touched[:9].all(), "the caption"
        assert not touched[9 + p + 1 :].any(), "later states"
