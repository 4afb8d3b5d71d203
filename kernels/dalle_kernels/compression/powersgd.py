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

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_kernels.compression.accumulation import noise_of
from dalle_kernels.compression.base import (
    BlockOf,
    Gradients,
    Reduction,
    as_factor,
    reduce_in_one_call,
    resblock_of,
    split,
    wide,
)
from dalle_kernels.compression.factors import Batch, PowerSGDOptions
from dalle_kernels.compression.wire import Average, Group, Traffic


class PowerSGD:
    """The compressor. Resblocks are sent as the backward pass finishes them, and their Q follows with the next one."""

    keeps_errors = True

    def __init__(self, options: PowerSGDOptions, *, block_of: BlockOf = resblock_of) -> None:
        self.options, self.block_of = options, block_of
        self.traffic = Traffic()
        self.n_updates = 0
        self.blocks: dict[str, list[str]] = {}
        self._batches: dict[str, list[Batch]] = {}
        self._places: dict[str, tuple[Batch, int]] = {}
        self._whole: dict[str, Tensor] = {}
        self._n_added: Counter[str] = Counter()
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
            self._whole[name] = torch.zeros_like(like[name], dtype=wide(like[name]))
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
    def add(self, gradients: Gradients, factor: Tensor | float = 1.0) -> None:
        """A gradient that is not finite is left out of its error buffer, and remembered until the update ends."""
        self._update.advance()
        for name, gradient in gradients.items():
            scalar = as_factor(factor, gradient)
            if name in self._whole:
                self._whole[name] += gradient.to(self._whole[name].dtype) * scalar
                continue
            batch, index = self._places[name]
            batch.add(index, gradient, scalar, noise_of(name, self.n_updates, self._n_added[name]))
            self._n_added[name] += 1

    @torch.no_grad()
    def send(self, block: str, group: Group) -> None:
        """Sends P. Meanwhile the P of the resblock before has arrived: its Q is made, and sent."""
        batches = self._batches[block]
        average = self._send([batch.make_p(self.n_updates) for batch in batches], group, self.options.scales[0])
        self._answer(group)
        self._update.p = batches, average
        self._update.sent.add(block)

    @torch.no_grad()
    def finish(self, group: Group) -> Reduction:
        for block in self._batches:
            if block not in self._update.sent:
                self.send(block, group)
        self._answer(group)
        update, self._update = self._update, _Update()
        self.n_updates += 1
        self._n_added.clear()
        batches = [batch for members, _ in update.q for batch in members]
        whole_average = self._send_whole([batch.local_flags() for batch in batches], group)
        update.advance()
        for members, average in update.q:
            for batch, q in zip(members, average.wait(), strict=True):
                batch.take_q(q)
        *means, flags = whole_average.wait()
        squares = [mean.square().sum() for mean in means] + [batch.squared_norm() for batch in batches]
        nonfinite = torch.cat([flags.new_zeros(0).bool(), *(~batch.factors_finite for batch in batches)]) | (flags > 0)
        total = torch.stack(squares).sum()
        for whole, mean in zip(self._whole.values(), means, strict=True):
            whole.copy_(mean)
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
    def state_dict(self, group: Group, *, keep: bool = True) -> dict[str, Any]:
        """The mean of the errors over machines, by name: all that matters of them, whatever the number of machines.

        It is what the paper calls their sum, whose gradients are divided by the number of machines beforehand. Each
        machine's errors become that mean here too, as they will in a run that resumes: so a run that goes on and one
        that resumes on as many machines are the same bit for bit.
        """
        assert not self._update.q, "an update is under way"
        errors: dict[str, Tensor] = {}
        starts: dict[str, Tensor] = {}
        n = dist.get_world_size(group)
        for batch in (batch for batches in self._batches.values() for batch in batches):
            mean = batch.errors.load().clone()
            dist.all_reduce(mean, group=group)
            batch.errors.store(mean.div_(n))
            if not keep:
                continue
            # As it is kept, so that a second state is the first.
            errors |= dict(zip(batch.names, batch.errors.load().to("cpu", copy=True), strict=True))
            if self.options.start == "warm":
                starts |= dict(zip(batch.names, batch.start.load().to("cpu", copy=True), strict=True))
        return {"n_updates": self.n_updates, "errors": errors, "starts": starts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A state without "starts" leaves a warm Q to begin anew."""
        missing = {"n_updates", "errors"} - set(state)
        if missing:
            raise ValueError(f"state without {', '.join(sorted(missing))} is not of a run with PowerSGD")
        self.n_updates = state["n_updates"]
        for batch in (batch for batches in self._batches.values() for batch in batches):
            batch.take_state(state["errors"], state.get("starts", {}))

    def _make_batch(self, names: list[str], like: Tensor) -> Batch:
        zeros = torch.zeros((len(names), *like.shape), dtype=wide(like), device=like.device)
        return Batch(tuple(names), zeros, self.options)

    def _send(self, factors: list[Tensor], group: Group, scale: float) -> Average:
        average = Average(factors, group, self.options.wire, scale)
        self._update.under_way.append(average)
        self.traffic.matrix_bytes += average.n_bytes
        self.traffic.n_calls += 1
        return average

    def _send_whole(self, flags: list[Tensor], group: Group) -> Average:
        """The 32-bit average of what is not compressed, with a flag a matrix: something was not finite somewhere."""
        tensors = list(self._whole.values())
        flag = torch.cat(flags) if flags else tensors[0].new_zeros(0)
        dtype = torch.promote_types(tensors[0].dtype, flag.dtype) if tensors else flag.dtype
        average = Average([tensor.to(dtype) for tensor in (*tensors, flag)], group)
        self.traffic.whole_bytes += average.n_bytes
        self.traffic.n_calls += 1
        return average

    def _answer(self, group: Group) -> None:
        """From P to Q for the resblock whose P is on its way."""
        if self._update.p is None:
            return
        (members, average), self._update.p = self._update.p, None
        for batch, p in zip(members, average.wait(), strict=True):
            batch.take_p(p)
        factors = [batch.make_q() for batch in members]
        self._update.q.append((members, self._send(factors, group, self.options.scales[1])))


@dataclass
class _Update:
    """What an update has under way: the P of the last resblock that was sent, and the Q of those before."""

    sent: set[str] = field(default_factory=set)
    p: tuple[list[Batch], Average] | None = None
    q: list[tuple[list[Batch], Average]] = field(default_factory=list)
    under_way: list[Average] = field(default_factory=list)
    """averages that may have a second part to send"""

    def advance(self) -> None:
        """Has the second parts sent; at the same points on all ranks, which gradients that come in are."""
        for average in self.under_way:
            average.advance()
        self.under_way.clear()
