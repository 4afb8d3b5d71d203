"""AdamW with moments of 16 bits, and 16-bit weights that need no float32 copy (Section 2.4, Appendix D).

The running mean is kept in 1-6-9, the running variance in 0-6-10, clipped at 5 before it is used or kept (Appendix
B.2). Arithmetic is float32, a chunk at a time on a CPU and in one kernel on a GPU. It is a torch optimizer that
DeepSpeed takes as its client's, under any ZeRO stage. Whether there are float32 master weights is not decided here: the
optimizer updates what it is handed. Handed 16-bit weights, it rounds them by `rounding`. Bytes a parameter, gradient
aside, as weights + moments:

    weights                     moments of 16 bits      of 32
    float32                                  4 + 4      4 + 8
    16 bits and a float32 master         2 + 4 + 4  2 + 4 + 8
    16 bits, nearest                         2 + 4      2 + 8
    16 bits, stochastic                      2 + 4      2 + 8
    16 bits, kahan                           4 + 4      4 + 8
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dalle_kernels.compression.adam import Update, update_on_cpu
from dalle_kernels.compression.formats import ADAM_MEAN, ADAM_VARIANCE

MOMENT_DTYPES = {16: torch.uint16, 32: torch.float32}
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDINGS = ("nearest", "stochastic", "kahan")


class CompactAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; every setting but `seed` may differ by parameter group.

    `moment_bits`: 16, or 32 for parameters whose moments stay in float32. `rounding` of 16-bit weights: "nearest" loses
    updates smaller than half a unit in the last place; "stochastic" keeps them on average, with random bits that are a
    function of seed, step and position alone; "kahan" keeps what was lost in a second tensor of the weights' dtype.
    Ranks that hold different shards should have different seeds, replicas of one shard the same.

    Nothing here looks for non-finite gradients: an update that is to be skipped must not be called.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.96),
        eps: float = 1e-8,
        weight_decay: float = 4.5e-2,
        variance_limit: float = 5.0,
        moment_bits: int = 16,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "variance_limit": variance_limit,
            "moment_bits": moment_bits,
            "rounding": rounding,
        }
        self.seed = seed
        self._next_position = 0
        self._scratch: tuple[Tensor, ...] = ()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        settings = {**self.defaults, **param_group}
        _check(settings)
        super().add_param_group(param_group)
        for parameter in param_group["params"]:
            if parameter.dtype not in WEIGHT_DTYPES:
                raise ValueError(f"a parameter of {parameter.dtype} must be one of {WEIGHT_DTYPES}")

    def place(self, parameter: Tensor, position: int) -> None:
        """Says where in the whole the parameter begins, for stochastic rounding: a shard then gets the whole's bits.

        Without, parameters count one after the other in the order of their first update.
        """
        self.state[parameter]["position"] = position

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.make_state(parameter, group)
        state["step"] += 1
        update = Update.at(state["step"], group, self.seed, state["position"])
        assert parameter.grad is not None
        weights, gradients, rest = _flatten(parameter), _flatten(parameter.grad), state.get("compensation")
        means, variances = _flatten(state["exp_avg"]), _flatten(state["exp_avg_sq"])
        rest = None if rest is None else _flatten(rest)
        if parameter.is_cuda:
            from dalle_kernels.compression.adam_kernels import update_on_gpu

            update_on_gpu(weights, gradients, means, variances, rest, update)
        else:
            self._scratch = update_on_cpu(weights, gradients, means, variances, rest, update, self._scratch)

    def make_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The parameter's state, made at its first update, or before to be filled."""
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            if "position" not in state:
                state["position"] = self._next_position
            self._next_position = max(self._next_position, state["position"] + parameter.numel())
            dtype = MOMENT_DTYPES[group["moment_bits"]]
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
            if group["rounding"] == "kahan" and parameter.dtype != torch.float32:
                state["compensation"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, bit for bit: torch's own would cast the codes to the weights' dtype."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                is_tensor = isinstance(value, Tensor)
                self.state[parameter][name] = value.to(parameter.device, copy=True) if is_tensor else value
        placed = [(state["position"], parameter) for parameter, state in self.state.items() if "position" in state]
        self._next_position = max((position + parameter.numel() for position, parameter in placed), default=0)


def _flatten(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} must be contiguous")
    return tensor.detach().view(-1)


def _check(settings: dict[str, Any]) -> None:
    for name, choices in (("moment_bits", tuple(MOMENT_DTYPES)), ("rounding", ROUNDINGS)):
        if settings[name] not in choices:
            raise ValueError(f"{name} {settings[name]!r} must be one of {choices}")
    for name in ("lr", "eps", "weight_decay"):
        if not (math.isfinite(settings[name]) and settings[name] >= 0):
            raise ValueError(f"{name} {settings[name]!r} must be a finite number of at least 0")
    if not all(0 <= beta < 1 for beta in settings["betas"]):
        raise ValueError(f"betas {settings['betas']!r} must be two numbers from 0 up to, but not, 1")
    limit = min(ADAM_MEAN.largest, ADAM_VARIANCE.largest)
    if not 0 < settings["variance_limit"] <= limit and settings["moment_bits"] == 16:
        raise ValueError(f"variance_limit {settings['variance_limit']!r} must be above 0 and at most {limit}")
