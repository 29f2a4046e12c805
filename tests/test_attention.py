"""Attention: written out, its products and softmax quantized, uniform and logarithmic."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from graph_networks import SIZE, chained, graph_of, images, network, outputs, same
from tiny_networks import message
from torch import Tensor, fx, nn

from zsq.errors import UsageError
from zsq.export.onnx import export_onnx
from zsq.graph.attention import FUSED_ATTENTION, PRODUCTS, SOFTMAXES, attentions, softmax_before
from zsq.graph.blocks import split
from zsq.graph.capture import capture
from zsq.graph.equalize_norms import norm_layers
from zsq.images.looks import attention_patches
from zsq.models import Teacher
from zsq.pipeline import compose_recipe, quantize
from zsq.quant.attach import OCTAVES, attach
from zsq.quant.calibrate import calibrate
from zsq.quant.placement import place
from zsq.quant.quantizers import ActivationQuantizer
from zsq.quant.scheme import Scheme
from zsq.recipe import Calibration
from zsq.student import student_from_file, student_to_bytes


class Masked(nn.Module):
    """Attention with a mask that is added, a scale, and one that is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.bias = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(x, x, x, attn_mask=self.bias, scale=0.3)
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def masked() -> fx.GraphModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return capture(Masked().eval().requires_grad_(False), SIZE)


@pytest.mark.parametrize("name", ["transformer", "masked"])
def test_written_out_attention_computes_the_same(name: str) -> None:
    graph = masked() if name == "masked" else graph_of(name)
    targets = [n.target for n in graph.graph.nodes]
    assert targets.count(FUSED_ATTENTION) == (name == "masked")  # the causal one
    assert len(attentions(graph.graph)) == 2
    written = [n for n in graph.graph.nodes if n.target in PRODUCTS or n.target in SOFTMAXES]
    assert all(n.meta["val"].shape[1:] == dict(_values(graph))[n.name].shape[1:] for n in written)
    if name == "transformer":
        torch.testing.assert_close(outputs(graph, images(3))[0], outputs(network(name), images(3))[0])


def _values(module: fx.GraphModule) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                found.append((n.name, value))
            return value

    with torch.no_grad():
        Watching(module).run(images(2))
    return found


def test_all_operands_of_products_are_quantized() -> None:
    graph = graph_of("transformer").graph
    placement = place(graph, Scheme(weight_bits=4, activation_bits=6))
    softmaxes = [n for n in graph.nodes if n.target in SOFTMAXES]
    assert len(softmaxes) == 2
    for softmax in softmaxes:
        assert placement.activations[softmax.name] == 6
    # two blocks: softmax, and query, key and value, each apart from the others
    student, quantizers = attach(graph_of("transformer"), Scheme(weight_bits=4, activation_bits=6))
    for product in (n for n in student.graph.nodes if n.target in PRODUCTS):
        names = set()
        for operand in product.args:
            while operand.op != "call_module":
                operand = operand.args[0]
            names.add(operand.target)
        assert len(names) == 2 and names <= set(quantizers.activations.values())
    assert placement.logarithmic == frozenset()
    assert not place(graph, Scheme(activation_bits=None)).activations


def test_operands_of_einsum_are_quantized() -> None:
    student, _ = attach(graph_of("einsum"), Scheme())
    products = [n for n in student.graph.nodes if n.target is torch.ops.aten.einsum.default]
    assert len(products) == 2
    for product in products:
        assert all(a.op == "call_module" or a.args[0].op == "call_module" for a in product.all_input_nodes)


@pytest.mark.parametrize("placement", ["research", "engine"])
def test_what_is_divided_by_stays_in_float(placement: str) -> None:
    """In linear attention a product of rounded operands can be 0, and the quotient anything."""
    graph = graph_of("linear_attention")
    student, quantizers = attach(graph, Scheme(placement=placement))
    calibrate(student, [images(8)], Calibration(num_images=8))
    products = [n for n in student.graph.nodes if n.target in PRODUCTS]
    assert len(products) == 2
    assert not any(a.op == "call_module" for n in products for a in n.all_input_nodes)
    assert set(quantizers.weights) == {"conv2d", "conv2d_1", "conv2d_2", "linear"}
    wanted, got = outputs(graph, images(8))[0], outputs(student, images(8))[0]
    assert (wanted - got).norm() < wanted.norm()


