"""Bytes that a real engine holds for each parameter of the resblocks' matrices, in each way to keep them."""

import pytest
from helpers import run_distributed
from parts.engines import ds_config, make_engine, matrix_state_bytes

from dalle_ds.config import PriorConfig

MODEL = PriorConfig(text_vocab_size=8, text_len=4, image_vocab_size=8, grid_size=2, n_layer=1, n_head=2, head_dim=8)
FP16 = {"fp16": {"enabled": True, "loss_scale": 1}, "resblock_gradient_scaling": {}}
NO_COPY = {"mixed_precision": {"master_weights": False}}
IN_FULL = {"data_types": {"grad_accum_dtype": "fp32"}}


def compact(**params):
    return {"optimizer": {"type": "CompactAdamW", "params": params}}


# Way -> (sections, bytes of weights, float32 copies, moments, gradients).
WAYS = {
    # DeepSpeed 0.19.8 alone compares a device with its name, finds them different, and copies float32 weights too.
    "DeepSpeed's float32 AdamW": ({}, (4, 4, 8, 4)),
    "float32 AdamW": ({"mixed_precision": {}}, (4, 0, 8, 4)),
    "float32, 16-bit moments": ({"mixed_precision": {}, **compact()}, (4, 0, 4, 4)),
    "fp16 AdamW": (FP16, (2, 4, 8, 2)),
    "fp16 AdamW, gradients in float32": (FP16 | IN_FULL, (2, 4, 8, 4)),
    "fp16, 16-bit moments": (FP16 | compact(), (2, 4, 4, 2)),
    "fp16 alone, 16-bit moments, stochastic": (FP16 | NO_COPY | compact(), (2, 0, 4, 2)),
    "fp16 alone, 16-bit moments, kahan": (FP16 | NO_COPY | compact(rounding="kahan"), (2, 0, 4 + 2, 2)),
}


def measure():
    import torch

    from dalle_ds.training.distributed import process_group
    from dalle_ds.training.engine import backward

    held = {}
    batch = torch.ones(2, 3, dtype=torch.int64), torch.full((2,), 3), torch.ones(2, 4, dtype=torch.int64)
    with process_group():
        for way, (sections, _) in WAYS.items():
            engine = make_engine(MODEL, ds_config(2, 1e-3, sections), 0)
            for _ in range(2):
                backward(engine, engine(*batch)["loss"])
                engine.step()
            held[way] = tuple(matrix_state_bytes(engine).values())
            engine.destroy()
    return held


@pytest.mark.slow
def test_each_way_to_keep_weights_and_moments_takes_the_bytes_that_it_promises():
    [held] = run_distributed(measure, 1)
    assert held == {way: expected for way, (_, expected) in WAYS.items()}
    assert sum(held["fp16 alone, 16-bit moments, stochastic"]) == 8
    assert sum(held["fp16 alone, 16-bit moments, kahan"]) == 10
