"""Gradient scaling of resblocks: exact in powers of two, blind to nothing in its block, unseen outside of it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import run_distributed
from torch import nn

from dalle_ds.config import PriorConfig
from dalle_ds.generation.cache import KeyValueCache
from dalle_ds.models.gradient_scaling import begin_branch, end_branch, resblock_index
from dalle_ds.models.layers import Linear
from dalle_ds.models.prior import Prior

TINY = PriorConfig(
    text_vocab_size=11, text_len=6, image_vocab_size=17, grid_size=4, n_layer=3, n_head=2, head_dim=8, conv_kernel=3
)
N_BLOCK = 2 * TINY.n_layer
POWERS = 2.0 ** torch.tensor([3.0, -5, 13, 7, 0, 24])
HALVES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in (torch.float16, torch.bfloat16)]


def build_prior(config=TINY, scales=None, seed=0, **options):
    torch.manual_seed(seed)
    prior = Prior(config, **options)
    # All zero when training starts, which would make the gradients of all else zero.
    for head in (prior.text_head, prior.image_head):
        nn.init.normal_(head.unembed.weight)
    prior.set_gradient_scales(scales)
    return prior


def make_batch(seed, config=TINY):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.text_vocab_size, (2, config.text_len - 1), generator=generator)
    image = torch.randint(config.image_vocab_size, (2, config.grid_size**2), generator=generator)
    return text, torch.tensor([3, 5]), image


def accumulate(prior, n_micro_step=2):
    """Gradients of all parameters by name, of the mean loss over micro-batches."""
    for seed in range(n_micro_step):
        torch.manual_seed(seed)  # of dropout
        (prior(*make_batch(seed))["loss"] / n_micro_step).backward()
    return {name: p.grad for name, p in prior.named_parameters()}


def scale_of(name, scales):
    k = resblock_index(name)
    return 1.0 if k is None else scales[k]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize(
    "change", [{}, {"sandwich_norm": True, "pb_relax": True}, {"dropout": 0.3}], ids=["plain", "norms", "dropout"]
)
def test_powers_of_two_change_no_gradient_by_a_bit_in_float64(change, checkpointed):
    config = dataclasses.replace(TINY, **change)
    plain = accumulate(build_prior(config).double())
    scaled = accumulate(build_prior(config, POWERS, checkpoint_activations=checkpointed).double())
    for name, gradient in plain.items():
        assert gradient.dtype == torch.float64
        assert gradient.abs().amax() > 0, name
        assert (scaled[name] / scale_of(name, POWERS) - gradient).abs().max() == 0.0, name


def test_the_gradient_of_the_input_is_unscaled_to_the_bit():
    x = torch.randn(2, TINY.seq_len, TINY.dim, dtype=torch.float64)
    weights = torch.randn_like(x)

    def input_gradient(scales):
        states = x.clone().requires_grad_()
        (build_prior(scales=scales).double().run_layers(states) * weights).sum().backward()
        return states.grad

    assert input_gradient(POWERS).equal(input_gradient(None))


def test_scales_that_are_no_powers_of_two_differ_by_rounding_alone():
    scales = torch.tensor([1000.0, 3.0, 1e6, 7.5e4, 12345.0, 0.1])
    plain, scaled = accumulate(build_prior()), accumulate(build_prior(scales=scales))
    for name, gradient in plain.items():
        # Float32 through six resblocks.
        torch.testing.assert_close(scaled[name] / scale_of(name, scales), gradient, rtol=1e-4, atol=1e-6)


def branch_module(prior, k):
    layer = prior.layers[k // 2]
    return layer.mlp if k % 2 else layer.attention


def plant(prior, k, value):
    """Makes one entry of the gradient inside resblock k `value`: at state 3 of the first sample."""

    def put(gradient):
        gradient = gradient.clone()
        gradient[0, 3, 5] = value
        return gradient

    branch_module(prior, k).register_forward_hook(lambda module, inputs, out: out.register_hook(put) and None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=["inf", "nan"])
@pytest.mark.parametrize("k", range(N_BLOCK))
def test_a_non_finite_value_in_a_resblock_is_in_its_own_parameter_gradients_alone(k, value, dtype):
    prior = build_prior(scales=torch.full((N_BLOCK,), 64.0), compute_dtype=dtype)
    plant(prior, k, value)
    gradients = accumulate(prior)
    hit = {resblock_index(name) for name, gradient in gradients.items() if not gradient.isfinite().all()}
    assert hit == {k}


def test_without_scaling_a_non_finite_value_reaches_all_earlier_resblocks():
    prior = build_prior()
    plant(prior, 4, torch.inf)
    hit = {resblock_index(name) for name, gradient in accumulate(prior).items() if not gradient.isfinite().all()}
    assert hit == {None, 0, 1, 2, 3, 4}


def branch_gradients(value):
    """The stream's gradient before and after one branch, in which row 3 of the gradient gets `value`."""
    torch.manual_seed(0)
    norm, linear, scale = nn.LayerNorm(8), Linear(8, 8), torch.tensor(512.0)
    x = torch.randn(5, 8, requires_grad=True)
    inner = linear(norm(begin_branch(x, scale)))

    def put(gradient):
        gradient = gradient.clone()
        gradient[3, 1] = value
        return gradient

    if value is not None:
        inner.register_hook(put)
    out = x + end_branch(inner, scale)
    upstream = torch.randn(5, 8)
    out.backward(upstream)
    return x.grad, upstream


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_the_identity_path_passes_a_non_finite_branch_bit_for_bit(value):
    planted, upstream = branch_gradients(value)
    clean, _ = branch_gradients(None)
    # What the layer norm made of the planted value is the whole of row 3, of which the identity's share remains.
    assert planted[3].equal(upstream[3])
    rest = [0, 1, 2, 4]
    assert planted[rest].equal(clean[rest])
    assert not clean[3].equal(upstream[3])


