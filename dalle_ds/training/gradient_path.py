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

from dalle_ds.training.gradient_scales import GradientScales, NoScaling
from dalle_ds.training.portable import Piece, PieceReader
from dalle_kernels.compression import Compressor, PowerSGD
from dalle_kernels.compression.base import at_least_32_bit

Group = dist.ProcessGroup | None
ERROR = "error"  # kind of piece
# Name, number of its resblock, gradient, and its scale.
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
    def look(self, name: str, resblock: int | None, gradient: Tensor) -> Tensor | float:
        """Remembers whether the gradient is finite; returns its scale."""
        scale: Tensor | float = 1.0
        place = -1
        if resblock is not None and self.scaling.values is not None:
            scale, place = self.scaling.values[resblock], resblock
        if self.watch is not None:
            self.watch(name, resblock, gradient, scale)
        # One pass that keeps nothing; sums of squares of 16-bit numbers fit float32.
        norm = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        self._nonfinite[place] |= ~norm.isfinite()
        return scale

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
        compressor.declare({name: torch.empty(share.shape, device=device) for name, share in shares.items()})
        self._block_of = {name: block for block, names in compressor.blocks.items() for name in names}
        self._arrived: dict[str, int] = {}

    @torch.no_grad()
    def receive(self, name: str, gradient: Tensor, factor: float, *, last: bool) -> None:
        """Takes the flat gradient of one micro-step: times its scale, and divided by `factor` too much.

        In the `last` micro-step a resblock is on its way to the other machines as soon as all its matrices are here,
        while the backward pass goes on.
        """
        share = self.shares[name]
        scale = self.unscaling.look(name, share.resblock, gradient)
        unscaled = at_least_32_bit(gradient) * (factor / scale)
        missing = torch.Size(share.shape).numel() - unscaled.numel()  # the padding of a last shard
        unscaled = torch.nn.functional.pad(unscaled, (0, missing)) if missing else unscaled
        self.compressor.add({name: unscaled.view(share.shape)})
        block = self._block_of.get(name)
        if last and block is not None:
            self._arrived[block] = self._arrived.get(block, 0) + 1
            if self._arrived[block] == len(self.compressor.blocks[block]):
                self.compressor.send(block, self.between)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The norm of the whole averaged gradient, infinite where the update must be skipped; moves the scales."""
        self._arrived = {}
        reduction = self.compressor.finish(self.between)
        squared_norm = reduction.squared_norm.double()
        if self.inside is not None:
            dist.all_reduce(squared_norm, group=self.inside)
        return torch.where(self.unscaling.agree(), torch.inf, squared_norm).sqrt().float()

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
        return {"n_updates": getattr(self.compressor, "n_updates", 0)}

    def pieces(self) -> list[Piece]:
        """Error buffers, as their mean over machines, on the ranks of the first machine; every rank must call."""
        errors = self.compressor.state_dict(self.between).get("errors", {})
        if dist.get_rank(self.between) > 0:
            return []
        return [Piece(name, ERROR, self._begin(error.numel()), error.view(-1)) for name, error in errors.items()]

    def load(self, state: dict[str, Any], pieces: PieceReader) -> None:
        """Goes on from `state_dict` and `pieces` of a run on any number of machines, of any size.

        A run that compressed nothing leaves no errors: then they begin at zero.
        """
        names = list(self._block_of)
        if not isinstance(self.compressor, PowerSGD) or not names or ERROR not in pieces.kinds(names[0]):
            return
        errors = {}
        for name in names:
            n = torch.Size(self.shares[name].shape).numel()
            errors[name] = pieces.read(name, ERROR, self._begin(n), n).view(self.shares[name].shape)
        self.compressor.load_state_dict({**state, "errors": errors, "starts": {}})

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
