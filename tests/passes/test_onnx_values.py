"""Types and small constants of ONNX values, for one choice of sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attnres_compile.errors import CheckpointError, InputError
from attnres_compile.passes.onnx_values import (
    OnnxValues,
    TensorType,
    infer_values,
    input_shapes,
)
from onnx_cases import model_of

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def const(name: str, value: Any) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.asarray(value), name)
    return helper.make_node("Constant", [], [name], value=tensor)


def infer(nodes: list[onnx.NodeProto], shape: list[int | str], **sizes: Any) -> OnnxValues:
    model = model_of(nodes, {"x": (FLOAT, shape)}, {"y": (FLOAT, [])}, [])
    return infer_values(model, input_shapes(model, sizes), {})


def test_shape_computed_from_shapes() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        const("zero", 0),
        const("last", [4, -1]),
        const("first", [0]),
        helper.make_node("Gather", ["s", "zero"], ["b"]),
        helper.make_node("Unsqueeze", ["b", "first"], ["b1"]),
        helper.make_node("Concat", ["b1", "last"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    values = infer(nodes, ["batch", 6, 8])
    assert values.types["y"] == TensorType(FLOAT, (2, 4, 12))
    assert values.constants["target"].tolist() == [2, 4, -1]
    assert "y" not in values.constants  # it depends on what x holds
    assert infer(nodes, ["batch", 6, 8], x=(5, 6, 8)).types["y"].shape == (5, 4, 12)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"ids": (INT64, ["batch", "seq"])}, {"ids": (2, 8)}),
        ({"image": (FLOAT, ["n", 3, "h", "w"])}, {"image": (2, 3, 64, 64)}),
        ({"sound": (FLOAT, ["n", "samples"])}, {"sound": (2, 512)}),
        # one name, one size, whoever has it first
        (
            {"image": (FLOAT, ["n", 3, "h", "h"]), "boxes": (FLOAT, ["n", "h", 4])},
            {"image": (2, 3, 64, 64), "boxes": (2, 64, 4)},
        ),
        (
            {
                "ids": (INT64, ["batch", "seq"]),
                "past": (FLOAT, ["batch", 4, "past", 8]),
                "mask": (INT64, ["batch", "past + seq"]),
            },
            {"ids": (2, 8), "past": (2, 4, 64, 8), "mask": (2, 72)},
        ),
    ],
)
def test_small_sizes_for_dynamic_axes(shapes: Any, expected: dict[str, Any]) -> None:
    assert input_shapes(model_of([], shapes, {}, []), {}) == expected


def test_given_sizes_name_those_of_other_inputs() -> None:
    shapes: Any = {"ids": (INT64, ["batch", "seq"]), "mask": (INT64, ["batch", "seq"])}
    model = model_of([], shapes, {}, [])
    assert input_shapes(model, {"mask": (3, 5)}) == {"ids": (3, 5), "mask": (3, 5)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"z": (1, 2)}, "no input 'z'; it has x"),
        ({"x": (1, 2)}, "has 3 dimensions, not 2"),
        ({"x": (1, 2, 9)}, "has the size 8 where 9 was given"),
    ],
)
def test_sizes_that_the_input_does_not_take(given: Any, words: str) -> None:
    model = model_of([], {"x": (FLOAT, ["batch", "seq", 8])}, {}, [])
    with pytest.raises(InputError, match=words):
        input_shapes(model, given)


def test_input_without_a_rank() -> None:
    model = model_of([], {"x": (FLOAT, [1])}, {}, [])
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(InputError, match="no tensor of known rank; say its shape"):
        input_shapes(model, {})
    assert input_shapes(model, {"x": (2, 2)}) == {"x": (2, 2)}


def test_sizes_that_do_not_fit_name_the_node() -> None:
    nodes = [
        const("target", [3, 5]),
        helper.make_node("Reshape", ["x", "target"], ["y"], name="/stem/Reshape"),
    ]
    with pytest.raises(InputError, match=r"at /stem/Reshape \(Reshape\): .*--input-shape"):
        infer(nodes, ["batch", 8])
    assert infer(nodes, ["batch", 5], x=(3, 5)).types["y"].shape == (3, 5)


def branches(condition: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Five rows if the condition holds, and a shape that x does not have otherwise."""
    five = helper.make_graph(
        [const("t5", [5, -1]), helper.make_node("Reshape", ["x", "t5"], ["r5"])],
        "five",
        [],
        [helper.make_empty_tensor_value_info("r5")],
    )
    three = helper.make_graph(
        [const("t3", [3, 7]), helper.make_node("Reshape", ["x", "t3"], ["r3"])],
        "three",
        [],
        [helper.make_empty_tensor_value_info("r3")],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=five, else_branch=three)
    return [condition, node]


def test_the_branch_that_is_taken_counts() -> None:
    assert infer(branches(const("c", True)), [5, 4]).types["y"].shape == (5, 4)
    with pytest.raises(InputError, match="do not fit"):
        infer(branches(const("c", False)), [5, 4])


def test_a_branch_that_depends_on_values_leaves_the_type_open() -> None:
    compared = helper.make_node("IsNaN", ["x"], ["c"])
    assert "y" not in infer(branches(compared), [5, 4]).types


def test_runtime_operators_without_inference() -> None:
    nodes = [
        helper.make_node("FastGelu", ["x"], ["y"], domain="com.microsoft"),
        helper.make_node("Mystery", ["x"], ["z"], domain="com.example"),
    ]
    values = infer(nodes, [2, 8])
    assert values.types["y"] == TensorType(FLOAT, (2, 8))
    assert "z" not in values.types


def test_random_numbers_are_no_constants() -> None:
    nodes = [
        const("shape", [4]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("RandomNormalLike", ["zeros"], ["noise"]),
    ]
    values = infer(nodes, [2, 8])
    assert values.constants["zeros"].tolist() == [0, 0, 0, 0]
    assert values.types["noise"].shape == (4,)
    assert "noise" not in values.constants


def test_constant_that_holds_less_than_it_says() -> None:
    broken = const("c", np.zeros(4, np.float32))
    broken.attribute[0].t.raw_data = b"\0" * 3
    with pytest.raises(CheckpointError, match="'c' does not hold what its shape says"):
        infer([broken], [2, 8])
