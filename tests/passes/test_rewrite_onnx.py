"""Rewritten ONNX graphs: lossless at zero queries, faithful with others, else untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from attnres_compile import AttnResConfig
from attnres_compile.kernels import reference
from attnres_compile.onnx_models import analyse_model, convert_model, inline_mixes
from attnres_compile.passes.onnx_graphs import read_values
from onnx_cases import TOKENS, WIDTH, Program, chain

FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE
Body = Callable[[Program, str], str]


def converted(model: onnx.ModelProto, **options: Any) -> tuple[onnx.ModelProto, Any]:
    """The conversion, strictly checked, and its plan."""
    small = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    before = model.SerializeToString()
    analysis = analyse_model(model, "model", AttnResConfig(**options), small, {})
    result = convert_model(analysis)
    onnx.checker.check_model(result, full_check=True)
    assert model.SerializeToString() == before
    return result, analysis.plan


def run(model: onnx.ModelProto, x: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    outputs: Any = session.run(None, {"x": x.numpy()})
    return [torch.from_numpy(np.array(value)) for value in outputs]


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 5, WIDTH, dtype=torch.float64).to(dtype)


def randomize(model: onnx.ModelProto) -> dict[str, Tensor]:
    """Random queries and gains; the same as tensors."""
    values = {}
    for tensor in model.graph.initializer:
        if not tensor.name.endswith((".query", ".gain")):
            continue
        value = torch.randn(tensor.dims[0], dtype=torch.float64)
        if tensor.name.endswith(".gain"):
            value = 1 + 0.3 * value
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensor.CopyFrom(numpy_helper.from_array(value.numpy().astype(dtype), tensor.name))
        values[tensor.name] = torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
    return values


def mix(sources: list[Tensor], values: dict[str, Tensor], name: str) -> Tensor:
    query, gain = values[f"{name}.query"], values[f"{name}.gain"]
    return reference.mix(sources, query, gain, eps=1e-6, aggregate="sum")


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    """In float64 but for the eps of norm and mix, which are float32 attributes."""
    assert actual.shape == expected.shape
    return bool(torch.allclose(actual, expected, rtol=tolerance, atol=tolerance))


def test_four_layers_in_two_blocks() -> None:
    model = chain(4, WIDTH, element=DOUBLE)
    result, _ = converted(model, num_blocks=2)
    x = tokens()
    assert close(run(result, x)[0], run(model, x)[0])

    values = randomize(result)
    weights = {
        t.name: torch.from_numpy(np.array(numpy_helper.to_array(t)))
        for t in model.graph.initializer
    }

    def branch(h: Tensor, layer: int) -> Tensor:
        return F.layer_norm(h, (WIDTH,)) @ weights[f"layers.{layer}.weight"]

    v0 = branch(x, 0)
    v1 = branch(mix([x, v0], values, "attnres.before_layers_1_norm"), 1)
    v2 = branch(mix([x, v0 + v1], values, "attnres.before_layers_2_norm"), 2)
    v3 = branch(mix([x, v0 + v1, v2], values, "attnres.before_layers_3_norm"), 3)
    expected = F.layer_norm(mix([x, v0 + v1, v2 + v3], values, "attnres.before_norm"), (WIDTH,))
    assert close(run(result, x)[0], expected)
    assert not close(run(model, x)[0], expected, 1e-2)
    assert close(run(inline_mixes(result), x)[0], expected)


def test_only_additions_change() -> None:
    model = chain(3)
    model.graph.value_info.append(helper.make_tensor_value_info("x1", FLOAT, TOKENS))
    model.metadata_props.add(key="mine", value="kept")
    result, plan = converted(model)
    assert result.graph.input == model.graph.input
    assert result.graph.output == model.graph.output
    assert result.graph.value_info == model.graph.value_info
    assert result.metadata_props == model.metadata_props
    kinds = [node.op_type for node in result.graph.node]
    layer = ["LayerNormalization", "MatMul"]
    assert kinds == [*layer, "Mix2", *layer, "Mix3", *layer, "Mix4", "LayerNormalization"]
    assert [f.name for f in result.functions] == ["Mix2", "Mix3", "Mix4"]
    mixes = [node for node in result.graph.node if node.domain == "attnres"]
    assert [list(node.output) for node in mixes] == [["x0"], ["x1"], ["x2"]]
    assert list(mixes[2].input)[:4] == ["x", "b0", "b1", "b2"]
    assert [n.name for n in mixes] == [
        s.query_name.removesuffix(".query") for s in plan.streams[0].sites[1:]
    ]
    others = [node for node in result.graph.node if node.domain != "attnres"]
    assert others == [node for node in model.graph.node if node.op_type != "Add"]
    new = result.graph.initializer[len(model.graph.initializer) :]
    assert [(t.name.rpartition(".")[2], list(t.dims)) for t in new] == [
        ("query", [WIDTH]),
        ("gain", [WIDTH]),
    ] * 3


def parallel(p: Program, x: str) -> str:
    """Two branches of one read: a sublayer of two additions."""
    normed = p.norm(x)
    return p("Add", p("Add", x, p.f(normed)), p("Tanh", p.f(normed)))


def asked_for_its_shape(p: Program, x: str) -> str:
    """A state that nobody reads, but for its shape."""
    normed = p.norm(x)
    state = p("Add", x, p.f(normed))
    ones = p("Expand", p.number(1.0), p("Shape", state))
    return p("Add", state, p("Mul", p.f(normed), ones))


def flattened(p: Program, x: str) -> str:
    """The stream goes on as a matrix, as after a Gemm, and comes back."""
    normed = p.norm(x)
    rows = p("Reshape", x, p.ints(-1, WIDTH))
    rows = p("Add", rows, p("Reshape", p.f(normed), p.ints(-1, WIDTH)))
    rows = p("Add", rows, p.f(p.norm(rows)))
    return p("Reshape", rows, p("Shape", x))


def biased(p: Program, x: str) -> str:
    """A mid-chain bias belongs to the partial sum."""
    state = p("Add", p("Add", x, p.f(p.norm(x))), p.weight(WIDTH))
    return p("Sub", state, p.f(p.norm(state)))


def bias_alone(p: Program, x: str) -> str:
    """A bias between two reads is a partial sum by itself, of a shape of its own."""
    state = p("Add", x, p.f(p.norm(x)))
    moved = p("Add", state, p.weight(WIDTH))
    return p("Add", moved, p("Add", p.f(p.norm(state)), p.f(p.norm(moved))))


def copied(p: Program, x: str) -> str:
    """Copies that only lead to the next addition."""
    for _ in range(3):
        x = p("Add", p("Identity", x), p.f(p.norm(x)))
    return x


def matrix_halfway(p: Program, x: str) -> str:
    """The second half of the stream is a matrix."""
    state = p("Add", x, p.f(p.norm(x)))
    rows = p("Reshape", state, p.ints(-1, WIDTH))
    rows = p("Add", rows, p.f(p.norm(rows)))
    return p("Reshape", rows, p("Shape", x))


def in_turns(p: Program, x: str) -> str:
    """Channels last where a matrix is multiplied, and first where a convolution is added."""
    for _ in range(2):
        state = p("Add", x, p.f(p.norm(x)))
        turned = p("Transpose", state, perm=[0, 2, 1])
        turned = p("Add", turned, p("Conv", turned, p.weight(WIDTH, WIDTH, 1)))
        x = p("Transpose", turned, perm=[0, 2, 1])
    return x


def outer_skip(p: Program, x: str) -> str:
    """Two blocks of two sublayers each, inside a stream of their own."""
    for _ in range(2):
        y = x
        for _ in range(2):
            y = p("Add", y, p.f(p.norm(y)))
        x = p("Add", x, p.f(p("Relu", p.f(y))))
    return x


def in_a_body(p: Program, x: str) -> str:
    """A state that is read inside the body of an If."""
    state = p("Add", x, p.f(p.norm(x)))
    info = helper.make_tensor_value_info
    bodies = [
        helper.make_graph(
            [helper.make_node(kind, [state], [kind])], kind, [], [info(kind, FLOAT, None)]
        )
        for kind in ("Tanh", "Relu")
    ]
    total = p("ReduceSum", x, keepdims=0)
    branch = p("If", p("Greater", total, p.number(0)), then_branch=bodies[0], else_branch=bodies[1])
    return p("Add", state, p.f(branch))


@pytest.mark.parametrize(
    ("body", "sublayers"),
    [
        (lambda p, x: parallel(p, parallel(p, x)), [2]),
        (lambda p, x: asked_for_its_shape(p, asked_for_its_shape(p, x)), [2]),
        (flattened, [2]),
        (biased, [2]),
        (bias_alone, [2]),
        (copied, [3]),
        (matrix_halfway, [2]),
        (in_turns, [4]),
        (outer_skip, [2, 2, 2]),
        (in_a_body, [2]),
    ],
)
def test_lossless_whatever_the_spelling(body: Body, sublayers: list[int]) -> None:
    program = Program()
    model = program.model(program("Identity", program.norm(body(program, "x"))))
    result, plan = converted(model)
    assert sorted(len(stream.sublayers) for stream in plan.streams) == sublayers
    x = tokens(torch.float32)
    assert close(run(result, x)[0], run(model, x)[0], 1e-5)
    randomize(result)
    assert not close(run(result, x)[0], run(model, x)[0], 1e-2)
    read = read_values(result.graph)
    assert all(read & set(node.output) for node in result.graph.node)
    assert {t.name for t in result.graph.initializer} <= read


def test_two_layouts_by_hand() -> None:
    """The sources are tokens; what reads channels first gets their mix transposed."""
    program = Program()
    model = program.model(program("Identity", in_turns(program, "x")))
    result, plan = converted(model, num_blocks="full")
    values = randomize(result)
    weights = [torch.from_numpy(numpy_helper.to_array(t).copy()) for t in program.weights]
    names = [str(s.query_name).removesuffix(".query") for s in plan.streams[0].sites[1:]]
    x = tokens(torch.float32)
    sources = [x]
    for scale, matrix, kernel in (weights[:3], weights[3:]):
        h = x if len(sources) == 1 else mix(sources, values, names[len(sources) - 2])
        sources.append((F.layer_norm(h, (WIDTH,)) * scale) @ matrix)
        h = mix(sources, values, names[len(sources) - 2])
        sources.append(F.conv1d(h.transpose(1, 2), kernel).transpose(1, 2))
    assert close(run(result, x)[0], mix(sources, values, names[-1]), 1e-4)


def test_parallel_branches_are_one_source() -> None:
    program = Program()
    model = program.model(program.norm(parallel(program, parallel(program, "x"))))
    result, plan = converted(model)
    assert [[s.num_sources for s in t.sites] for t in plan.streams] == [[1, 2, 3]]
    values = randomize(result)
    x = tokens(torch.float32)
    w = [torch.from_numpy(np.array(numpy_helper.to_array(t))) for t in program.weights]

    def sublayer(h: Tensor, scale: Tensor, f: Tensor, g: Tensor) -> Tensor:
        normed = F.layer_norm(h, (WIDTH,), scale)
        return normed @ f + torch.tanh(normed @ g)

    v0 = sublayer(x, *w[:3])
    names = [site.query_name.removesuffix(".query") for site in plan.streams[0].sites[1:]]
    v1 = sublayer(mix([x, v0], values, names[0]), *w[3:6])
    expected = F.layer_norm(mix([x, v0, v1], values, names[1]), (WIDTH,), w[6])
    assert close(run(result, x)[0], expected, 1e-5)


def test_matrix_states_are_mixed_in_the_roots_layout() -> None:
    program = Program()
    model = program.model(program.norm(flattened(program, "x")))
    result, plan = converted(model)
    values = randomize(result)
    x = tokens(torch.float32)
    w = [torch.from_numpy(np.array(numpy_helper.to_array(t))) for t in program.weights]
    by_name = {t.name: value for t, value in zip(program.weights, w, strict=True)}
    floats = [value for value in by_name.values() if value.is_floating_point()]
    v0 = F.layer_norm(x, (WIDTH,), floats[0]) @ floats[1]
    names = [site.query_name.removesuffix(".query") for site in plan.streams[0].sites[1:]]
    h = mix([x, v0], values, names[0])
    v1 = F.layer_norm(h, (WIDTH,), floats[2]) @ floats[3]
    expected = F.layer_norm(mix([x, v0, v1], values, names[1]), (WIDTH,), floats[4])
    assert close(run(result, x)[0], expected, 1e-5)


def test_a_stream_that_widens_keeps_the_state_dtype() -> None:
    """Half precision to float32 between two additions, as in a carrier kept in float32."""
    program = Program()
    half = program("Cast", "x", to=TensorProto.FLOAT16)
    state = program("Add", half, program.f(half, np.float16))
    wide = program("Cast", state, to=FLOAT)
    state = program("Add", wide, program.f(program("Tanh", wide)))
    model = program.model(program("Identity", state))
    result, plan = converted(model)
    assert [len(stream.sublayers) for stream in plan.streams] == [2]
    x = tokens(torch.float32)
    assert close(run(result, x)[0], run(model, x)[0], 2e-3)


def test_a_state_that_is_an_output_keeps_its_name() -> None:
    model = chain(3)
    model.graph.output.append(helper.make_tensor_value_info("x1", FLOAT, TOKENS))
    result, _ = converted(model)
    assert [output.name for output in result.graph.output] == ["y", "x1"]
    x = tokens(torch.float32)
    for actual, expected in zip(run(result, x), run(model, x), strict=True):
        assert close(actual, expected, 1e-5)
    randomize(result)
    assert not close(run(result, x)[1], run(model, x)[1], 1e-2)


def test_new_names_are_apart_from_those_of_the_graph() -> None:
    model = chain(4)
    names = {"n1": "attnres/layers/partial", "b1": "attnres/layers/partial_2"}
    for node in model.graph.node:
        for values in (node.input, node.output):
            for position, name in enumerate(values):
                values[position] = names.get(name, name)
    result, _ = converted(model, num_blocks=2)
    made = [name for node in result.graph.node for name in node.output]
    assert len(made) == len(set(made))
    x = tokens(torch.float32)
    assert close(run(result, x)[0], run(model, x)[0], 1e-5)
