"""What is said of ONNX models that cannot be converted, or only in part."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attnres_compile import AttnResConfig
from attnres_compile.errors import AlreadyConvertedError, ConfigError, InputError
from attnres_compile.onnx_models import OnnxAnalysis, analyse_model, convert_model, inline_mixes
from onnx_cases import WIDTH, Program, chain
from passes_helpers import refused_kinds

FLOAT = TensorProto.FLOAT


def analyse(model: onnx.ModelProto, **options: Any) -> OnnxAnalysis:
    small = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return analyse_model(model, "model.onnx", AttnResConfig(**options), small, {})


def pre_norm(p: Program, x: str) -> str:
    return p("Add", x, p.f(p.norm(x)))


def in_body(p: Program, x: str, steps: int) -> str:
    """Residual additions in one branch of an If on the values of x."""
    before = len(p.nodes)
    y = x
    for _ in range(steps):
        y = pre_norm(p, y)
    inner = p.nodes[before:]
    del p.nodes[before:]
    info = helper.make_tensor_value_info
    body = helper.make_graph(inner, "body", [], [info(y, FLOAT, None)])
    other = [helper.make_node("Identity", [x], ["same"])]
    rest = helper.make_graph(other, "rest", [], [info("same", FLOAT, None)])
    positive = p("Greater", p("ReduceSum", x, keepdims=0), p.number(0))
    return p("If", positive, then_branch=body, else_branch=rest)


def test_streams_in_bodies_are_listed() -> None:
    program = Program()
    model = program.model(in_body(program, "x", 2))
    plan = analyse(model).plan
    assert plan.streams == ()
    assert refused_kinds(plan.refusals) == ["inside-body", "inside-body"]
    assert "inside the body of /node/" in plan.refusals[0].reason
    assert plan.refusals[0].source.startswith("/node/")


def test_bodies_without_a_stream_are_not_mentioned() -> None:
    program = Program()
    model = program.model(in_body(program, pre_norm(program, pre_norm(program, "x")), 0))
    plan = analyse(model).plan
    assert [len(stream.additions) for stream in plan.streams] == [2]
    assert plan.refusals == ()


def test_additions_after_an_operator_without_a_shape_are_listed() -> None:
    program = Program()
    x = program("Mystery", pre_norm(program, pre_norm(program, "x")), domain="com.example")
    model = program.model(pre_norm(program, x))
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    plan = analyse(model).plan
    assert [len(stream.additions) for stream in plan.streams] == [2]
    assert refused_kinds(plan.refusals) == ["unknown-shape"]
    assert "ONNX infers none for /node/" in plan.refusals[0].reason
    # its shape may be declared
    model.graph.value_info.append(helper.make_tensor_value_info(x, FLOAT, [2, 8, WIDTH]))
    assert refused_kinds(analyse(model).plan.refusals) == ["single-sublayer"]


def test_fused_norm_with_statistics_is_listed() -> None:
    program = Program()
    x = pre_norm(program, pre_norm(program, "x"))
    model = program.model("y")
    model.graph.node.append(
        helper.make_node(
            "SkipLayerNormalization",
            [x, program.f(x), program.norm(x)],
            ["y", "mean"],
            name="fused",
            domain="com.microsoft",
        )
    )
    plan = analyse(model).plan
    assert ("fused-addition", "fused") in [(r.kind, r.source) for r in plan.refusals]
    model.graph.node[-1].output[1] = ""
    assert "fused-addition" not in refused_kinds(analyse(model).plan.refusals)


def test_converted_twice() -> None:
    once = convert_model(analyse(chain()))
    with pytest.raises(AlreadyConvertedError, match=r"model\.onnx has Attention Residuals already"):
        analyse(once)
    # Without functions there is nothing to recognise, and no residual addition either.
    assert analyse(inline_mixes(once)).plan.streams == ()


def test_model_of_an_old_version() -> None:
    program = Program()
    model = program.model(pre_norm(program, "x"))
    model.opset_import[0].version = 16  # which has no LayerNormalization
    with pytest.raises(InputError, match="operators of version 16; mixes need 17"):
        analyse(model)


def test_options_are_checked_against_the_model() -> None:
    with pytest.raises(ConfigError, match="num_blocks=9 is more than the 3 sublayers"):
        analyse(chain(3), num_blocks=9)
    with pytest.raises(ConfigError, match="matches no residual stream of this model; it has: laye"):
        analyse(chain(3), streams=("decoder",))


@pytest.mark.parametrize("options", [{"delta_sources": True}, {"sites": ("*",)}])
def test_options_that_are_for_pytorch_models(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not there for ONNX files; convert the PyTorch model"):
        analyse(chain(3), **options)


def test_two_streams_of_one_module_have_parameters_of_their_own() -> None:
    program = Program()
    x = pre_norm(program, pre_norm(program, "x"))
    x = program("Relu", program.f(x))
    model = program.model(pre_norm(program, pre_norm(program, x)))
    analysis = analyse(model)
    names = [s.query_name for t in analysis.plan.streams for s in t.sites if s.query_name]
    assert len(names) == len(set(names)) == 4
    converted = convert_model(analysis)
    assert [t.name for t in converted.graph.initializer if t.name.endswith(".query")] == names
