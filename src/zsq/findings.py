"""What is wrong with the numbers of a network, its images and its student, found where a run has them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from zsq.errors import JobError
from zsq.graph.nodes import LAYERS, weight_node
from zsq.graph.tensors import device_of, get_tensor
from zsq.health import Finding
from zsq.images.forward import BATCH_NORMS, batch_norms
from zsq.out_of_memory import in_chunks
from zsq.quant.affine import MIN_SCALE
from zsq.quant.attach import Quantizers

CHUNK = 64
NUM_IMAGES = 256  # the first ones of a run, on which the teacher is asked
STILL = 1e-2  # of a BatchNorm's eps: a variance below it says that the channel never moved
AT_BOUND = 1.001  # times MIN_SCALE
LEAST_HITS = 0.5  # share of the images for which the teacher names the class that was asked for
MOST_ENTROPY = 0.8  # of the teacher's probabilities, mean over images, as a share of that of equal ones
EXACT = 1e-6  # relative error of a float32 that was rounded twice


def network_findings(graph: fx.GraphModule) -> list[Finding]:
    """Channels that never move: no variance or no scale in a BatchNorm, zero weights in a layer.

    Args:
        graph: captured teacher with its BatchNorm layers.
    """
    found = []

    def add(name: str, count: int, total: int, what: str, done: str) -> None:
        if count:
            found.append(Finding("capture", name, f"{count} of {total} channels: {what}", done))

    norms = set(batch_norms(graph.graph))
    for node in graph.graph.nodes:
        if node in norms:
            _, mean, var, _, eps = BATCH_NORMS[node.target]
            name = str(node.args[mean].target).rpartition(".")[0] or node.name
            variance, gamma = get_tensor(graph, str(node.args[var].target)), node.args[1]
            still = int((variance <= STILL * float(node.args[eps])).sum())
            add(name, still, len(variance), "no variance in training", "eps keeps their scale finite")
            if isinstance(gamma, fx.Node):
                zero = int((get_tensor(graph, str(gamma.target)) == 0).sum())
                add(name, zero, len(variance), "scaled by 0", "they stay the constant that they are")
        weight = weight_node(node)
        if weight is not None:
            rows = get_tensor(graph, str(weight.target)).transpose(0, LAYERS[node.target]).flatten(1)
            name = str(weight.target).rpartition(".")[0] or node.name
            dead = int((rows == 0).all(1).sum())
            add(name, dead, len(rows), "zero weights only", "they stay the constant that they are")
    return found


@torch.no_grad()
def image_findings(
    teacher: fx.GraphModule, images: Tensor, labels: Tensor | None, *, noise: bool, labelled: bool = False
) -> list[Finding]:
    """A teacher that is unsure of the images that its student is made with.

    Args:
        teacher: captured network.
        images: (N, C, H, W), normalised, on its device.
        labels: (N,) int64, the classes that they were made for; None if for none. Both are cut at NUM_IMAGES.
        noise: they are, and no network knows noise.
        labelled: the user brought images and labels.

    Returns:
        Nothing for a network without classes.

    Raises:
        JobError: the teacher answers some of them with NaN or infinity, so that no range can be found.
    """
    images, found = images[:NUM_IMAGES], []
    for _, output in in_chunks(lambda r: teacher(images[r]), len(images), CHUNK, "the teacher's pass"):
        if not isinstance(output, Tensor):
            return []
        found.append(output)
    logits = torch.cat(found).float()
    broken = int((logits.isnan() | (logits == math.inf)).reshape(len(logits), -1).any(1).sum())
    if broken:
        raise JobError(
            f"The model answers {broken} of {len(images)} images with NaN or infinity, so no ranges can be "
            "set from them. Check mean, std and input size of the model; images of large values make some "
            "networks overflow."
        )
    if noise or logits.ndim != 2 or logits.shape[1] < 2:
        return []
    goes_on = "the run goes on; try more synthesis.steps, another recipe, or --images of your own"
    if labels is not None:
        hits = int((logits.argmax(1) == labels[:NUM_IMAGES].to(logits.device)).sum())
        if hits < LEAST_HITS * len(images):
            if labelled:
                what = f"names the class of the label on {hits} of {len(images)} given images"
                goes_on = "the run goes on; number the classes of --images in the model's order"
            else:
                what = f"names the class asked for on {hits} of {len(images)} images"
            return [Finding("synthesize", "teacher", what, goes_on)]
    probabilities = logits.softmax(1)
    entropy = float(torch.special.entr(probabilities).sum(1).mean()) / math.log(logits.shape[1])
    if entropy > MOST_ENTROPY:
        what = (
            f"is unsure of {len(images)} images (largest of {logits.shape[1]} probabilities: "
            f"{float(probabilities.amax(1).mean()):.2f} on average)"
        )
        return [Finding("synthesize", "teacher", what, goes_on)]
    return []


def student_findings(
    original: fx.GraphModule,
    student: fx.GraphModule,
    quantizers: Quantizers,
    activations: Mapping[str, Mapping[str, Any]],
) -> list[Finding]:
    """Activations of one value, and scales at their lower bound.

    Args:
        original: what the student was attached to.
        student: finished.
        quantizers: of the student.
        activations: what `zsq.inspection.inspect` says of them, by the quantizer's name.
    """
    found = []
    tensors = {name: tensor for tensor, name in reversed(quantizers.activations.items())}
    for name, tensor in reversed(tensors.items()):
        about = activations.get(name)
        if about is None or about["lowest"] is None:
            continue
        width = about["highest"] - about["lowest"]
        if width <= MIN_SCALE * 2 ** about["bits"]:
            value = torch.tensor(about["lowest"], device=device_of(student))
            error = float((student.get_submodule(name)(value) - value).abs())
            what = f"is {about['lowest']:g} everywhere in all images"
            exact = error <= max(EXACT * abs(about["lowest"]), MIN_SCALE * 2 ** about["bits"])
            done = "a code stands for just this value" if exact else f"its code is {error:.2g} off"
            found.append(Finding("calibrate", tensor, what, done))
        elif about["scale"] <= AT_BOUND * MIN_SCALE:
            values = f"for values from {about['lowest']:g} to {about['highest']:g}"
            what = f"scale at the lower bound {MIN_SCALE:g}, {values}"
            done = "kept there; if it was learned, lower reconstruction.lr_activation_scale"
            found.append(Finding("reconstruct", tensor, what, done))
    nodes = {node.name: node for node in original.graph.nodes}
    for layer, quantizer_name in quantizers.weights.items():
        weight = weight_node(nodes[layer])
        assert weight is not None
        quantizer: Any = student.get_submodule(quantizer_name)
        rows = get_tensor(original, str(weight.target)).detach().transpose(0, quantizer.axis).flatten(1)
        low = (quantizer.scale <= AT_BOUND * MIN_SCALE) & (rows != 0).any(1)
        count = int(low.sum())
        if count:
            what = f"{count} of {len(rows)} channels: scale at the lower bound {MIN_SCALE:g}"
            done = "kept there; if it was learned, lower reconstruction.lr_weight_scale"
            name = str(weight.target).rpartition(".")[0] or layer
            found.append(Finding("reconstruct", name, what, done))
    return found


def undone(lr_factor: float) -> Finding:
    """Epochs of fine-tuning that made the loss worse.

    Args:
        lr_factor: what the learning rate was multiplied by in the end.
    """
    what = "epochs that made the loss worse, or not finite, were undone"
    return Finding("fine-tune", "student", what, f"the learning rate was multiplied by {lr_factor:.2g}")
