"""Same-shaped matrices of one resblock on their way through PowerSGD: the steps of Appendix E.2, one method each.

P has the shorter side of the matrix, whichever that is, because orthogonalisation is the cheaper for it: for matrices
that are taller than wide everything is done to their transposes.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dalle_kernels.compression.accumulation import Noise
from dalle_kernels.compression.base import check_choice
from dalle_kernels.compression.errors import ERROR_BUFFERS, CodedErrors, ErrorBuffer, FullErrors
from dalle_kernels.compression.orthogonalize import EPSILON, orthogonalize
from dalle_kernels.compression.wire import WIRES, largest

STARTS = ("fixed", "warm", "resampled")
# By wire: what takes P and Q, whose entries are about as large as norms of rows, into its range. In 1-6-9 up to 2**24,
# normal down to 2**-38, so that an error that its buffer holds (errors.py) always travels; one that did not would stay,
# and spoil every update to come. The paper chooses such constants by hand (Appendix D).
FACTOR_SCALES = {"1-6-9": 2.0**-20, "float16": 2.0**-6, "bfloat16": 1.0, "full": 1.0}


@dataclass(frozen=True, kw_only=True)
class PowerSGDOptions:
    """How to compress. `matrix_rank` is that of a whole matrix: each of `n_shards` shards gets its part of it.

    `start`: Q0 is "fixed", the last Q ("warm"), or "resampled" at each update; the last two are there to compare.
    `wire` is the format in which factors travel and wait, `errors` that in which errors are kept; `p_scale` and
    `q_scale` are what factors are multiplied by meanwhile, 0 for what suits the wire. Shards of a matrix may differ in
    `seed`; machines must not.
    """

    matrix_rank: int
    n_shards: int = 1
    seed: int = 0
    start: str = "fixed"
    epsilon: float = EPSILON
    error_feedback: bool = True
    wire: str = "1-6-9"
    errors: str = "1-6-9"
    p_scale: float = 0.0
    q_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.n_shards < 1 or self.matrix_rank < 1 or self.matrix_rank % self.n_shards:
            raise ValueError(f"matrix_rank {self.matrix_rank} must be a positive multiple of n_shards {self.n_shards}")
        for name in ("p_scale", "q_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must be above 0, or 0 for what suits the wire")
        check_choice("start", self.start, STARTS)
        check_choice("wire", self.wire, WIRES)
        check_choice("errors", self.errors, ERROR_BUFFERS)

    def for_shard(self, n_shards: int, ordinal: int, buffers: str) -> "PowerSGDOptions":
        """Shards are compressed each for itself (footnote 9), from different Q0; gradients add up in the errors."""
        return replace(self, n_shards=n_shards, seed=self.seed * n_shards + ordinal)

    @property
    def shard_rank(self) -> int:
        return self.matrix_rank // self.n_shards

    @property
    def scales(self) -> tuple[float, float]:
        """Of P and of Q."""
        default = FACTOR_SCALES[self.wire]
        return self.p_scale or default, self.q_scale or default


def n_factor_entries(rows: int, columns: int, shard_rank: int) -> int:
    """Entries of P and Q of one matrix, or shard of one: what is sent for it."""
    return min(shard_rank, rows, columns) * (rows + columns)


class Batch:
    """Same-shaped matrices of one resblock [n, rows, columns], or [n, short, long] as they are compressed."""

    p: ErrorBuffer  # [n, short, shard_rank], orthonormal columns
    q: ErrorBuffer  # [n, long, shard_rank]
    matrices: Tensor  # M [n, short, long], from P to Q: no more than two resblocks at a time have them

    def __init__(self, names: tuple[str, ...], zeros: Tensor, options: PowerSGDOptions) -> None:
        """`zeros` has the shape, dtype and device of the error buffer, and becomes that where it is kept in full."""
        self.names, self.options = names, options
        self.p_scale, self.q_scale = options.scales
        _, rows, columns = zeros.shape
        self.is_transposed = rows > columns
        self.shape = max(rows, columns), min(options.shard_rank, rows, columns)  # of Q
        self.device, self.dtype = zeros.device, zeros.dtype
        self.errors = ERROR_BUFFERS[options.errors](zeros)
        self.start = self._keep(self._draw(0))
        self.gradients_finite = torch.ones(len(names), dtype=torch.bool, device=zeros.device)
        self.errors_finite = self.factors_finite = self.gradients_finite.clone()

    def _keep(self, factor: Tensor, scale: float = 1.0) -> ErrorBuffer:
        """A factor as it waits: in 16 bits where it travels so, where a received one is what it was received as."""
        return CodedErrors(factor, scale) if self.options.wire == "1-6-9" else FullErrors(factor)

    def _draw(self, draw: int) -> Tensor:
        """Q0 [n, long, shard_rank], Gaussian: a function of seed, name and number of the draw."""
        draws = []
        for name in self.names:
            seed = zlib.crc32(f"{self.options.seed} {draw} {name}".encode())
            generator = torch.Generator().manual_seed(seed)
            # In float32 on the CPU: the same numbers for every device and dtype.
            draws.append(torch.randn(self.shape, generator=generator))
        return torch.stack(draws).to(self.device, self.dtype)

    def take_state(self, of_errors: Mapping[str, Tensor], of_starts: Mapping[str, Tensor]) -> None:
        """Takes up its own of a state's errors and, where there are any, starts."""
        for name in self.names:
            if name not in of_errors:
                raise ValueError(f"{name} has no error buffer in the state; resume with the model that was saved")
        errors = torch.stack([of_errors[name] for name in self.names]).to(self.device, self.dtype)
        if errors.shape != self.errors.load().shape:
            shape = tuple(self.errors.load().shape[1:])
            raise ValueError(
                f"{self.names[0]} of shape {shape} has an error buffer of {tuple(errors.shape[1:])} in the state"
            )
        self.errors.store(errors)
        if self.options.start == "warm" and of_starts:
            self.start.store(torch.stack([of_starts[name] for name in self.names]).to(self.device, self.dtype))

    def add(self, index: int, gradient: Tensor, factor: Tensor, noise: Noise | None) -> None:
        """Step 2: into the error buffer, unless it is not finite."""
        # One pass that keeps nothing; a norm that overflows is as bad as an infinite entry.
        finite = torch.linalg.vector_norm(gradient, dtype=self.dtype).isfinite()
        self.errors.add(index, gradient, factor, finite, noise)
        self.gradients_finite[index] &= finite

    def make_p(self, n_updates: int) -> Tensor:
        """Step 3. A row of M that is not finite makes a row of P that is not, so P tells of both."""
        if self.options.start == "resampled":
            self.start = self._keep(self._draw(n_updates))
        values = self.errors.load()
        self.matrices = values.mT if self.is_transposed else values
        p = self.matrices @ self.start.load()
        self.errors_finite = p.isfinite().flatten(1).all(1)
        return p

    def take_p(self, p: Tensor) -> None:
        """Steps 4 and 5."""
        self.factors_finite = p.isfinite().flatten(1).all(1)
        self.p = self._keep(orthogonalize(self._clamp(p, self.p_scale), self.options.epsilon))

    def make_q(self) -> Tensor:
        """Step 6."""
        q = self.matrices.mT @ self.p.load()
        del self.matrices
        return q

    def take_q(self, q: Tensor) -> None:
        """Step 7."""
        self.factors_finite = self.factors_finite & q.isfinite().flatten(1).all(1)
        self.q = self._keep(self._clamp(q, self.q_scale), self.q_scale)

    def local_flags(self) -> Tensor:
        """1 for each matrix that is not finite on this machine."""
        return (~(self.gradients_finite & self.errors_finite)).to(self.dtype)

    def squared_norm(self) -> Tensor:
        """Step 9: that of P Q^T, because P has orthonormal columns."""
        return self.q.load().square().sum()

    def decompress(self, out: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Steps 11 and 12: P Q^T of each matrix [rows, columns], in `out`, taken out of its error buffer."""
        left, right = (self.q, self.p) if self.is_transposed else (self.p, self.q)
        averages = []
        for i in range(len(self.names)):
            value = self.errors.load(i)
            place = None if out is None or out[i].dtype != value.dtype else out[i]
            product = torch.mm(left.load(i), right.load(i).T, out=place)
            _subtract_(value, product, self.factors_finite[i], self.errors_finite[i])
            self.errors.store(value, i)
            averages.append(product if out is None or place is not None else out[i].copy_(product))
        if not self.options.error_feedback:
            self.errors.zero_()
        if self.options.start == "warm":
            # Orthonormal, as torch's hook has it: as large as the start of a run, whatever the gradients.
            q = orthogonalize(self.q.load(), self.options.epsilon)
            self.start.store(torch.where(self.factors_finite[:, None, None], q, self.start.load()))
        self.gradients_finite.fill_(True)
        del self.p, self.q
        return averages

    def _clamp(self, factor: Tensor, scale: float) -> Tensor:
        """Infinities as the largest number that could have been received; NaN, which they may have made, as 0."""
        limit = min(largest(self.options.wire, factor.dtype) / scale, torch.finfo(factor.dtype).max)
        return torch.nan_to_num(factor, nan=0.0, posinf=limit, neginf=-limit)


def _subtract_(error: Tensor, gradient: Tensor, factors_finite: Tensor, error_finite: Tensor) -> None:
    """Step 12, the rules for the error of one matrix."""
    if factors_finite.is_cpu and factors_finite:
        error.sub_(gradient)
    else:
        kept = torch.where(error_finite, error, 0)
        error.copy_(torch.where(factors_finite, error - gradient, kept))