def test_a_non_finite_gradient_of_the_stream_does_not_enter_the_branch():
    scale, upstream = torch.tensor(4.0), torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, 3.0e38])
    inner = torch.zeros(5, requires_grad=True)
    end_branch(inner, scale).backward(upstream)
    # The last one overflows as it is scaled.
    assert inner.grad.tolist() == [4.0, 0.0, 0.0, 0.0, 0.0]


def test_a_branch_s_overflow_in_16_bits_is_left_in_its_parameters():
    """What float32 holds and float16 does not is cast to infinity after the filter, so that the rules can find it."""
    prior = build_prior(scales=torch.tensor([64.0, 64, 64, 2.0**40, 64, 64]), compute_dtype=torch.float16)
    hit = {resblock_index(name) for name, gradient in accumulate(prior).items() if not gradient.isfinite().all()}
    assert hit == {3}


@pytest.mark.parametrize("options", [{"matrix_dtype": torch.float16}, {"compute_dtype": torch.float16}], ids=str)
def test_gradients_of_1e_9_vanish_in_float16_and_survive_scaled(options):
    scale = 2.0**24
    x = torch.randn(2, TINY.seq_len, TINY.dim, generator=torch.Generator().manual_seed(1))
    upstream = 1e-9 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def layer_gradients(scales, **options):
        layer = build_prior(scales=scales, **options).layers[0]
        layer(x).backward(upstream)
        return {name: p.grad.float() for name, p in layer.named_parameters()}

    truth = layer_gradients(None)
    vanished = layer_gradients(None, **options)
    survived = layer_gradients(torch.full((N_BLOCK,), scale), **options)
    for name, gradient in truth.items():
        assert vanished[name].eq(0).all(), name
        assert gradient.ne(0).any(), name
        # 11 bits of significand in operands and results; the gradient of a bias of keys is 0 but for rounding.
        if name != "attention.key.bias":
            assert (survived[name] / scale - gradient).norm() < 4e-3 * gradient.norm(), name


STORED = {
    "float32": ({}, torch.float32),
    "compute-float16": ({"compute_dtype": torch.float16}, torch.float32),
    "compute-bfloat16": ({"compute_dtype": torch.bfloat16}, torch.float32),
    "matrices-float16": ({"matrix_dtype": torch.float16}, torch.float16),
    "matrices-bfloat16": ({"matrix_dtype": torch.bfloat16}, torch.bfloat16),
}


@pytest.mark.parametrize("name", STORED)
def test_the_stream_norms_and_logits_are_float32_and_every_gradient_has_its_parameter_s_dtype(name):
    options, matrix_dtype = STORED[name]
    prior = build_prior(scales=torch.full((N_BLOCK,), 64.0), **options)
    inside = options.get("compute_dtype", matrix_dtype)
    forward, backward = [], []
    for layer in prior.layers:
        layer.register_forward_hook(
            lambda module, inputs, out: (
                forward.append(out.dtype) or (out.register_hook(lambda g: backward.append(g.dtype)) and None)
            )
        )
        for norm in (layer.attention_norm, layer.mlp_norm):
            norm.register_forward_hook(lambda module, inputs, out: forward.append(out.dtype))
        for branch in (layer.attention, layer.mlp):
            branch.register_forward_hook(lambda module, inputs, out: forward.append((inputs[0].dtype, out.dtype)))
    accumulate(prior, 1)
    assert set(forward) <= {torch.float32, (inside, inside)}
    assert set(backward) == {torch.float32}
    assert prior.image_head(torch.zeros(1, TINY.dim)).dtype == torch.float32
    for key, p in prior.named_parameters():
        is_matrix = p.dim() == 2 and key.startswith("layers.")
        assert p.dtype == p.grad.dtype == (matrix_dtype if is_matrix else torch.float32), key


