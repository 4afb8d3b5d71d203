"""What a DeepSpeed engine knows after some steps, as pieces of named parameters, and back into any other engine.

An optimizer updates a few tensors on each rank: whole parameters, float32 copies of them, flat shards of many under
ZeRO. `holdings` says which elements of which parameters lie where in them; all else follows from that. Settings of the
optimizer's groups are not state: they come from the configuration.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.storage.pieces import WEIGHT, Piece, PieceReader
from dalle_ds.training.engine import Engine
from dalle_ds.training.sections import SHARDED_WEIGHTS
from dalle_kernels.compression.formats import ADAM_MEAN, ADAM_VARIANCE, decode, encode

STATE = "state."  # prefix of the kinds that the optimizer keeps
COMPENSATION = "compensation"  # what rounding took from 16-bit weights
POSITION = "position"
# Moments of 16 bits are codes.
FORMATS = {"exp_avg": ADAM_MEAN, "exp_avg_sq": ADAM_VARIANCE}
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Run:
    """Elements [begin, begin + length) of the flattened parameter `name`, at `offset` of what holds them."""

    name: str
    begin: int
    offset: int
    length: int


@dataclass(frozen=True, eq=False)
class Holding:
    """One tensor that the optimizer updates on this rank.

    runs: what it holds, without padding. position: where its elements lie in the concatenation of all that optimizers
    update, for stochastic rounding: no two shards share one, replicas do.
    """

    tensor: Tensor
    runs: tuple[Run, ...]
    group: dict[str, Any]
    position: int


def holdings(engine: Engine) -> list[Holding]:
    """What the optimizer updates on this rank, in the order of its groups."""
    stage = engine.zero_optimization_stage()
    if stage == SHARDED_WEIGHTS:
        return list(_sharded_weights(engine))
    return list(_sharded_optimizer(engine) if stage > 0 else _whole(engine))


def sizes(engine: Engine) -> dict[str, int]:
    """Number of elements of each parameter, by name."""
    return {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters()}


def is_writer(engine: Engine) -> bool:
    """Whether this rank holds state that no rank before it holds."""
    stage = engine.zero_optimization_stage()
    if stage == SHARDED_WEIGHTS:
        group = engine.optimizer.fp16_groups[0][0].ds_process_group
        return dist.get_rank() < dist.get_world_size(group)
    return stage > 0 or dist.get_rank() == 0


def _sharded_weights(engine: Engine) -> Iterator[Holding]:
    """ZeRO-3: a flat tensor a sub-group, of this rank's shards of its parameters, each padded to the same length."""
    optimizer, names = engine.optimizer, _names(engine)
    base = 0
    for i, (parameters, flat) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        group = parameters[0].ds_process_group
        runs, offset = [], 0
        for parameter in parameters:
            shard = parameter.partition_numel()
            begin = shard * dist.get_rank(group)
            length = min(shard, parameter.ds_numel - begin)
            if length > 0:
                runs.append(Run(names[parameter], begin, offset, length))
            offset += shard
        settings = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[i]]
        yield Holding(flat, tuple(runs), settings, base + dist.get_rank(group) * offset)
        base += dist.get_world_size(group) * offset


def _sharded_optimizer(engine: Engine) -> Iterator[Holding]:
    """ZeRO 1 and 2: of each group's parameters, one after the other, this rank's part."""
    optimizer, names = engine.optimizer, _names(engine)
    of_groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    base = 0
    for i, (parameters, group) in enumerate(zip(of_groups, optimizer.optimizer.param_groups, strict=True)):
        [flat] = group["params"]
        runs = []
        for parameter in parameters:
            if parameter._hp_mapping is not None:
                here, there = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
                runs.append(Run(names[parameter], here.start, there.start, here.numel))
        rank = dist.get_rank(optimizer.real_dp_process_group[i])
        yield Holding(flat, tuple(runs), group, base + rank * len(flat))
        base += sum(parameter.numel() for parameter in parameters)


