"""What zsq makes of the families of timm: of each of its files the smallest network, up to 13 M parameters.

    python benchmarks/families.py --rows runs/families/rows.jsonl --write benchmarks/results/families.md
    python benchmarks/families.py resnet10t cait_xxs24_224

Weights are random, layers that start as zeros too, and BatchNorms saw noise. A row: layers and units of the
captured graph, the signal-to-noise ratio of the logits of the student at W8A8 (ranges from 8 images of noise,
rounded to nearest) and its ONNX file, checked in ONNX Runtime. Finished rows are kept.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from random_networks import import_timm, show_noise
from torch import nn

import zsq
from zsq.errors import ZsqError
from zsq.export.onnx import export_onnx
from zsq.files import write_atomic
from zsq.graph.blocks import split
from zsq.graph.capture import capture
from zsq.graph.nodes import activations, weight_node
from zsq.recover.losses import energies, signal_to_noise

NETWORKS = """
    test_nfnet test_convnext test_mambaout test_byobnet test_vit starnet_s050 test_coatnet lcnet_035
    test_vit_relpos dla46x_c mnasnet_small mobilevit_xxs repghostnet_050 edgenext_xx_small
    ghostnet_050 ese_vovnet19b_slim_dw efficientvit_m0 efficientvit_b0 regnetx_002 cspnext_tiny
    iformer_t fasternet_t0 cs3darknet_focus_s xcit_nano_12_p8_224 lcnetv2_small swiftformer_xs
    efficientformerv2_s0 inception_next_atto fastvit_t8 pvt_v2_b0 rexnet_100 hardcorenas_b
    hgnetv2_b0 pit_ti_224 repvit_m1 resnet10t cpubone_nano tiny_vit_5m_224 coat_tiny
    eva02_tiny_patch14_224 convit_tiny deit_tiny_patch16_224 gmlp_ti16_224 efficientvim_m1 shvit_s1
    vit_tiny_r_s16_p8_224 crossvit_tiny_240 densenet121 levit_128s halonet_h1 dpn48b resnest14d
    visformer_tiny csatv2 resnetv2_18 legacy_seresnet18 hrnet_w18_small poolformerv2_s12
    efficientformer_l1 skresnet18 gcvit_xxtiny cait_xxs24_224 lowformer_b0
""".split()
SIDE = 128  # pixels, unless the network has a fixed size
NUM_IMAGES = 8


def random_network(timm: Any, name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network whose signal does not die, and the size of its images."""
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, num_classes=100)
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    size: tuple[int, int, int] = (3, SIDE, SIDE)
    try:
        network.eval()(torch.zeros(1, *size))
    except (AssertionError, RuntimeError):
        channels, height, width = timm.get_pretrained_cfg(name).input_size
        size = channels, height, width
    return show_noise(network, torch.randn(NUM_IMAGES, *size)).requires_grad_(False), size


def row(timm: Any, name: str) -> dict[str, Any]:
    """What there is to say of a network; "error" where zsq refuses it, or its file."""
    network, size = random_network(timm, name)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in network.parameters())}
    try:
        graph = capture(network, size).graph
        found["layers"] = sum(weight_node(n) is not None for n in activations(graph))
        found["units"] = len(split(graph))
        images = torch.randn(NUM_IMAGES, *size)
        half = (0.5, 0.5, 0.5)
        teacher = zsq.Teacher(network, input_size=size, mean=half, std=half, name=name)
        settings = {"num_holdout": 0}
        run = zsq.quantize(teacher, recipe="given-nearest", bits="W8A8", images=images, overrides=settings)
        with torch.no_grad():
            found["decibels"] = signal_to_noise(*energies(network(images), run.student(images)))
        with tempfile.TemporaryDirectory() as folder:
            export = export_onnx(run, Path(folder) / "student.onnx")
        found["bytes"] = export.size
        found["relative_error"] = max(d.relative_error for d in export.verification.optimized)
    except ZsqError as error:
        found["error"] = str(error)
    return found


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown."""
    whole = sum("error" not in row for row in rows.values())
    lines = [
        "# Families of timm",
        "",
        "<!-- written by benchmarks/families.py -->",
        "",
        "    python benchmarks/families.py --rows runs/families/rows.jsonl "
        "--write benchmarks/results/families.md",
        "",
        f"{whole} of {len(rows)} networks are quantized and exported: of each file of timm the smallest, "
        "where that has at most 13 M parameters. Random weights.",
        "",
        "| network | M parameters | layers | units | W8A8, dB | ONNX, MB | relative error of the file |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        numbers = [
            f"{row['parameters'] / 1e6:.1f}",
            *(str(row.get(key, "–")) for key in ("layers", "units")),
            f"{row['decibels']:.1f}" if "decibels" in row else "–",
            f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "–",
            f"{row['relative_error']:.0e}" if "relative_error" in row else "–",
        ]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    lines += ["", *(f"* {name}: {row['error']}" for name, row in rows.items() if "error" in row)]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", help="names of timm; the list in this file if none are given")
    parser.add_argument("--rows", type=Path, default=Path("runs/families/rows.jsonl"))
    parser.add_argument("--write", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args(arguments)
    timm = import_timm()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    lines = options.rows.read_text().splitlines() if options.rows.exists() else []
    rows: dict[str, dict[str, Any]] = {line["network"]: line for line in map(json.loads, lines)}
    wanted = options.networks or NETWORKS
    for name in wanted:
        if name not in rows:
            rows[name] = {"network": name, **row(timm, name)}
            with options.rows.open("a") as file:
                file.write(json.dumps(rows[name]) + "\n")
            print(json.dumps(rows[name]), flush=True)
        if options.write is not None:
            write_atomic(options.write, table({n: rows[n] for n in wanted if n in rows}).encode())


if __name__ == "__main__":
    main()