def test_a_stream_of_16_bits_is_refused():
    x, scale = torch.zeros(3, dtype=torch.float16), torch.tensor(2.0)
    for mark in (begin_branch, end_branch):
        with pytest.raises(AssertionError, match="float16"):
            mark(x, scale)
        assert mark(x, None) is x


@pytest.mark.parametrize("dtype", HALVES)
def test_matrices_made_in_16_bits_are_those_of_float32_rounded(dtype):
    narrow, wide = build_prior(matrix_dtype=dtype).state_dict(), build_prior().state_dict()
    assert narrow.keys() == wide.keys()
    for name, tensor in wide.items():
        assert narrow[name].equal(tensor.to(narrow[name].dtype)), name
    in_16_bits = {name for name, tensor in narrow.items() if tensor.dtype == dtype}
    assert len(in_16_bits) == 6 * TINY.n_layer
    assert all(narrow[name].dim() == 2 and name.startswith("layers.") for name in in_16_bits)


def test_both_ways_of_16_bits_compute_the_same():
    """Matrices that are rounded when they are made, and at each use."""
    stored, cast = build_prior(matrix_dtype=torch.float16), build_prior(compute_dtype=torch.float16)
    batch = make_batch(0)
    assert stored(*batch)["loss"].equal(cast(*batch)["loss"])
    first, second = accumulate(stored, 1), accumulate(cast, 1)
    for name, gradient in first.items():
        assert gradient.float().equal(second[name]), name


def test_scales_changed_in_place_hold_from_the_next_forward_pass():
    scales = torch.ones(N_BLOCK)
    prior = build_prior(scales=scales).double()
    before = {name: gradient.clone() for name, gradient in accumulate(prior, 1).items()}
    scales.copy_(POWERS)
    prior.zero_grad()
    for name, gradient in accumulate(prior, 1).items():
        assert gradient.equal(before[name] * scale_of(name, POWERS)), name
    prior.set_gradient_scales(None)
    prior.zero_grad()
    for name, gradient in accumulate(prior, 1).items():
        assert gradient.equal(before[name]), name


def test_scales_that_change_between_forward_and_backward_pass_are_refused():
    scales = torch.ones(N_BLOCK)
    loss = build_prior(scales=scales)(*make_batch(0))["loss"]
    scales.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_scales_change_nothing_of_the_forward_pass_with_a_cache_or_without():
    text, lengths, image = make_batch(0)

    def outputs(scales):
        prior = build_prior(scales=scales).eval()
        caches = [KeyValueCache(TINY.seq_len) for _ in prior.layers]
        with torch.no_grad():
            prior.run_layers(prior.text_states(text, lengths), caches)
            one_by_one = [
                prior.run_layers(prior.image_states(image[:, p - 1 : p] if p else image[:, :0], first=p), caches)
                for p in range(TINY.grid_size**2)
            ]
        return torch.cat(one_by_one, dim=1), prior(text, lengths, image)["loss"]

    for scaled, plain in zip(outputs(POWERS), outputs(None), strict=True):
        assert scaled.equal(plain)


INDICES = {
    "layers.0.attention.query.weight": 0,
    "layers.3.attention_norm.bias": 6,
    "layers.3.mlp.up.weight": 7,
    "layers.3.mlp_norm.weight": 7,
    "layers.12.attention_end.0.weight": 24,
    "module.layers.63.mlp.down.bias": 127,
    "text_states.tokens": None,
    "image_head.norm.weight": None,
    "image_head.unembed.weight": None,
}


@pytest.mark.parametrize("name", INDICES)
def test_a_parameter_s_resblock_is_read_from_its_name(name):
    assert resblock_index(name) == INDICES[name]


def test_every_parameter_of_a_layer_is_in_one_of_its_two_resblocks():
    prior = build_prior(dataclasses.replace(TINY, sandwich_norm=True))
    for name, _ in prior.named_parameters():
        assert (resblock_index(name) is not None) == name.startswith("layers."), name
    assert {resblock_index(name) for name, _ in prior.named_parameters()} == {None, *range(N_BLOCK)}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stored", [torch.float32, None], ids=["stored-float32", "stored-16-bit"])