def test_logarithmic_codes_by_hand() -> None:
    """At 4 bits powers of 2 down to 2^-15, at 5 bits of the root of 2; 0 becomes the smallest."""
    for bits, step in ((4, 1.0), (5, 0.5)):
        scheme = Scheme(weight_bits=8, activation_bits=bits, softmax="log2", ends="same")
        student, quantizers = attach(graph_of("transformer"), scheme)
        placement = place(graph_of("transformer").graph, scheme)
        assert len(placement.logarithmic) == 2
        (first, *_) = sorted(placement.logarithmic)
        quantizer = student.get_submodule(quantizers.activations[first])
        assert isinstance(quantizer, ActivationQuantizer)
        assert float(quantizer.scale) == step == OCTAVES / 2**bits and float(quantizer.zero_point) == 0
        nodes = [n for n in student.graph.nodes if n.name == first]
        values = torch.tensor([1.0, 0.5, 0.3, 2.0**-15.4, 0.0])
        for operation in _chain(nodes[0]):
            values = operation(values) if operation is not None else quantizer(values)
        highest = step * (2**bits - 1)
        expected = torch.tensor([0.0, 1.0, step * round(1.737 / step), min(highest, 15.5), highest])
        torch.testing.assert_close(-values.log2(), expected)


def _chain(softmax: fx.Node) -> list[Callable[[Tensor], Tensor] | None]:
    """Operations from a softmax to the product; None stands for the quantizer."""
    found: list[Callable[[Tensor], Tensor] | None] = []
    (node,) = softmax.users
    while node.target not in PRODUCTS:
        if node.op == "call_module":
            found.append(None)
        else:
            found.append(lambda x, n=node: n.target(x, *n.args[1:]))
        (node,) = node.users
    return found


@pytest.mark.parametrize("bits", ["W8A8", "W4A4"])
def test_students_with_logarithmic_codes(bits: str, tmp_path: Path) -> None:
    teacher = graph_of("transformer")
    scheme = compose_recipe("noise", bits=bits, overrides={"scheme.softmax": "log2"}).scheme
    assert scheme.bits == bits and scheme.softmax == "log2"
    student, quantizers = attach(teacher, scheme)
    fixed = {m: float(m.scale) for m in student.modules() if isinstance(m, ActivationQuantizer)}
    settled = [m for m, scale in fixed.items() if scale == scale]
    assert len(settled) == 2
    calibrate(student, [images(16)], Calibration(num_images=16), settled=settled)
    assert all(float(m.scale) == fixed[m] for m in settled)
    assert same(chained(student, split(teacher.graph), images(3)), outputs(student, images(3)))
    wanted, got = outputs(teacher, images(16))[0], outputs(student, images(16))[0]
    noise = float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))
    assert noise > (25 if bits == "W8A8" else 3)
    file = tmp_path / "student.safetensors"
    file.write_bytes(student_to_bytes(student))
    assert same(outputs(student_from_file(file), images(3)), outputs(student, images(3)))


def test_the_scheme_refuses_other_softmaxes() -> None:
    assert "log2" in message(lambda: Scheme(softmax="log3"))
    with pytest.raises(UsageError, match="uniform"):
        compose_recipe("noise", bits="W8A8", placement="engine", overrides={"scheme.softmax": "log2"})
    assert softmax_before(next(iter(graph_of("gated").graph.nodes))) is None


@pytest.mark.parametrize("softmax", ["uniform", "log2"])
def test_both_kinds_of_codes_are_exported(softmax: str, tmp_path: Path) -> None:
    """`export_onnx` refuses a file that computes something else than the student."""
    pytest.importorskip("onnxruntime")
    teacher = Teacher(network("transformer"), input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    for bits in ("W8A8", "W4A4"):
        run = quantize(
            teacher,
            recipe="given-nearest",
            bits=bits,
            budget="quick",
            images=images(16),
            overrides={"scheme.softmax": softmax, "norm_equalization": "on"},
        )
        export = export_onnx(run, tmp_path / f"{bits}.onnx")
        assert export.verification.agreement_with_run >= 90


class Windows(nn.Module):
    """Attention in windows of an image that is rolled, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.qkv = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8), nn.Linear(8, 24)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        y = self.norm(x).roll((-2, -1), (1, 2))
        y = y.reshape(-1, 2, 4, 2, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 8)
        query, key, value = self.qkv(y).chunk(3, -1)
        y = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        y = y.reshape(-1, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 8)
        return self.head((x + y.roll((2, 1), (1, 2))).mean((1, 2)))  # type: ignore[no-any-return]


def test_rolled_windows(tmp_path: Path) -> None:
    """The whole path; the LayerNorm's channels can be scaled through the roll and the windows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = Teacher(Windows(), input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    graph = capture(teacher.module, SIZE)
    assert len(norm_layers(graph.graph)) == 1 and len(attention_patches(graph.graph)) == 1
    overrides = {"synthesis.num_images": 8, "synthesis.batch_size": 8, "synthesis.steps": 3}
    learning = {"reconstruction.steps": 2, "norm_equalization": "on", "num_holdout": 2}
    run = quantize(
        teacher, recipe="psaq_vit", bits="W4A8", budget="paper", overrides={**overrides, **learning}
    )
    pytest.importorskip("onnxruntime")
    assert export_onnx(run, tmp_path / "windows.onnx").verification.agreement_with_run == 100
