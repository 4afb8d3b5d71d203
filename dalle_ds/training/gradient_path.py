"""A rank's gradients on their way from the backward pass to the update (Appendix D, Appendix E.2).

They come in multiplied by the scales of their resblocks, a micro-step and a parameter at a time; are looked at for what
is not finite; divided by their scales, once, in float32; added up in the compressor's buffers; averaged between
machines; and go out as what the optimizer sees, with their global norm. An update with anything that is not finite is
to be skipped: its norm is infinite.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.storage.pieces import Piece, PieceReader
from dalle_ds.training.gradient_scales import GradientScales, NoScaling
from dalle_ds.training.seam import check_received
from dalle_kernels.compression import Compressor, Reduction

Group = dist.ProcessGroup | None
ERROR = "error"  # kind of piece
# Name, number of its resblock, a (part of a) gradient as it comes, and what it is too large by.
Watch = Callable[[str, int | None, Tensor, Tensor | float], None]
CLIP_EPSILON = 1e-6  # DeepSpeed's, as torch's, in the quotient of norm and limit


@dataclass(frozen=True)
class Share:
    """What a rank holds of a parameter's gradient: its resblock's number, if it has one, and the shape of its shard."""

    resblock: int | None
    shape: tuple[int, ...]


class Unscaling:
    """Divides gradients by the scales of their resblocks, and remembers which were not finite."""

    def __init__(self, scaling: GradientScales | NoScaling, device: torch.device | str) -> None:
        self.scaling = scaling
        self.watch: Watch | None = None
        n_resblocks = 0 if scaling.values is None else len(scaling.values)
        # The last place is that of all parameters outside resblocks.
        self._nonfinite = torch.zeros(n_resblocks + 1, dtype=torch.int32, device=device)

    @torch.no_grad()
    def look(self, name: str, resblock: int | None, gradient: Tensor, factor: float) -> Tensor | float:
        """Remembers whether the gradient is finite; returns what it is to be multiplied by: `factor` over its scale."""
        scale: Tensor | float = 1.0
        place = -1
        if resblock is not None and self.scaling.values is not None:
            scale, place = self.scaling.values[resblock], resblock
        if self.watch is not None:
            self.watch(name, resblock, gradient, scale / factor)
        # One pass that keeps nothing; sums of squares of 16-bit numbers fit float32.
        norm = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        self._nonfinite[place] |= ~norm.isfinite()
        return factor / scale

    def agree(self) -> Tensor:
        """Whether any gradient on any rank was not finite, a bool scalar; moves the scales. Every rank must call."""
        dist.all_reduce(self._nonfinite, op=dist.ReduceOp.MAX)
        self.scaling.update(self._nonfinite[:-1].bool())
        is_any = self._nonfinite.any()
        self._nonfinite.zero_()
        return is_any


class GradientPath:
    """Gradients of one update after the other, on every rank alike.

    `between` are the ranks that hold the same shards, over which they are averaged, and `inside` those that hold
    different ones, over which the norm is summed (None where each rank holds all).
    """

    def __init__(
        self,
        shares: Mapping[str, Share],
        unscaling: Unscaling,
        compressor: Compressor,
        device: torch.device | str,
        *,
        between: Group,
        inside: Group | None,
    ) -> None:
        self.shares, self.unscaling, self.compressor = shares, unscaling, compressor
        self.between, self.inside = between, inside
        nothing = torch.empty((), device=device)  # of any shape, in no memory
        compressor.declare({name: nothing.expand(share.shape) for name, share in shares.items()})
        self._block_of = {name: block for block, names in compressor.blocks.items() for name in names}
        # Gradients of an update that have come by parameter, matrices of resblocks alone: of others a rank may have
        # nothing.
        self._received = dict.fromkeys(self._block_of, 0)
        self._missing: dict[str, set[str]] = {}  # of the last micro-step, by resblock
        self._reduction: Reduction | None = None

    @torch.no_grad()
    def receive(self, name: str, gradient: Tensor, factor: float, *, last: bool) -> None:
        """Takes the flat gradient of one micro-step: times its scale, and divided by `factor` too much.

        In the `last` micro-step a resblock is on its way to the other machines as soon as all its matrices are here,
        while the backward pass goes on.
        """
        share = self.shares[name]
        unscale = self.unscaling.look(name, share.resblock, gradient, factor)
        missing = torch.Size(share.shape).numel() - gradient.numel()  # the padding of a last shard
        padded = torch.nn.functional.pad(gradient, (0, missing)) if missing else gradient
        self.compressor.add({name: padded.view(share.shape)}, unscale)
        block = self._block_of.get(name)
        if block is None:
            return
        self._received[name] += 1
        if last:
            missing_here = self._missing.setdefault(block, set(self.compressor.blocks[block]))
            missing_here.remove(name)
            if not missing_here:
                self.compressor.send(block, self.between)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The norm of the whole averaged gradient, infinite where the update must be skipped; moves the scales."""
        check_received(self._received)
        self._received, self._missing = dict.fromkeys(self._block_of, 0), {}
        self._reduction = self.compressor.finish(self.between)
        squared_norm = self._reduction.squared_norm.double()
        if self.inside is not None:
            dist.all_reduce(squared_norm, group=self.inside)
        return torch.where(self.unscaling.agree(), torch.inf, squared_norm).sqrt().float()

    def spoiled(self) -> list[str]:
        """The matrices of this rank whose part of the last average was not finite, on any machine."""
        if self._reduction is None:
            return []
        return [
            name for name, bad in zip(self._reduction.names, self._reduction.nonfinite.tolist(), strict=True) if bad
        ]

    def taken_together(self) -> list[list[str]]:
        """All names, those that `take` wants in one call together: each resblock's matrices, and all else."""
        whole = [name for name in self.shares if name not in self._block_of]
        return [*map(list, self.compressor.blocks.values()), whole]

    def take(self, names: Iterable[str], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Averaged, unscaled gradients in at least float32, of the shapes of the shares; matrices by resblock.

        With `out`, they are written into its tensors, of these shapes.
        """
        return self.compressor.take(names, out)

    def state_dict(self) -> dict[str, Any]:
        """What compression carries from update to update, but for `pieces`: the same on all ranks."""
        return {"n_updates": self.compressor.n_updates}

    def pieces(self) -> list[Piece]:
        """Error buffers, as their mean over machines, on the ranks of the first machine; every rank must call."""
        errors = self.compressor.state_dict(self.between, keep=dist.get_rank(self.between) == 0)["errors"]
        return [Piece(name, ERROR, self._begin(error.numel()), error.view(-1)) for name, error in errors.items()]

    def load(self, state: dict[str, Any], pieces: PieceReader) -> None:
        """Goes on from `state_dict` and `pieces` of a run on any number of machines, of any size.

        A run that compressed nothing leaves no errors: then they begin at zero.
        """
        errors = {}
        for name in self._block_of if self.compressor.keeps_errors else ():
            shape = torch.Size(self.shares[name].shape)
            n = shape.numel()
            is_kept = ERROR in pieces.kinds(name)
            errors[name] = pieces.read(name, ERROR, self._begin(n), n).view(shape) if is_kept else torch.zeros(shape)
        self.compressor.load_state_dict({"n_updates": state.get("n_updates", 0), "errors": errors})

    def _begin(self, length: int) -> int:
        """Where this rank's shard of so many elements begins in its parameter."""
        return 0 if self.inside is None else dist.get_rank(self.inside) * length

    def discard(self) -> None:
        """Leaves an update out: what compression keeps for later ones follows its own rules."""
        for names in self.taken_together():
            self.take(names)


def clip_(gradient: Tensor, norm: Tensor, limit: float) -> None:
    """Makes a (part of a) gradient of the global `norm` as much smaller as that exceeds `limit`; 0 clips nothing."""
    if limit > 0:
        gradient.div_(((norm + CLIP_EPSILON) / limit).clamp(min=1.0))
