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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_kernels.compression.base import BlockOf, Gradients, Reduction, at_least_32_bit, resblock_of, split
from dalle_kernels.compression.factors import Batch, PowerSGDOptions
from dalle_kernels.compression.wire import Group, Traffic, start_average


class PowerSGD:
    """The compressor. `reduce_` is an update in one call; `start` and `finish` are the same in parts, for overlap."""

    def __init__(self, options: PowerSGDOptions, *, block_of: BlockOf = resblock_of) -> None:
        self.options, self.block_of = options, block_of
        self.traffic = Traffic()
        self.n_updates = 0
        self._blocks: dict[tuple[str, ...], list[Batch]] = {}
        self._loaded: dict[str, dict[str, Tensor]] = {}
        self._update = _Update()

    def reduce_(self, gradients: Gradients, group: Group) -> Reduction:
        """Replaces gradients by the average over the group, matrices by its low-rank part."""
        blocks, whole = split(gradients, self.block_of)
        for names in (*blocks.values(), whole):
            self.start({name: gradients[name] for name in names}, group)
        return self.finish(group)

    @torch.no_grad()
    def add(self, gradients: Gradients) -> None:
        """Adds gradients of matrices into their error buffers, for all micro-steps but the last, which `start` takes.

        A gradient that is not finite is left out, and remembered until the update ends.
        """
        for names in split(gradients, self.block_of)[0].values():
            for batch, tensors in self._batches({name: gradients[name] for name in names}):
                batch.add(tensors)

    @torch.no_grad()
    def start(self, gradients: Gradients, group: Group) -> None:
        """Takes up the gradients of a resblock as soon as the backward pass has made them, and sends its P.

        Meanwhile the P of the resblock before has arrived: its Q is made, and sent.
        """
        blocks, whole = split(gradients, self.block_of)
        self._update.whole.update((name, gradients[name]) for name in whole)
        for names in blocks.values():
            batches = self._batches({name: gradients[name] for name in names})
            for batch, tensors in batches:
                batch.add(tensors)
                batch.gradients = tensors
            members = [batch for batch, _ in batches]
            wait = self._send([batch.make_p(self.n_updates) for batch in members], group, self.options.p_scale)
            self._advance(group)
            self._update.waiting_for_p = (members, wait)

    @torch.no_grad()
    def finish(self, group: Group) -> Reduction:
        """Writes the averages over all gradients that were started, and keeps what they leave as errors."""
        self._advance(group)
        update, self._update = self._update, _Update()
        self.n_updates += 1
        batches = [batch for members, _ in update.waiting_for_q for batch in members]
        wait_whole = self._send_whole(update.whole, [batch.local_flags() for batch in batches], group)
        for members, wait in update.waiting_for_q:
            for batch, q in zip(members, wait(), strict=True):
                batch.take_q(q)
        *averages, flags = wait_whole()
        squares = [average.square().sum() for average in averages] + [batch.squared_norm() for batch in batches]
        nonfinite = torch.cat([flags.new_zeros(0).bool(), *(~batch.factors_finite for batch in batches)]) | (flags > 0)
        total = torch.stack(squares).sum()
        for (_, gradient), average in zip(update.whole.items(), averages, strict=True):
            gradient.copy_(average)
        for batch in batches:
            batch.decompress()
        names = tuple(name for batch in batches for name in batch.names)
        return Reduction(torch.where(total.isfinite() & ~nonfinite.any(), total, torch.inf), nonfinite, names)

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
        for batch in (batch for batches in self._blocks.values() for batch in batches):
            mean = batch.errors.load().clone()
            dist.all_reduce(mean, group=group)
            batch.errors.store(mean.div_(n))
            errors |= dict(zip(batch.names, mean.cpu().clone(), strict=True))
            if self.options.start == "warm":
                starts |= dict(zip(batch.names, batch.start.cpu().clone(), strict=True))
        return {"n_updates": self.n_updates, "errors": errors, "starts": starts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state; error buffers are filled from it when their matrices are first met."""
        missing = {"n_updates", "errors", "starts"} - set(state)
        if missing:
            raise ValueError(f"state without {', '.join(sorted(missing))} is not of a run with PowerSGD")
        self.n_updates = state["n_updates"]
        self._loaded = {"errors": dict(state["errors"]), "starts": dict(state["starts"])}
        self._blocks.clear()

    def _batches(self, gradients: Gradients) -> list[tuple[Batch, list[Tensor]]]:
        """Each batch of same-shaped matrices with its gradients, made when these names first come together."""
        names = tuple(gradients)
        if names not in self._blocks:
            for other in self._blocks:
                if set(names) & set(other):
                    raise ValueError(
                        f"gradients {names} came together as {other} before; every update must have the same"
                    )
            shapes: dict[tuple[torch.Size, torch.dtype], list[str]] = {}
            for name, gradient in gradients.items():
                shapes.setdefault((gradient.shape, gradient.dtype), []).append(name)
            self._blocks[names] = [self._make_batch(members, gradients[members[0]]) for members in shapes.values()]
        return [(batch, [gradients[name] for name in batch.names]) for batch in self._blocks[names]]

    def _make_batch(self, names: list[str], like: Tensor) -> Batch:
        dtype = torch.promote_types(like.dtype, torch.float32)
        zeros = torch.zeros((len(names), *like.shape), dtype=dtype, device=like.device)
        batch = Batch(tuple(names), zeros, self.options)
        if self._loaded:
            batch.take_state(self._loaded)
        return batch

    def _send(self, factors: list[Tensor], group: Group, scale: float) -> Callable[[], list[Tensor]]:
        n_bytes, wait = start_average(factors, group, self.options.wire, scale)
        self.traffic.matrix_bytes += n_bytes
        self.traffic.n_calls += 1
        return wait

    def _send_whole(self, whole: Gradients, flags: list[Tensor], group: Group) -> Callable[[], list[Tensor]]:
        """The 32-bit average of what is not compressed, with a flag a matrix: something was not finite somewhere."""
        tensors = [at_least_32_bit(gradient) for gradient in whole.values()]
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


@dataclass
class _Update:
    """What an update has under way."""

    whole: dict[str, Tensor] = field(default_factory=dict)
    waiting_for_p: tuple[list[Batch], Callable[[], list[Tensor]]] | None = None
    waiting_for_q: list[tuple[list[Batch], Callable[[], list[Tensor]]]] = field(default_factory=list)
