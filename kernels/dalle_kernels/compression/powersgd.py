"""PowerSGD as the paper has it (Section 2.5, Appendix E; Vogels et al. 2019): matrices averaged by low-rank factors.

A matrix M = e + g, the error buffer with this update's gradient added, travels as P = M Q0 with a Q0 that is drawn once
and fixed, and, once P is averaged and its columns orthonormal, as Q = M^T P. Every machine then has the same P Q^T as
its gradient, and keeps M - P Q^T as its error. So on average over machines M is gradient plus error, at every update:
nothing is lost, it comes later. Same-shaped matrices of a resblock are computed with at once, each with its own norms.

Conventions. P and Q are averaged, so gradients come out as the mean over machines (the paper subtracts the sum over
machines divided by their number: the same). A skipped update is one whose norm is infinite. Then as always a matrix
whose P and Q are finite has P Q^T taken from its error: the gradient of a skipped update is dropped as far as it would
have been applied, as it is without compression. A matrix whose P or Q is not finite keeps its error, unless that is not
finite itself: then, and only then, it is zeroed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_kernels.compression.base import (
    BlockOf,
    Gradients,
    Reduction,
    reduce_in_one_call,
    resblock_of,
    split,
)
from dalle_kernels.compression.factors import Batch, PowerSGDOptions
from dalle_kernels.compression.wire import Group, Traffic, start_average


class PowerSGD:
    """The compressor. Resblocks are sent as the backward pass finishes them, and their Q follows with the next one."""

    def __init__(self, options: PowerSGDOptions, *, block_of: BlockOf = resblock_of) -> None:
        self.options, self.block_of = options, block_of
        self.traffic = Traffic()
        self.n_updates = 0
        self.blocks: dict[str, list[str]] = {}
        self._batches: dict[str, list[Batch]] = {}
        self._places: dict[str, tuple[Batch, int]] = {}
        self._whole: dict[str, Tensor] = {}
        self._loaded: dict[str, dict[str, Tensor]] = {}
        self._update = _Update()

    @property
    def nbytes(self) -> int:
        batches = (batch for batches in self._batches.values() for batch in batches)
        return sum(batch.errors.nbytes for batch in batches) + sum(whole.nbytes for whole in self._whole.values())

    def declare(self, like: Gradients) -> None:
        known = self._places.keys() | self._whole.keys()
        missing = known - like.keys() if any(name in known for name in like) else set()
        if missing:
            raise ValueError(f"gradients of {', '.join(sorted(missing))} stayed away; every update must have the same")
        blocks, whole = split({name: tensor for name, tensor in like.items() if name not in known}, self.block_of)
        for name in whole:
            self._whole[name] = torch.zeros_like(like[name], dtype=_wide(like[name]))
        for block, names in blocks.items():
            self.blocks[block] = names
            shapes: dict[tuple[torch.Size, torch.dtype], list[str]] = {}
            for name in names:
                shapes.setdefault((like[name].shape, like[name].dtype), []).append(name)
            self._batches[block] = [self._make_batch(members, like[members[0]]) for members in shapes.values()]
            self._places |= {name: (batch, i) for batch in self._batches[block] for i, name in enumerate(batch.names)}

    def reduce_(self, gradients: Gradients, group: Group) -> Reduction:
        """Replaces gradients by the average over the group, matrices by its low-rank part."""
        return reduce_in_one_call(self, gradients, group)

    @torch.no_grad()
    def add(self, gradients: Gradients) -> None:
        """A gradient that is not finite is left out of its error buffer, and remembered until the update ends."""
        for name, gradient in gradients.items():
            if name in self._whole:
                self._whole[name] += gradient
            else:
                batch, index = self._places[name]
                batch.add(index, gradient)

    @torch.no_grad()
    def send(self, block: str, group: Group) -> None:
        """Sends P. Meanwhile the P of the resblock before has arrived: its Q is made, and sent."""
        batches = self._batches[block]
        wait = self._send([batch.make_p(self.n_updates) for batch in batches], group, self.options.p_scale)
        self._advance(group)
        self._update.waiting_for_p = (batches, wait)
        self._update.sent.add(block)

    @torch.no_grad()
    def finish(self, group: Group) -> Reduction:
        for block in self._batches:
            if block not in self._update.sent:
                self.send(block, group)
        self._advance(group)
        update, self._update = self._update, _Update()
        self.n_updates += 1
        batches = [batch for members, _ in update.waiting_for_q for batch in members]
        wait_whole = self._send_whole([batch.local_flags() for batch in batches], group)
        for members, wait in update.waiting_for_q:
            for batch, q in zip(members, wait(), strict=True):
                batch.take_q(q)
        *averages, flags = wait_whole()
        squares = [average.square().sum() for average in averages] + [batch.squared_norm() for batch in batches]
        nonfinite = torch.cat([flags.new_zeros(0).bool(), *(~batch.factors_finite for batch in batches)]) | (flags > 0)
        total = torch.stack(squares).sum()
        for whole, average in zip(self._whole.values(), averages, strict=True):
            whole.copy_(average)
        names = tuple(name for batch in batches for name in batch.names)
        return Reduction(torch.where(total.isfinite() & ~nonfinite.any(), total, torch.inf), nonfinite, names)

    @torch.no_grad()
    def take(self, names: Iterable[str], out: Gradients | None = None) -> dict[str, Tensor]:
        names = list(names)
        averages: dict[str, Tensor] = {}
        for batch in dict.fromkeys(self._places[name][0] for name in names if name in self._places):
            places = None if out is None else [out[name] for name in batch.names]
            averages |= dict(zip(batch.names, batch.decompress(places), strict=True))
        for name in names:
            if name in self._whole:
                whole = self._whole[name]
                averages[name] = whole.clone() if out is None else out[name].copy_(whole)
                whole.zero_()
        assert averages.keys() == set(names), "the matrices of a resblock are taken together"
        return averages

    @torch.no_grad()
    def state_dict(self, group: Group) -> dict[str, Any]:
        """The mean of the errors over machines, by name: all that matters of them, whatever the number of machines.

        It is what the paper calls their sum, whose gradients are divided by the number of machines beforehand. Each
        machine's errors become that mean here too, as they will in a run that resumes: so a run that goes on and one
        that resumes on as many machines are the same bit for bit.
        """
        assert not self._update.waiting_for_q, "an update is under way"
        errors: dict[str, Tensor] = dict(self._loaded.get("errors", {}))
        starts: dict[str, Tensor] = dict(self._loaded.get("starts", {}))
        n = dist.get_world_size(group)
        for batch in (batch for batches in self._batches.values() for batch in batches):
            mean = batch.errors.load().clone()
            dist.all_reduce(mean, group=group)
            batch.errors.store(mean.div_(n))
            # As it is kept, so that a second state is the first.
            errors |= dict(zip(batch.names, batch.errors.load().cpu().clone(), strict=True))
            if self.options.start == "warm":
                starts |= dict(zip(batch.names, batch.start.cpu().clone(), strict=True))
        return {"n_updates": self.n_updates, "errors": errors, "starts": starts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state; error buffers are filled from it when their matrices are declared, or here if they are."""
        missing = {"n_updates", "errors", "starts"} - set(state)
        if missing:
            raise ValueError(f"state without {', '.join(sorted(missing))} is not of a run with PowerSGD")
        self.n_updates = state["n_updates"]
        self._loaded = {"errors": dict(state["errors"]), "starts": dict(state["starts"])}
        for batch in (batch for batches in self._batches.values() for batch in batches):
            batch.take_state(self._loaded)

    def _make_batch(self, names: list[str], like: Tensor) -> Batch:
        zeros = torch.zeros((len(names), *like.shape), dtype=_wide(like), device=like.device)
        batch = Batch(tuple(names), zeros, self.options)
        if self._loaded:
            batch.take_state(self._loaded)
        return batch

    def _send(self, factors: list[Tensor], group: Group, scale: float) -> Callable[[], list[Tensor]]:
        n_bytes, wait = start_average(factors, group, self.options.wire, scale)
        self.traffic.matrix_bytes += n_bytes
        self.traffic.n_calls += 1
        return wait

    def _send_whole(self, flags: list[Tensor], group: Group) -> Callable[[], list[Tensor]]:
        """The 32-bit average of what is not compressed, with a flag a matrix: something was not finite somewhere."""
        tensors = list(self._whole.values())
        flag = torch.cat(flags) if flags else tensors[0].new_zeros(0)
        dtype = torch.promote_types(tensors[0].dtype, flag.dtype) if tensors else flag.dtype
        n_bytes, wait = start_average([tensor.to(dtype) for tensor in (*tensors, flag)], group)
        self.traffic.whole_bytes += n_bytes
        self.traffic.n_calls += 1
        return wait

    def _advance(self, group: Group) -> None:
        """From P to Q for the resblock whose P is on its way."""
        if self._update.waiting_for_p is None:
            return
        members, wait = self._update.waiting_for_p
        self._update.waiting_for_p = None
        for batch, p in zip(members, wait(), strict=True):
            batch.take_p(p)
        wait = self._send([batch.make_q() for batch in members], group, self.options.q_scale)
        self._update.waiting_for_q.append((members, wait))


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


@dataclass
class _Update:
    """What an update has under way."""

    sent: set[str] = field(default_factory=set)
    waiting_for_p: tuple[list[Batch], Callable[[], list[Tensor]]] | None = None
    waiting_for_q: list[tuple[list[Batch], Callable[[], list[Tensor]]]] = field(default_factory=list)
