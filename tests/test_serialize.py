"""The graph as JSON: the same bits back, and nothing that a file brings is executed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_networks import NETWORKS, graph_of, images, outputs, same
from tiny_networks import message
from torch import fx, nn

from zsq.errors import JobError
from zsq.graph.serialize import graph_from_json, graph_to_json

Nodes = list[dict[str, Any]]


def described(name: str) -> Nodes:
    nodes: Nodes = json.loads(json.dumps(graph_to_json(graph_of(name).graph)))
    return nodes


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_gives_the_same_bits(name: str) -> None:
    graph = graph_of(name)
    rebuilt = graph_from_json(described(name), graph, "Rebuilt")
    assert graph_to_json(rebuilt.graph) == graph_to_json(graph.graph)
    for count in (1, 3):
        assert same(outputs(rebuilt, images(count)), outputs(graph, images(count)))


def test_keeps_infinity_and_kinds_of_numbers() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    filled = graph.call_function(torch.ops.aten.pad.default, (x, [1, 1], "constant", float("-inf")))
    options: dict[str, Any] = {
        "dtype": torch.float64,
        "device": torch.device("cpu"),
        "memory_format": torch.contiguous_format,
    }
    graph.output(graph.call_function(torch.ops.aten._to_copy.default, (filled,), options))
    rebuilt = graph_from_json(json.loads(json.dumps(graph_to_json(graph))), nn.Module(), "Rebuilt")
    result = rebuilt(torch.ones(1, 2))
    assert result.dtype == torch.float64 and result.tolist() == [[-float("inf"), 1, 1, -float("inf")]]


def test_refuses_to_write_other_operations() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.relu, (graph.placeholder("x"),)))
    with pytest.raises(JobError, match="outside PyTorch's ATen set"):
        graph_to_json(graph)
    graph = fx.Graph()
    unknown: Any = {"a": object()}
    graph.output(graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),), unknown))
    with pytest.raises(JobError, match="type object"):
        graph_to_json(graph)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "operator.call",
        "operator.attrgetter",
        "aten.__class__.mro",
        "aten.__init__.default",
        "aten.relu.__call__",
        "aten.relu.overloads",
        "aten.relu",
        "aten.relu.default.x",
        "aten.relu.no_such_overload",
        "aten.no_such_operation.default",
        "prims.relu.default",
        "aten.from_file.default",
        "aten.relu_.default",
        "aten.set_.source_Tensor",
        "",
        "relu",
        7,
        None,
        ["aten.relu.default"],
    ],
)
def test_refuses_functions_that_are_not_aten(target: object) -> None:
    nodes = described("linear")
    entry = next(n for n in nodes if n["op"] == "call_function")
    entry["target"] = target
    assert "damaged" in message(lambda: graph_from_json(nodes, graph_of("linear"), "X"))


HOSTILE = "__import__('pathlib').Path('{path}').write_text('x')"


@pytest.mark.parametrize("key", ["target", "name", "kwargs", "node", "string"])
def test_nothing_becomes_code(key: str, tmp_path: Path) -> None:
    code = HOSTILE.format(path=tmp_path / "written")
    nodes = described("linear")
    image, flatten = (next(n for n in nodes if n["op"] == op) for op in ("placeholder", "call_function"))
    if key == "target":
        image["target"] = f"x={code}"
    elif key == "name":
        image["name"] = f"x={code}"
    elif key == "kwargs":
        flatten["kwargs"] = {f"end_dim={code}, start_dim": 1}
    elif key == "node":
        flatten["args"][0] = {"node": code}
    elif key == "string":
        flatten["args"][1] = code
    for op in ("get_attr", "call_module", "placeholder"):
        changed = copy.deepcopy(nodes)
        next(n for n in changed if n["op"] == "get_attr").update(op=op, target=f"fc.weight if {code} else 1")
        message(lambda changed=changed: graph_from_json(changed, graph_of("linear"), "X"))  # type: ignore[misc]
    try:
        rebuilt = graph_from_json(nodes, graph_of("linear"), "X")
        rebuilt(images(1))
    except Exception as error:
        assert "damaged" in str(error) or key == "string"
    assert list(tmp_path.iterdir()) == []


def change(nodes: Nodes, index: int, **values: Any) -> Nodes:
    nodes[index].update(values)
    return nodes


def without(nodes: Nodes, index: int, key: str) -> Nodes:
    del nodes[index][key]
    return nodes


@pytest.mark.parametrize("key", ["op", "name", "target", "args", "kwargs"])
def test_refuses_missing_keys(key: str) -> None:
    nodes = without(described("linear"), 0, key)
    assert "damaged" in message(lambda: graph_from_json(nodes, graph_of("linear"), "X"))


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "values",
    [
        {"op": "call_method"},
        {"op": "root"},
        {"op": None},
        {"args": None},
        {"args": 3},
        {"args": [{"node": "not_there"}]},
        {"args": [{"node": ["x"]}]},
        {"args": [{"node": "x", "dtype": "float32"}]},
        {"args": [{}]},
        {"args": [{"dtype": "nn"}]},
        {"args": [{"dtype": "no_such_type"}]},
        {"args": [{"dtype": 3}]},
        {"args": [{"layout": "float32"}]},
        {"args": [{"device": "toaster"}]},
        {"args": [{"callable": "os.system"}]},
        {"args": [deep(100_000)]},
        {"kwargs": ["x"]},
        {"kwargs": {"import": 1}},
        {"op": "get_attr", "target": "fc.no_such_weight"},
        {"op": "get_attr", "target": "fc"},
        {"op": "get_attr", "target": "__class__.__init__"},
        {"op": "get_attr", "target": "forward.__globals__"},
        {"op": "call_module", "target": "no_such_module"},
        {"op": "call_module", "target": "fc.weight"},
        {"op": "placeholder", "target": "second"},
        {"op": "output", "args": []},
    ],
)
def test_refuses_damage(values: dict[str, Any]) -> None:
    nodes = described("linear")
    index = next(i for i, n in enumerate(nodes) if n["op"] == "call_function")
    changed = change(nodes, index, **values)
    assert "damaged" in message(lambda: graph_from_json(changed, graph_of("linear"), "X"))


def test_refuses_cycles_and_doubles() -> None:
    nodes = described("linear")
    calls = [i for i, n in enumerate(nodes) if n["op"] == "call_function"]
    cyclic = copy.deepcopy(nodes)
    cyclic[calls[0]]["args"][0] = {"node": cyclic[calls[1]]["name"]}
    itself = copy.deepcopy(nodes)
    itself[calls[0]]["args"][0] = {"node": itself[calls[0]]["name"]}
    twice = [*nodes[:-1], nodes[calls[0]], nodes[-1]]
    for changed in (
        cyclic,
        itself,
        twice,
        [*nodes, nodes[-1]],
        [*nodes, nodes[0]],
        nodes[:-1],
        nodes[1:],
        [],
    ):
        text = message(lambda changed=changed: graph_from_json(changed, graph_of("linear"), "X"))  # type: ignore[misc]
        assert "damaged" in text


@pytest.mark.parametrize("content", [None, 3, "text", {"nodes": []}, [None], ["text"], [[]], [3]])
def test_refuses_what_is_no_list_of_nodes(content: Any) -> None:
    assert "damaged" in message(lambda: graph_from_json(content, graph_of("linear"), "X"))
