"""The one public attention function, and the operator behind it.

`dalle_kernels::attention` and `dalle_kernels::attention_backward` are operators of torch: compilers, activation
checkpointing (the selective one too), DeepSpeed and flop counters see one node with known shapes, whichever
implementation runs inside. A mask travels as plain numbers.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dalle_kernels.attention.cached import cached_attention
from dalle_kernels.attention.masks import Mask
from dalle_kernels.attention.reference import attention_reference


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, implementation: str | None = None) -> Tensor:
    """Sparse attention over a whole stream: q, k, v [B, H, N, D] with N = mask.seq_len -> [B, H, N, D].

    The result has the dtype of q (under autocast, that of autocast) and lies in memory as [B, N, H, D]. By default
    Triton runs on a GPU and blocked flash attention on a CPU; `implementation` names one of IMPLEMENTATIONS. Raises
    ValueError for an unknown implementation, and for shapes and dtypes that do not fit.
    """
    device = q.device.type
    name = DEFAULTS.get(device, "chunked") if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r} is unknown; known ones are {', '.join(IMPLEMENTATIONS)}")
    if q.dim() != 4 or q.shape[2] != mask.seq_len or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v are {shapes}; all must be [B, H, {mask.seq_len}, D], the length of the stream")
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; all must have one dtype")
    return IMPLEMENTATIONS[name](q, k, v, mask)


def _run_operator(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, path: str) -> Tensor:
    numbers = (mask.kind, mask.text_len, mask.grid_height, mask.grid_width, mask.conv_kernel, mask.wrap)
    return torch.ops.dalle_kernels.attention(q, k, v, *numbers, path)[0]  # type: ignore[no-any-return]


def _mask(kind: str, text_len: int, grid_height: int, grid_width: int, conv_kernel: int, wrap: bool) -> Mask:
    return Mask(
        kind=kind,
        text_len=text_len,
        grid_height=grid_height,
        grid_width=grid_width,
        conv_kernel=conv_kernel,
        wrap=wrap,
    )


def _forward(q: Tensor, k: Tensor, v: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
    *mask, path = numbers
    return _module(path).forward(*map(_rows_contiguous, (q, k, v)), _mask(*mask))  # type: ignore[no-any-return]


def _backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *mask, path = numbers
    tensors = (*map(_rows_contiguous, (q, k, v, o)), lse, _rows_contiguous(do))
    return _module(path).backward(*tensors, _mask(*mask))  # type: ignore[no-any-return]


def _module(path: str) -> Any:
    """Imported at the first use: Triton is not everywhere."""
    return importlib.import_module(f"dalle_kernels.attention.{PATHS[path]}")


def _rows_contiguous(x: Tensor) -> Tensor:
    """Kernels read any strides but the last: the gradient of a sum, say, has none."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _token_major_like(x: Tensor) -> Tensor:
    B, H, N, D = x.shape
    return x.new_empty(B, N, H, D).transpose(1, 2)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
    return _token_major_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _token_major_like(q), _token_major_like(k), _token_major_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.numbers = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse)


def _differentiate(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.dalle_kernels.attention_backward(*ctx.saved_tensors, do, *ctx.numbers)
    return (*gradients, *(None for _ in ctx.numbers))


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("attention has no second derivative; use implementation='reference' for one")


def _flops(q_shape: torch.Size, *arguments: Any, flops: int, **_: Any) -> int:
    *mask, _path = arguments[-7:]
    B, H, _N, D = q_shape
    return B * H * D * flops * count_pairs(_mask(*mask))


@functools.lru_cache(maxsize=64)
def count_pairs(mask: Mask) -> int:
    """How many pairs of a query and a key the mask has."""
    position = torch.arange(mask.seq_len, device="cpu")
    # Some rows at a time: the whole matrix of a large grid is gigabytes.
    return sum(int(mask.sees(rows[:, None], position).sum().item()) for rows in torch.split(position, 1024))


# Module of this package with forward(q, k, v, mask) -> o, lse and backward(q, k, v, o, lse, do, mask) -> dq, dk, dv.
PATHS = {"triton": "kernels", "cpu": "cpu", "chunked": "chunked"}
IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Mask], Tensor]] = {
    **{path: functools.partial(_run_operator, path=path) for path in PATHS},
    "dense": functools.partial(cached_attention, query_start=0),
    "reference": attention_reference,
}
# Type of device -> implementation; "chunked" elsewhere.
DEFAULTS = {"cuda": "triton", "cpu": "cpu"}

_NUMBERS = "str kind, int text_len, int grid_height, int grid_width, int conv_kernel, bool wrap, str path"
_SCHEMAS = {
    "attention": f"(Tensor q, Tensor k, Tensor v, {_NUMBERS}) -> (Tensor, Tensor)",
    "attention_backward": (
        f"(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, {_NUMBERS}) -> (Tensor, Tensor, Tensor)"
    ),
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"dalle_kernels::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
torch.library.impl("dalle_kernels::attention", "default", _forward)
torch.library.impl("dalle_kernels::attention_backward", "default", _backward)
torch.library.register_fake("dalle_kernels::attention", _fake_forward)
torch.library.register_fake("dalle_kernels::attention_backward", _fake_backward)
torch.library.register_autograd("dalle_kernels::attention", _differentiate, setup_context=_save)
torch.library.register_autograd("dalle_kernels::attention_backward", _refuse)
# Of each pair and channel: two products forward; backward the scores once more, and four products.
register_flop_formula(torch.ops.dalle_kernels.attention)(functools.partial(_flops, flops=4))
register_flop_formula(torch.ops.dalle_kernels.attention_backward)(functools.partial(_flops, flops=10))