def test_a_linear_layer_in_16_bits_is_the_exact_one_of_rounded_numbers(dtype, stored):
    torch.manual_seed(0)
    layer = Linear(48, 32, dtype=stored or dtype)
    nn.init.normal_(layer.bias)
    x = torch.randn(3, 20, 48).to(dtype).requires_grad_()
    upstream = torch.randn(3, 20, 32).to(dtype)
    out = layer(x)
    out.backward(upstream)
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    truth = F.linear(*exact)
    truth.backward(upstream.double())
    assert (out.dtype, layer.bias.grad.dtype, layer.weight.grad.dtype) == (dtype, torch.float32, stored or dtype)
    # Each result is rounded once to `dtype`; the bias' gradient to float32 alone.
    rounding = torch.finfo(dtype).eps
    pairs = [(out, truth), (x.grad, exact[0].grad), (layer.weight.grad, exact[1].grad)]
    for actual, expected in pairs:
        torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad.double(), exact[2].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"dtype": torch.float16}, {"transposed": True}, {"dtype": torch.float16, "transposed": True}], ids=str
)
def test_a_linear_layer_keeps_its_parameter_for_the_backward_pass_and_no_copy_or_view(options):
    """What stays of a weight gathered by ZeRO-3 would be the whole of it."""
    layer, kept = Linear(16, 64, **options), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, 5, 16).to(layer.weight.dtype))
    assert [tensor is layer.weight for tensor in kept if tensor.numel() == layer.weight.numel()] == [True]


def test_a_bias_gradient_is_not_bounded_by_float16_and_overflow_elsewhere_is_infinite():
    layer = Linear(4, 4, dtype=torch.float16)
    x = torch.ones(100, 4, dtype=torch.float16, requires_grad=True)
    layer(x).backward(torch.full((100, 4), 2000.0, dtype=torch.float16))
    assert layer.bias.grad.tolist() == [200_000.0] * 4
    assert layer.weight.grad.eq(torch.inf).all()


def test_a_whole_model_in_float16_stays_one():
    prior = build_prior().half()
    outputs = prior(*make_batch(0))
    outputs["loss"].backward()
    assert outputs["loss"].dtype == torch.float32
    assert {p.grad.dtype for p in prior.parameters()} == {torch.float16}


def make_under_zero3():
    """A prior made inside zero.Init: its whole parameters, and dtype and length of this rank's shards, by name."""
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride

    from dalle_ds.training.distributed import process_group

    with process_group():
        torch.manual_seed(0)
        # By default zero.Init would store every parameter in one dtype.
        with deepspeed.zero.Init(tensor_overrides=[DeepSpeedTensorOverride.device]):
            prior = Prior(TINY, matrix_dtype=torch.float16)
        shards = {name: (p.ds_tensor.dtype, p.ds_tensor.numel()) for name, p in prior.named_parameters()}
        with deepspeed.zero.GatheredParameters(list(prior.parameters())):
            whole = {name: p.detach().clone() for name, p in prior.named_parameters()}
    return whole, shards


@pytest.mark.slow
def test_zero_init_shards_matrices_in_the_dtype_that_they_are_made_in():
    results = run_distributed(make_under_zero3, 2)
    torch.manual_seed(0)
    plain = Prior(TINY, matrix_dtype=torch.float16)
    for whole, shards in results:
        for name, p in plain.named_parameters():
            assert shards[name] == (p.dtype, -(-p.numel() // 2)), name
            assert whole[name].equal(p), name


ZERO3 = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}


def differentiate_under_zero3(checkpointed):
    """The gradients of a whole scaled prior that computes in float16, by name, from two ranks with a batch each."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    from dalle_ds.training.distributed import process_group

    with process_group():
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=ZERO3):
            prior = Prior(TINY, checkpoint_activations=checkpointed, compute_dtype=torch.float16)
        engine, *_ = deepspeed.initialize(model=prior, model_parameters=prior.parameters(), config=ZERO3)
        for head in (prior.text_head.unembed.weight, prior.image_head.unembed.weight):
            with deepspeed.zero.GatheredParameters([head], modifier_rank=0), torch.no_grad():
                head.copy_(torch.sin(torch.arange(head.numel())).view_as(head))
        prior.set_gradient_scales(torch.full((N_BLOCK,), 256.0))
        engine.backward(engine(*make_batch(torch.distributed.get_rank()))["loss"])
        return {name: safe_get_full_grad(p) for name, p in prior.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True], ids=["stored", "recomputed"])
def test_scaled_gradients_in_16_bits_under_zero_3_are_those_of_one_process(checkpointed):
    by_rank = run_distributed(differentiate_under_zero3, 2, checkpointed)
    torch.manual_seed(0)
    prior = Prior(TINY, compute_dtype=torch.float16)
    with torch.no_grad():
        for head in (prior.text_head.unembed.weight, prior.image_head.unembed.weight):
            head.copy_(torch.sin(torch.arange(head.numel())).view_as(head))
    prior.set_gradient_scales(torch.full((N_BLOCK,), 256.0))
    expected = accumulate(prior)
    for gradients in by_rank:
        for name, gradient in gradients.items():
            # The same numbers, averaged by the collective in float32.
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)
