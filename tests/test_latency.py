"""Timing a network in the engine beside its float32 form."""

import json
from pathlib import Path

import pytest
import torch
from quantization_networks import Residual, images
from test_cli import call, refusal
from test_run import finished_run
from tiny_networks import message

for package in ("onnx", "onnx_ir", "onnxruntime", "ml_dtypes"):
    pytest.importorskip(package)

from test_export import captured, run_of  # noqa: E402
from test_export_engine import engine_run  # noqa: E402

from zsq.export.engine import EngineModel  # noqa: E402
from zsq.export.latency import bench_latency, in_float, take_turns  # noqa: E402
from zsq.export.lower import lower, serialized  # noqa: E402
from zsq.export.prepare import prepared  # noqa: E402
from zsq.export.targets import TARGETS  # noqa: E402
from zsq.quant.attach import attach  # noqa: E402
from zsq.quant.scheme import parse_bits  # noqa: E402

Capture = pytest.CaptureFixture[str]


def test_the_float_network_is_the_teacher_with_the_weights_of_the_codes() -> None:
    target, run = TARGETS["onnxruntime"], engine_run(captured(Residual), "W8A8", images(16))
    student, _ = prepared(run.student, run.images, target)
    model = EngineModel(serialized(lower(in_float(student), target, (8,), {})), threads=1)
    weights_only, _ = attach(captured(Residual), parse_bits("W8"))
    wanted, got = captured(Residual)(images(5)), model(images(5))
    assert float((got - wanted).norm() / wanted.norm()) < 0.02  # 8-bit weights, float activations
    assert not torch.equal(got, weights_only(images(5)))  # those of this run, whose ranges are symmetric


def test_calls_take_turns() -> None:
    order: list[str] = []
    times = take_turns([lambda: order.append("a"), lambda: order.append("b")], 4)
    assert "".join(order[-8:]) == "abbaabba" and [len(t) for t in times] == [4, 4]
    assert min(map(min, times)) > 0


def test_what_is_reported() -> None:
    found = bench_latency(engine_run(captured(Residual), "W8A8", images(4)), batch_size=6, rounds=5)
    assert found.fused.complete and found.fused.convolutions == 6 and found.fused.additions == 2
    low, high = found.ratio_quartiles
    assert 0 < low <= found.ratio <= high and found.float_ms > 0 < found.quantized_ms
    assert (found.batch_size, found.threads, found.rounds, found.container) == (6, 1, 5, "int8")
    research = bench_latency(run_of(captured(Residual), "W8A8", images(4)), rounds=1)
    assert not research.fused.complete and research.ratio_quartiles[0] == research.ratio
    assert "at least 1" in message(lambda: bench_latency(finished_run(), rounds=0))


def test_command(tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    assert "not a run folder" in refusal(capsys, "bench-latency", run)
    finished_run().save(run)
    before = sorted(run.iterdir())
    code, out, _ = call(capsys, "bench-latency", run, "--rounds", "2")
    assert code == 0 and "times as fast" in out and "--placement engine" in out
    code, out, _ = call(capsys, "bench-latency", run, "--rounds", "2", "--batch-size", "3", "--json")
    found = json.loads(out)
    assert code == 0 and found["batch_size"] == 3 and found["ratio"] > 0 and found["fused"]["additions"] == 0
    assert sorted(run.iterdir()) == sorted([*before, run / "latency.jsonl"])
    kept = [json.loads(line) for line in (run / "latency.jsonl").read_text().splitlines()]
    assert [row["batch_size"] for row in kept] == [1, 3] and kept[1]["ratio"] == found["ratio"]
    assert all(row["date"].endswith("Z") for row in kept)
