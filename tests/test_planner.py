"""The planner's closed forms against the real model and its masks."""

import dataclasses
import math

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from dalle_ds.config import PriorConfig
from dalle_ds.models import attention as attention_module
from dalle_ds.models.prior import Prior
from dalle_ds.models.prior import layer_kinds as model_layer_kinds
from dalle_ds.planner import PlanConfig, count_parameters, make_plan, training_flops
from dalle_ds.planner.arithmetic import attention_cells, image_cells, layer_kinds
from dalle_ds.planner.memory import activation_bytes
from dalle_ds.planner.parameters import matrix_shapes, outer_shapes, sharded_counts, vector_shapes
from dalle_ds.presets import PRESETS, find_preset
from dalle_kernels.attention import Mask
from dalle_kernels.attention.masks import allowed

SMALL = PriorConfig(
    text_vocab_size=60, text_len=12, image_vocab_size=44, grid_size=5, n_layer=3, n_head=2, head_dim=5, conv_kernel=3
)
TWELVE = find_preset("12b").prior.model


def plan(preset="12b", **settings):
    return make_plan(find_preset(preset).prior.model, PlanConfig(**settings))


def option_of(made, name):
    return next(option for option in made.options if option.name == name)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [*(preset.prior.model for preset in PRESETS.values()), dataclasses.replace(SMALL, sandwich_norm=True)],
    ids=[*PRESETS, "sandwich"],
)
def test_names_shapes_and_counts_are_those_of_the_real_model(config):
    with torch.device("meta"):
        real = {name: tuple(parameter.shape) for name, parameter in Prior(config).named_parameters()}
    matrices = {
        f"layers.{i}.{name}": shape
        for i in range(config.n_layer)
        for block in matrix_shapes(config).values()
        for name, shape in block.items()
    }
    vectors = {f"layers.{i}.{n}": shape for i in range(config.n_layer) for n, shape in vector_shapes(config).items()}
    ours = matrices | vectors | outer_shapes(config)
    assert ours == real
    counts = count_parameters(config)
    assert counts.matrices == sum(map(math.prod, matrices.values()))
    assert counts.total == sum(map(math.prod, real.values()))
    assert counts.tables == sum(math.prod(shape) for shape in ours.values() if len(shape) == 2) - counts.matrices
    assert sharded_counts(config, 1) == (counts.matrices, counts.rest)


@pytest.mark.parametrize("config", [TWELVE, SMALL, dataclasses.replace(SMALL, conv_wrap=False, grid_size=7)])
@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_attention_is_counted_by_the_cells_of_its_mask(config, kind):
    mask = Mask(
        kind=kind,
        text_len=config.text_len,
        grid_height=config.grid_size,
        grid_width=config.grid_size,
        conv_kernel=config.conv_kernel,
        wrap=config.conv_wrap,
    )
    assert attention_cells(config, kind) == allowed(mask).sum()


def test_the_masks_of_the_paper_have_their_golden_counts():
    assert [image_cells(TWELVE, kind) for kind in ("row", "column", "conv")] == [33_264, 16_896, 61_344]


@pytest.mark.parametrize("n_layer", [1, 2, 3, 7, 64])
def test_layers_have_the_masks_of_the_model(n_layer):
    assert layer_kinds(n_layer) == model_layer_kinds(n_layer)


def draw_batch(config, n):
    return {
        "text_tokens": torch.randint(config.text_vocab_size, (n, config.text_len - 1)),
        "text_lengths": torch.full((n,), config.text_len - 1),
        "image_tokens": torch.randint(config.image_vocab_size, (n, config.image_len)),
    }


@pytest.mark.parametrize("recompute", [False, True])
def test_operations_are_those_that_torch_counts(monkeypatch, recompute):
    """All but attention, which torch's counter does not know: it is replaced by nothing here."""
    monkeypatch.setattr(attention_module, "attention", lambda q, k, v, mask: q + k + v)
    n, flops = 2, training_flops(SMALL)
    cells = sum(4 * SMALL.dim * attention_cells(SMALL, kind) for kind in layer_kinds(SMALL.n_layer))
    prior = Prior(SMALL, checkpoint_activations=recompute)
    # Recomputation may stop once it has all that is needed; here it goes on to the end, as in the closed form.
    with set_checkpoint_early_stop(False), FlopCounterMode(display=False) as forward:
        loss = prior(**draw_batch(SMALL, n))["loss"]
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == n * (flops.forward() - cells)
    assert backward.get_total_flops() == n * (flops.backward(recompute) - (3 if recompute else 2) * cells)
    assert flops.model == 3 * (flops.layers_forward + flops.heads_forward)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_what_the_real_model_saves(recompute, dtype):
    torch.manual_seed(0)
    n, saved = 2, {}
    prior = Prior(SMALL, checkpoint_activations=recompute, matrix_dtype=dtype)
    own = {parameter.data_ptr() for parameter in prior.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x = torch.randn(n, SMALL.seq_len, SMALL.dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = prior.run_layers(x)
    kept, _ = activation_bytes(SMALL, n, recompute, dtype.itemsize)
    assert kept == sum(storage.nbytes() for storage in saved.values())
    assert out.shape == x.shape


def test_recomputation_costs_a_third_more_of_the_layers():
    flops = training_flops(TWELVE)
    layers = flops.layers_forward
    assert flops.forward() + flops.backward(True) - flops.forward() - flops.backward(False) == layers
    assert 3 * layers < flops.model < 3.2 * layers
