"""A student whose float parameters are trained: put up before fine-tuning, hardened after it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from zsq.graph.nodes import weight_node
from zsq.graph.tensors import get_tensor
from zsq.quant.attach import Quantizers
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from zsq.quant.training import FixedRange, MovingRange, TrainedWeight
from zsq.recover.settings import FineTuning


@dataclass(frozen=True)
class Trainee:
    """A part of a student in which quantizers were replaced; other tensors are the student's own.

    Attributes:
        part: the part.
        weights: what stands in for weight quantizers, by their names.
        ranges: the same for activation quantizers.
    """

    part: fx.GraphModule
    weights: dict[str, TrainedWeight]
    ranges: dict[str, FixedRange]

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained: every float parameter that the part reads, by name."""
        found: dict[str, nn.Parameter] = {f"{n}.weight": w.weight for n, w in self.weights.items()}
        for node in self.part.graph.nodes:
            if node.op == "get_attr":
                tensor = get_tensor(self.part, str(node.target))
                if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                    found[str(node.target)] = tensor
        return found

    def harden(self, student: fx.GraphModule) -> None:
        """Give the student quantizers of what was learned; nothing requires gradients afterwards."""
        for parameter in self.parameters().values():
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, weight in self.weights.items():
            student.set_submodule(name, weight.harden())
        for name, fixed in self.ranges.items():
            quantizer = student.get_submodule(name)
            assert isinstance(quantizer, ActivationQuantizer)
            quantizer.set_range(fixed.scale, fixed.zero_point)


def put_up(
    part: fx.GraphModule,
    teacher: fx.GraphModule,
    quantizers: Quantizers,
    settings: FineTuning,
    *,
    reconstructed: bool,
    observe: Callable[[nn.Module], None] | None,
) -> Trainee:
    """Replace the quantizers of a part of a student by those of training.

    Args:
        part: from `extract`; changed in place, the student is not.
        teacher: captured network that the student was attached to.
        quantizers: of the student.
        settings: of fine-tuning.
        reconstructed: weights start as what the codes stand for; else as the teacher's.
        observe: None keeps the scales and zero points that there are. If given, weights have the range of
            their values, and it is called once with the part while its activation quantizers average theirs.
    """
    weights: dict[str, TrainedWeight] = {}
    for node in teacher.graph.nodes:
        found = weight_node(node)
        name = quantizers.weights.get(node.name)
        if found is None or name is None:
            continue
        quantizer = part.get_submodule(name)
        assert isinstance(quantizer, WeightQuantizer)
        start = quantizer() if reconstructed else get_tensor(teacher, str(found.target))
        weights[name] = TrainedWeight(start, quantizer, keep_range=observe is None)
        part.set_submodule(name, weights[name])
    activations = {n: m for n, m in part.named_modules() if isinstance(m, ActivationQuantizer)}
    qparams: dict[str, tuple[Tensor, Tensor]] = {n: (m.scale, m.zero_point) for n, m in activations.items()}
    if observe is not None:
        watching = {n: MovingRange(m, momentum=settings.range_momentum) for n, m in activations.items()}
        _put(part, watching.items())
        observe(part)
        qparams = {n: m.qparams() for n, m in watching.items()}
    ranges = {
        name: FixedRange(*qparams[name], bits=module.bits, saturated_gradients=settings.saturated_gradients)
        for name, module in activations.items()
    }
    _put(part, ranges.items())
    return Trainee(part, weights, ranges)


def _put(part: fx.GraphModule, modules: Iterable[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        part.set_submodule(name, module)


def trainee_state(trainee: Trainee, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    """All that a continued training needs, by name."""
    state: dict[str, Tensor] = {}
    for name, parameter in trainee.parameters().items():
        state[f"parameter.{name}"] = parameter.detach().clone()
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            state[f"momentum.{name}"] = momentum.clone()
    for name, fixed in trainee.ranges.items():
        state[f"range.{name}"] = torch.stack([fixed.scale, fixed.zero_point])
    return state


@torch.no_grad()
def load_trainee(trainee: Trainee, optimizer: torch.optim.SGD, state: dict[str, Tensor]) -> None:
    """Go back to what `trainee_state` returned."""
    for name, parameter in trainee.parameters().items():
        parameter.copy_(state[f"parameter.{name}"])
        optimizer.state.pop(parameter, None)
        if f"momentum.{name}" in state:
            momentum = torch.empty_like(parameter).copy_(state[f"momentum.{name}"])
            optimizer.state[parameter]["momentum_buffer"] = momentum
    for name, fixed in trainee.ranges.items():
        scale, zero_point = state[f"range.{name}"]
        fixed.scale.copy_(scale)
        fixed.zero_point.copy_(zero_point)
