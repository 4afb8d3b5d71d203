"""The weights that an optimizer updates, whole by name, and back into the model that computes with them."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.storage.pieces import WEIGHT, Piece
from dalle_ds.training.engine import Engine
from dalle_ds.training.engine_state import take_pieces
from dalle_ds.training.sections import SHARDED_WEIGHTS


@torch.no_grad()
def whole_weights(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """(name, whole float32 weight), of what the optimizer updates; every rank must go through all of them."""
    here: dict[str, list[Piece]] = {}
    for piece in take_pieces(engine):
        if piece.kind == WEIGHT:
            here.setdefault(piece.name, []).append(piece)
    stage = engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        whole = torch.zeros(shape.numel(), device=engine.device)
        for piece in here.get(name, ()):
            whole[piece.begin : piece.begin + len(piece.tensor)] = piece.tensor
        if stage > 0:
            group = parameter.ds_process_group if stage == SHARDED_WEIGHTS else parameter._dp_group
            dist.all_reduce(whole, group=group)
        yield name, whole.view(shape)


@torch.no_grad()
def fill_model(engine: Engine) -> None:
    """Makes the weights that the model computes with those of the master tensors; every rank must call."""
    if engine.zero_optimization_stage() == SHARDED_WEIGHTS:
        optimizer = engine.optimizer
        flats = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
        # What was gathered is of the old weights, and small parameters always are.
        engine.empty_partition_cache()
        for flat, master in flats:
            flat.data.copy_(master.data)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        return
    parameters = dict(engine.module.named_parameters())
    for name, weight in whole_weights(engine):
        parameters[name].data.copy_(weight)
