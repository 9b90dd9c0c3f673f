"""The analysis of ONNX graphs: what counts as a residual stream, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from attnres_compile.passes.classify_readers import channel_dimension, classify_readers
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.graph_values import module_path, source_line
from attnres_compile.passes.normalise_onnx import normalise_onnx
from attnres_compile.passes.onnx_values import infer_values, input_shapes
from attnres_compile.passes.onnx_view import OnnxView, module_calls_of, view_onnx
from attnres_compile.passes.streams import StreamAnalysis
from onnx_cases import TOKENS, WIDTH, Program, chain, model_of
from passes_helpers import depths, refused, site_depths

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
IMAGES: list[int | str] = ["batch", WIDTH, 6, 6]


Body = Callable[[Program, str], str]


def view(
    body: Body, shape: list[int | str] = TOKENS, element: int = FLOAT, opset: int = 17
) -> OnnxView:
    program = Program()
    result = body(program, "x")
    output = {result: (element, [0] * len(shape))}
    model = model_of(program.nodes, {"x": (element, shape)}, {}, program.weights, opset)
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in output)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    normal = normalise_onnx(model)
    small = {tensor.name: numpy_helper.to_array(tensor) for tensor in program.weights}
    return view_onnx(normal.graph, infer_values(normal, input_shapes(normal, {}), small))


def analyse(body: Body, *args: Any, **kwargs: Any) -> StreamAnalysis:
    return find_streams(view(body, *args, **kwargs).graph)


def twice(step: Body) -> Body:
    return lambda p, x: step(p, step(p, x))


def pre_norm(p: Program, x: str) -> str:
    return p("Add", x, p.f(p.norm(x)))


def test_chain() -> None:
    model = chain(3)
    small = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    made = view_onnx(model.graph, infer_values(model, input_shapes(model, {}), small))
    (stream,) = find_streams(made.graph).streams
    assert [made.names[a.node] for a in stream.additions] == ["x0", "x1", "x2"]
    assert [source_line(a.node) for a in stream.additions] == [f"/layers.{i}/Add" for i in range(3)]
    assert [module_path(a.node) for a in stream.additions] == [f"layers.{i}" for i in range(3)]
    assert channel_dimension(stream) == -1


@pytest.mark.parametrize(
    "step",
    [
        pre_norm,
        lambda p, x: p("Add", p.f(x), x),
        lambda p, x: p("Sub", x, p.f(x)),
        lambda p, x: p("Sum", x, p.f(x)),
        lambda p, x: p("Add", p("Identity", x), p.f(x)),
        lambda p, x: p("Add", p("Dropout", x), p.f(x)),  # drops nothing in inference
        lambda p, x: p("Cast", p("Cast", p("Add", x, p.f(x)), to=11), to=1),
        lambda p, x: p("Transpose", p("Transpose", pre_norm(p, x), perm=[1, 0, 2]), perm=[1, 0, 2]),
        lambda p, x: p("Add", p("Add", x, p.f(x)), p.weight(WIDTH)),  # absorbed
    ],
)
def test_residual_additions(step: Body) -> None:
    assert depths(analyse(twice(step))) == [2]


@pytest.mark.parametrize(
    "step",
    [
        lambda p, x: p("Add", x, p("Tanh", x)),  # element-wise, as in GELU's polynomial
        lambda p, x: p("Add", x, p("Mul", p("Pow", x, p.number(3.0)), p.number(0.044))),
        lambda p, x: p.f(p("Add", p.f(x), p.weight(WIDTH))),  # a bias
        lambda p, x: p("Add", p.f(x), p.f(p.f(x))),  # two branches and no skip
        lambda p, x: p("Mul", x, p.f(x)),
    ],
)
def test_no_residual_additions(step: Body) -> None:
    analysis = analyse(twice(step))
    assert depths(analysis) == []
    assert refused(analysis) == []


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (lambda p, x: p.norm(p("Add", x, p.f(x))), "post-norm"),
        (lambda p, x: p("Relu", p("Add", x, p.f(x))), "post-activation"),
        (lambda p, x: p("Mul", p("Add", x, p.f(x)), p.number(0.9)), "scaled-carrier"),
        (lambda p, x: p("Sub", p.f(x), x), "subtracted-skip"),
        (lambda p, x: p("Add", p("Mul", p.f(x), x), p.f(x)), "gated-skip"),
        (lambda p, x: p("Clip", p("Add", x, p.f(x)), p.number(-9), p.number(9)), "clamped-carrier"),
        (lambda p, x: p("Cast", p("Cast", p("Add", x, p.f(x)), to=10), to=1), "narrowing-cast"),
    ],
)
def test_refusals(step: Body, kind: str) -> None:
    analysis = analyse(twice(step))
    assert depths(analysis) == []
    assert refused(analysis) == [kind, kind]


def test_gemm_is_a_branch() -> None:
    def step(p: Program, x: str) -> str:
        return p("Add", x, p("Gemm", x, p.weight(WIDTH, WIDTH), p.weight(WIDTH)))

    assert depths(analyse(twice(step), ["batch", WIDTH])) == [2]


def test_gemm_with_a_residual_bias_is_refused() -> None:
    def body(p: Program, x: str) -> str:
        x = p("Gemm", p.f(x), p.weight(WIDTH, WIDTH), x)
        return p("Gemm", p.f(x), p.weight(WIDTH, WIDTH), x)

    assert refused(analyse(body, ["batch", WIDTH])) == ["fused-addition", "fused-addition"]


def rms(p: Program, x: str, *, reciprocal: bool = False) -> str:
    square = p("Pow", x, p.number(2.0))
    mean = p("ReduceMean", square, axes=[-1], keepdims=1)
    root = p("Sqrt", p("Add", mean, p.number(1e-6)))
    if reciprocal:
        return p("Mul", x, p("Reciprocal", root))
    return p("Mul", p("Mul", x, p("Div", p.number(1.0), root)), p.weight(WIDTH))


def layer_norm(p: Program, x: str) -> str:
    centred = p("Sub", x, p("ReduceMean", x, axes=[-1], keepdims=1))
    variance = p("ReduceMean", p("Mul", centred, centred), axes=[-1], keepdims=1)
    normed = p("Div", centred, p("Sqrt", p("Add", variance, p.number(1e-5))))
    return p("Add", p("Mul", normed, p.weight(WIDTH)), p.weight(WIDTH))


@pytest.mark.parametrize(
    "norm",
    [
        Program.norm,
        rms,
        lambda p, x: rms(p, x, reciprocal=True),
        layer_norm,
        lambda p, x: p("SimplifiedLayerNormalization", x, p.weight(WIDTH)),
        lambda p, x: p("Cast", rms(p, p("Cast", x, to=FLOAT)), to=FLOAT),
    ],
)
def test_norms_in_every_spelling_are_scale_invariant(norm: Body) -> None:
    analysis = analyse(twice(lambda p, x: p("Add", x, p.f(norm(p, x)))))
    assert site_depths(analysis) == [(0, 1, 2)]
    states = analysis.streams[0].states
    read = [[reader.scale_invariant for reader in classify_readers(state)] for state in states]
    assert read == [[True], [True], [False]]  # the last is the model's output
    assert channel_dimension(analysis.streams[0]) == -1


@pytest.mark.parametrize(
    "norm",
    [
        lambda p, x: p("Tanh", x),
        lambda p, x: p("Div", x, p("Sqrt", p("Add", p.f(x), p.number(1e-6)))),
        lambda p, x: rms(p, p("Add", x, p.number(1.0))),
    ],
)
def test_what_is_no_norm_is_not_scale_invariant(norm: Body) -> None:
    analysis = analyse(twice(lambda p, x: p("Add", x, p.f(norm(p, x)))))
    state = analysis.streams[0].states[1]
    readers = classify_readers(state)
    assert readers
    assert not any(reader.scale_invariant for reader in readers)


def test_convolutions_have_the_channel_first() -> None:
    def step(p: Program, x: str) -> str:
        kernel = p.weight(WIDTH, WIDTH, 3, 3)
        return p("Add", x, p("Conv", x, kernel, pads=[1, 1, 1, 1]))

    analysis = analyse(twice(step), IMAGES)
    assert depths(analysis) == [2]
    assert channel_dimension(analysis.streams[0]) == 1


def test_half_precision_stream_with_a_float_norm() -> None:
    def step(p: Program, x: str) -> str:
        normed = p("Cast", rms(p, p("Cast", x, to=FLOAT)), to=HALF)
        return p("Add", x, p.f(normed, np.float16))

    analysis = analyse(twice(step), element=HALF)
    assert depths(analysis) == [2]
    assert refused(analysis) == []


def test_fused_skip_norms_of_a_runtime() -> None:
    def body(p: Program, x: str) -> str:
        for _ in range(3):
            p.nodes.append(
                helper.make_node(
                    "SkipLayerNormalization",
                    [x, p.f(p.norm(x)), p.weight(WIDTH)],
                    [f"n{len(p.nodes)}", "", "", f"s{len(p.nodes)}"],
                    domain="com.microsoft",
                )
            )
            x = p.nodes[-1].output[3]
        return p.nodes[-1].output[0]

    assert depths(analyse(body)) == [3]


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("/model/layers.0/mlp/MatMul", ["model", "model.layers.0", "model.layers.0.mlp"]),
        ("/features/features.2/conv/conv.0/Conv", ["features", "features.2", "features.2.conv"]),
        ("MatMul_12", []),
        ("", []),
    ],
)
def test_paths_from_names(name: str, paths: list[str]) -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["c"], name=name)
    found = [call.path for call in module_calls_of(node)]
    assert found[: len(paths)] == paths
    if name.startswith("/features"):
        assert found[-1] == "features.2.conv.0"


def test_paths_from_metadata() -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["c"], name="/wrong/MatMul")
    scopes = "['', 'model', 'model.layers', 'model.layers.3', 'linear']"
    classes = "['M', 'my.Model', 'torch.nn.modules.container.Sequential', 'my.Layer', 'aten']"
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    node.metadata_props.add(key="pkg.torch.onnx.class_hierarchy", value=classes)
    assert [call.path for call in module_calls_of(node)] == ["model", "model.layers.3"]