def _whole(engine: Engine) -> Iterator[Holding]:
    """Without ZeRO: parameters, or their float32 copies, each for itself or, in DeepSpeed's fused Adam, one a group."""
    optimizer, names = engine.optimizer, _names(engine)
    base = 0
    in_16_bit = hasattr(optimizer, "fp16_groups")
    for i, group in enumerate(optimizer.param_groups):
        parameters = optimizer.fp16_groups[i] if in_16_bit else group["params"]
        if hasattr(optimizer, "fp32_groups_flat"):
            runs, offset = [], 0
            for parameter in parameters:
                runs.append(Run(names[parameter], 0, offset, parameter.numel()))
                offset += parameter.numel()
            yield Holding(group["params"][0], tuple(runs), group, base)
            base += offset
            continue
        for parameter, master in zip(parameters, group["params"], strict=True):
            yield Holding(master, (Run(names[parameter], 0, 0, parameter.numel()),), group, base)
            base += parameter.numel()


def _names(engine: Engine) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in engine.module.named_parameters()}


def _optimizer(engine: Engine) -> Any:
    """The torch optimizer inside DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _flatten(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


def place_in_whole(engine: Engine) -> None:
    """Tells an optimizer that rounds stochastically where in the whole its tensors lie; others are left alone.

    The same number of ranks then draws the same bits after a resume, from one seed for all of them. On another number,
    and under another ZeRO stage, the bits are others of the same distribution.
    """
    optimizer = _optimizer(engine)
    if hasattr(optimizer, "place"):
        for holding in holdings(engine):
            optimizer.place(holding.tensor, holding.position)


# --- out of the engine ------------------------------------------------------------------------------------------------


def take_pieces(engine: Engine) -> Iterator[Piece]:
    """Every element that this rank's optimizer keeps: views, nothing is copied."""
    states = _optimizer(engine).state
    for holding in holdings(engine):
        # What there is an element of for each of the weights'; asked with `get`, for the state makes what it lacks.
        kept = {
            STATE + kind: value for kind, value in states.get(holding.tensor, {}).items() if _is_full(value, holding)
        }
        for kind, tensor in {WEIGHT: holding.tensor, **kept}.items():
            flat = _flatten(tensor)
            for run in holding.runs:
                yield Piece(run.name, kind, run.begin, flat[run.offset : run.offset + run.length])


def take_scalars(engine: Engine) -> dict[str, dict[str, float]]:
    """Name of each parameter of this rank -> the numbers that the optimizer keeps for it, such as "step"."""
    states = _optimizer(engine).state
    scalars: dict[str, dict[str, float]] = {}
    for holding in holdings(engine):
        state = states.get(holding.tensor, {})
        numbers = {key: float(v) for key, v in state.items() if key != POSITION and _is_number(v)}
        if numbers:
            scalars |= {run.name: numbers for run in holding.runs}
    return scalars


def split(engine: Engine, kind: str, tensors: Sequence[Tensor]) -> Iterator[Piece]:
    """Tensors shaped as those of `holdings`, one for each, as pieces of `kind`."""
    for holding, tensor in zip(holdings(engine), tensors, strict=True):
        for run in holding.runs:
            yield Piece(run.name, kind, run.begin, _part(tensor, run))


@torch.no_grad()
def join(engine: Engine, reader: PieceReader, kind: str, tensors: Sequence[Tensor]) -> None:
    """Fills tensors shaped as those of `holdings` with the pieces of `kind`, however they were split."""
    for holding, tensor in zip(holdings(engine), tensors, strict=True):
        for run in holding.runs:
            _part(tensor, run).copy_(reader.read(run.name, kind, run.begin, run.length))


def take_counters(engine: Engine) -> dict[str, Any]:
    """Steps, samples and the loss scale, JSON-able: the same on all ranks."""
    scaler = _scaler(engine)
    return {
        "counters": {name: int(getattr(engine, name)) for name in COUNTERS},
        "loss_scaler": {name: getattr(scaler, name) for name in SCALER if getattr(scaler, name, None) is not None},
    }


def _is_full(value: Any, holding: Holding) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.numel() == holding.tensor.numel()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0)


def _scaler(engine: Engine) -> Any:
    """What keeps a dynamic loss scale; None where the scale is fixed, for it is then the configuration's."""
    optimizer = engine.optimizer
    scaler = getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)
    is_dynamic = getattr(scaler, "dynamic_loss_scale", False) or getattr(scaler, "dynamic", False)
    return scaler if is_dynamic else None


# --- into the engine --------------------------------------------------------------------------------------------------


