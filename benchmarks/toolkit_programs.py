"""Sony's model-compression-toolkit as a program beside zsq: its images without data, its gradient PTQ."""

import copy
import importlib
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from zsq.graph.nodes import weight_node
from zsq.models import Teacher
from zsq.quant.placement import place
from zsq.quant.scheme import parse_bits
from zsq.stages import captured

PACKAGE = "model_compression_toolkit"
MISSING = """\
This script compares zsq with Sony's model-compression-toolkit, which is not installed here ({reason}). It \
wants older versions of some packages than zsq does, so give both an environment of their own: `python -m \
venv toolkit`, `toolkit/bin/pip install model-compression-toolkit torchvision -e .`, and then \
`toolkit/bin/python benchmarks/toolkit.py ...`."""
MISSING_OPERATOR = "operator torchvision::nms does not exist"
LEARNING_BATCH = 32  # images a step of the gradient PTQ, as zsq has
BORDER = 32  # pixels that it adds to height and width besides what is asked for
# BatchNorm distance of 32 images after 100 steps, without the border: 0.65 at 0.3, 0.55 at 1; with it: 4.3 at
# 16 (its default), 2.4 at 4, 1.9 at 1, 3.0 at 0.3, 6.9 at 0.1, 9.1 at 0.03.
TUNED_RATE = 1.0
_declared: list[torch.library.Library] = []  # declarations live as long as this reference


def import_toolkit() -> ModuleType:
    """The package.

    A torchvision whose compiled part does not fit the installed torch (its usual wheel and a CPU build of
    torch, for one) fails at import for want of two operators; they are declared, and never called.

    Raises:
        SystemExit: it is not installed; says how to.
    """
    try:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if MISSING_OPERATOR not in str(error):
                raise
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)
        return importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        raise SystemExit(MISSING.format(reason=error)) from error


class Marks:
    """In the place of its progress bar: notes the processor time at the end of every step."""

    def __init__(self, steps: Iterable[int]) -> None:
        self.ends: list[float] = []
        self._steps = steps

    def __iter__(self) -> Iterator[int]:
        return iter(self._steps)

    def set_description(self, text: str) -> None:
        """What it does at the end of a step."""
        self.ends.append(time.process_time())


@contextmanager
def _prepared(teacher: Teacher) -> Iterator[list[Marks]]:
    """Its data generation with the normalisation of this network, and the bars that it makes."""
    common = importlib.import_module(f"{PACKAGE}.data_generation.common.image_pipeline")
    loop = importlib.import_module(f"{PACKAGE}.data_generation.pytorch.pytorch_data_generation")
    kind = importlib.import_module(PACKAGE).data_generation.ImageNormalizationType.TORCHVISION
    pixels = [[255 * value for value in values] for values in (teacher.spec.mean, teacher.spec.std)]
    bars: list[Marks] = []

    def bar(steps: Iterable[int]) -> Marks:
        bars.append(Marks(steps))
        return bars[-1]

    with (
        patch.dict(common.image_normalization_dict, {kind: pixels}),
        patch.object(loop, "tqdm", bar),
    ):
        yield bars


def generate(
    teacher: Teacher, *, num_images: int, batch_size: int, steps: int, tuned: bool, seed: int
) -> tuple[Tensor, list[float]]:
    """Its images (N, C, H, W) and the processor time at the end of every step.

    Args:
        teacher: the network; its copy has weights that want gradients, as a network has when it is loaded.
        num_images, batch_size, steps: as for zsq.
        tuned: not its defaults, but statistics of a batch in place of those of all images (no second forward
            pass), frozen weights, no pixels that are optimised and then cropped away, and the learning rate
            that was best in 100 steps.
        seed: of torch and numpy.
    """
    module = import_toolkit().data_generation
    more: dict[str, Any] = {}
    if tuned:
        more = {
            "image_granularity": module.ImageGranularity.BatchWise,
            "extra_pixels": -BORDER,
            "initial_lr": TUNED_RATE,
        }
    config = module.get_pytorch_data_generation_config(n_iter=steps, data_gen_batch_size=batch_size, **more)
    network = copy.deepcopy(teacher.module).requires_grad_(not tuned)
    torch.manual_seed(seed)
    np.random.seed(seed)
    with _prepared(teacher) as bars:
        images = module.pytorch_data_generation_experimental(
            network, num_images, tuple(teacher.spec.input_size[1:]), config
        )
    return torch.cat(images).detach(), bars[0].ends


