"""What is trained end to end: a factor for each scale, and the floating parameters of all blocks
and of the last norm."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from gptq.blockwise.model import BlockwiseModel
from gptq.tuning.trainable import stored_scales

FACTORS = "factors"
"""The parameter of a TrainableLinear."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of torch's Adam."""
T = TypeVar("T")


class _Parameter:
    """A tensor that is trained: start + size * change. Steps are then shares of its mean size."""

    def __init__(self, start: Tensor) -> None:
        self.start = start
        self.size = float(start.abs().mean()) or 1.0
        self.change = nn.Parameter(torch.zeros_like(start))

    @torch.no_grad()
    def value(self) -> Tensor:
        return self.start + self.size * self.change


class Parameters:
    """The trained parameters of a quantized model, float32, and their optimizer.

    Names are those in the model; that of a layer's factors (groups, 1, out) is the layer's with
    ".factors".
    packed: the quantized layers' tensors. stored: the 16-bit type of norms in a file.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        packed: Mapping[str, Tensor],
        stored: torch.dtype,
        betas: tuple[float, float],
    ) -> None:
        self._scales: dict[str, Tensor] = {}
        self._parameters: dict[str, _Parameter] = {}
        self._stored = stored
        for index in range(model.block_count):
            block = model.spec.block(index)
            for name in (f"{block}.{layer}" for layer in model.spec.linears):
                scales = packed[f"{name}.scales"].to(model.device, torch.float32)
                self._scales[name] = scales
                self._parameters[f"{name}.{FACTORS}"] = _Parameter(torch.ones_like(scales)[:, None])
            self._add_floats(model, block)
        self._add_floats(model, model.spec.norm)
        self._optimizer = torch.optim.Adam((it.change for it in self._all), betas=betas)

    def _add_floats(self, model: BlockwiseModel, part: str) -> None:
        """Add a part's parameters but those of quantized layers."""
        for key, empty in model.module.get_submodule(part).named_parameters():
            name = f"{part}.{key}"
            if name.rpartition(".")[0] not in self._scales:
                start = model.stored(name, empty).to(model.device, torch.float32)
                self._parameters[name] = _Parameter(start)

    @property
    def _all(self) -> list[_Parameter]:
        return list(self._parameters.values())

    def leaves(self, part: str) -> dict[str, Tensor]:
        """New leaves with the values of a part's parameters, by their names inside it."""
        return {name: it.value().requires_grad_() for name, it in _inside(self._parameters, part)}

    def take_gradients(self, part: str, leaves: Mapping[str, Tensor]) -> None:
        """Keep the gradients of `leaves` for the next step."""
        for name, leaf in leaves.items():
            parameter = self._parameters[f"{part}.{name}"]
            parameter.change.grad = None if leaf.grad is None else leaf.grad * parameter.size

    def step(self, rate: float) -> None:
        """One step of the optimizer, after which no gradients are kept."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def as_stored(self) -> dict[str, Tensor]:
        """Scales, float16 (groups, out), and other parameters as a file holds them, on the CPU."""
        return dict(self._as_stored(name) for name in self._parameters)

    @torch.no_grad()
    def _as_stored(self, name: str) -> tuple[str, Tensor]:
        """A parameter's tensor in a file, and its name there."""
        value = self._parameters[name].value()
        layer, _, key = name.rpartition(".")
        if key != FACTORS:
            return name, value.to(self._stored).cpu()
        return f"{layer}.scales", stored_scales(self._scales[layer], value[:, 0]).cpu()

    def rounded(self, part: str) -> dict[str, Tensor]:
        """The values of a part's parameters after a file was written and read."""
        values = {}
        for name, parameter in _inside(self._parameters, part):
            layer, _, key = f"{part}.{name}".rpartition(".")
            tensor = self._as_stored(f"{part}.{name}")[1].to(parameter.start)
            values[name] = (tensor / self._scales[layer])[:, None] if key == FACTORS else tensor
        return values

    def state(self) -> dict[str, Tensor]:
        """What was trained so far and the optimizer's moments, on the CPU."""
        tensors = {}
        for name, parameter in self._parameters.items():
            tensors[f"{name}.change"] = parameter.change.detach().cpu().clone()
            moments = self._optimizer.state.get(parameter.change, {})
            for key in MOMENTS:
                if key in moments:
                    tensors[f"{name}.{key}"] = moments[key].cpu().clone()
        return tensors

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on from what `state` returned after `step` steps."""
        for name, parameter in self._parameters.items():
            parameter.change.copy_(state[f"{name}.change"])
            if step:
                moments = {
                    key: state[f"{name}.{key}"].to(parameter.change.device) for key in MOMENTS
                }
                moments["step"] = torch.tensor(float(step))
                self._optimizer.state[parameter.change] = moments


def _inside(named: Mapping[str, T], part: str) -> list[tuple[str, T]]:
    """What belongs to a part of the model, by its names inside the part."""
    prefix = f"{part}."
    return [(name[len(prefix) :], it) for name, it in named.items() if name.startswith(prefix)]