@torch.no_grad()
def put_pieces(engine: Engine, reader: PieceReader) -> None:
    """Fills what this rank's optimizer keeps; the model's own copy of the weights stays as it is.

    Weights, moments and compensation of any dtype become those of this engine. Raises InputError, naming the parameter,
    when elements are missing.
    """
    optimizer = _optimizer(engine)
    place_in_whole(engine)
    for holding in holdings(engine):
        state = _make_state(optimizer, holding, reader)
        for run in holding.runs:
            compensation = state.get(COMPENSATION)
            rest = None if compensation is None else _part(compensation, run)
            _put_weight(_part(holding.tensor, run), rest, reader, run)
            for kind, value in state.items():
                if _is_full(value, holding) and kind != COMPENSATION and STATE + kind in reader.kinds(run.name):
                    stored = reader.read(run.name, STATE + kind, run.begin, run.length)
                    part = _part(value, run)
                    part.copy_(_convert(stored, kind, part.dtype))
        _put_scalars(state, optimizer, holding, reader)


@torch.no_grad()
def put_weights(engine: Engine, reader: PieceReader, kind: str) -> None:
    """Fills the weights that this rank's optimizer updates, of which it keeps nothing yet, with pieces of that kind."""
    join(engine, reader, kind, [holding.tensor for holding in holdings(engine)])


def put_counters(engine: Engine, counters: dict[str, Any]) -> None:
    """Restores what `take_counters` gave. The loss scale stays the configuration's where one of the two is fixed."""
    for name, value in counters["counters"].items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    scaler = _scaler(engine)
    for name, value in counters["loss_scaler"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def _part(tensor: Tensor, run: Run) -> Tensor:
    return _flatten(tensor)[run.offset : run.offset + run.length]


def _make_state(optimizer: Any, holding: Holding, reader: PieceReader) -> dict[str, Any]:
    """The optimizer's state of a tensor, with room for what was stored; as it is when nothing was stored."""
    state: dict[str, Any] = optimizer.state[holding.tensor]
    if not any(reader.scalars.get(run.name) for run in holding.runs):
        return state
    if hasattr(optimizer, "make_state"):
        return optimizer.make_state(holding.tensor, holding.group)  # type: ignore[no-any-return]
    stored = {kind for run in holding.runs for kind in reader.kinds(run.name) if kind.startswith(STATE)}
    for kind in sorted(kind.removeprefix(STATE) for kind in stored):
        if kind not in state and kind != COMPENSATION:
            state[kind] = torch.zeros_like(holding.tensor, memory_format=torch.preserve_format)
    return state


def _put_weight(weight: Tensor, compensation: Tensor | None, reader: PieceReader, run: Run) -> None:
    """Fills a weight, and what rounding took from it where that is kept."""
    stored = reader.read(run.name, WEIGHT, run.begin, run.length)
    rest = None
    if STATE + COMPENSATION in reader.kinds(run.name):
        rest = reader.read(run.name, STATE + COMPENSATION, run.begin, run.length)
    same = stored.dtype == weight.dtype and (rest is None) == (compensation is None)
    if not same and rest is not None:
        stored = stored.float() + rest.float()
    weight.copy_(stored)
    if compensation is not None:
        lost = stored.to(weight.device).float() - weight.float()
        compensation.copy_(rest if same and rest is not None else lost)


def _convert(stored: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Moments between codes of 16 bits and floats; what has the wanted dtype stays bit for bit."""
    if stored.dtype == dtype:
        return stored
    if stored.dtype == torch.uint16:
        stored = decode(stored, FORMATS[kind])
    return encode(stored.float(), FORMATS[kind]) if dtype == torch.uint16 else stored.to(dtype)


def _put_scalars(state: dict[str, Any], optimizer: Any, holding: Holding, reader: PieceReader) -> None:
    numbers: dict[str, float] = {}
    for run in holding.runs:
        numbers |= reader.scalars.get(run.name, {})
    for key, number in numbers.items():
        before = state.get(key)
        if isinstance(before, Tensor):
            before.fill_(number)
        elif isinstance(before, (int, float)):
            state[key] = type(before)(number)
        else:
            state[key] = _new_number(number, optimizer, holding)


def _new_number(number: float, optimizer: Any, holding: Holding) -> Any:
    """A number as the optimizer itself would begin it: torch's count in tensors."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return int(number) if number == int(number) else number
    on_device = holding.group.get("capturable") or holding.group.get("fused")
    return torch.tensor(number, dtype=torch.float32, device=holding.tensor.device if on_device else "cpu")