def eight_bit_layers(teacher: Teacher, bits: str) -> set[str]:
    """Modules whose weights have 8 bits in zsq, as the toolkit calls them before it folds BatchNorm."""
    graph = captured(teacher, torch.device("cpu")).graph
    places = place(graph, parse_bits(bits)).weights
    weights = [weight_node(node) for node in graph.nodes if places.get(node.name) == 8]
    return {str(w.target).removesuffix(".weight").replace(".", "_") for w in weights if w is not None}


def gradient_ptq(teacher: Teacher, images: Tensor, *, bits: str, steps: int, seed: int) -> nn.Module:
    """Its student with learned rounding, as near to zsq's quantizers as its settings allow.

    Weights are symmetric with one step a channel, the bits of the scheme and 8 in the same layers as in zsq.
    What operations return has 8 bits with a zero point (its own default are steps of powers of 2, without);
    zsq quantizes what convolutions read, so here images, both operands of sums and the output come besides.

    Args:
        teacher: the network.
        images: (N, C, H, W), normalised.
        bits: W4A8; activations have 8.
        steps: gradient steps, rounded up to whole passes over the images.
        seed: of torch and numpy.
    """
    toolkit = import_toolkit()
    scheme = parse_bits(bits)
    platform = importlib.import_module(
        f"{PACKAGE}.target_platform_capabilities.tpc_models.imx500_tpc.v1_0.tpc"
    )
    methods = importlib.import_module("mct_quantizers").QuantizationMethod
    matchers = importlib.import_module(f"{PACKAGE}.core.common.matchers.node_matcher")
    eight = eight_bit_layers(teacher, bits)

    class Layers(matchers.BaseNodeMatcher):  # type: ignore[misc, name-defined]
        """Layers with weights that are among those of 8 bits, or are not."""

        def __init__(self, inside: bool) -> None:
            self.inside = inside

        def apply(self, node: Any) -> bool:
            """Whether it is one of them."""
            name = node.name.removesuffix("_bn")
            return node.type in (nn.Conv2d, nn.Linear) and (name in eight) == self.inside

    def edited(config: Any, weight_bits: int | None = None) -> Any:
        return config.clone_and_edit(
            attr_to_edit={"kernel_attr": {"weights_n_bits": weight_bits}} if weight_bits else None,
            activation_quantization_method=methods.UNIFORM,
        )

    base, _, default = platform.get_op_quantization_configs()
    choices = [edited(base, 8), edited(base, scheme.weight_bits)]
    capabilities = platform.generate_tpc(
        default_config=edited(default), base_config=choices[0], mixed_precision_cfg_list=choices, name=bits
    )
    widths = toolkit.core.BitWidthConfig()
    widths.set_manual_weights_bit_width(
        [Layers(inside=False), Layers(inside=True)], [scheme.weight_bits, 8], "weight"
    )
    batches = [chunk.numpy() for chunk in images.split(LEARNING_BATCH)]
    torch.manual_seed(seed)
    np.random.seed(seed)
    student, _ = toolkit.gptq.pytorch_gradient_post_training_quantization(
        copy.deepcopy(teacher.module),
        lambda: ([batch] for batch in batches),
        core_config=toolkit.core.CoreConfig(bit_width_config=widths),
        gptq_config=toolkit.gptq.get_pytorch_gptq_config(n_epochs=math.ceil(steps / len(batches))),
        target_platform_capabilities=capabilities,
    )
    found: nn.Module = student.eval()
    return found


def free_output(student: nn.Module) -> None:
    """Take away the quantizer of what its last layer returns, which zsq's students do not have either."""
    names = [name for name, _ in student.named_children() if name.endswith("activation_holder_quantizer")]
    setattr(student, names[-1], nn.Identity())
