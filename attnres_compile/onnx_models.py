"""Plan and convert ONNX models in memory; `checkpoint/onnx.py` has the files around it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from onnx import helper, numpy_helper

from attnres_compile.call_shapes import CallShapes
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import (
    AlreadyConvertedError,
    ConfigError,
    InputError,
    MismatchError,
    in_words,
)
from attnres_compile.passes.dataflow import Dataflow
from attnres_compile.passes.find_streams import find_streams
from attnres_compile.passes.graph_values import ModuleCall, module_calls, module_path, source_line
from attnres_compile.passes.identify_additions import identify_additions
from attnres_compile.passes.normalise_onnx import FUSED_NORMS, MICROSOFT, normalise_onnx
from attnres_compile.passes.onnx_graphs import all_nodes, main_opset, subgraphs
from attnres_compile.passes.onnx_mix import (
    DOMAIN,
    DOMAIN_VERSION,
    OLDEST_IR,
    OLDEST_OPSET,
    mix_function,
)
from attnres_compile.passes.onnx_values import OnnxValues, infer_values, input_shapes, label
from attnres_compile.passes.onnx_view import DTYPES, OnnxView, module_path_of, view_onnx
from attnres_compile.passes.rewrite_onnx import SiteNames, rewrite_onnx
from attnres_compile.passes.rewrite_residuals import MixLayout
from attnres_compile.passes.streams import Refusal, ResidualStream
from attnres_compile.planning import Owners, plan_of_graph
from attnres_compile.plans import ConversionPlan, PlannedStream
from attnres_compile.stream_plans import stream_dtype

ELEMENTS = {dtype: element for element, dtype in DTYPES.items()}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class OnnxAnalysis:
    """What converting an ONNX model would do, and what is needed to do it.

    Attributes:
        model: the model in normal form; the plan is about this one.
        view: its main graph.
        plan: the streams that will be converted, and the refusals.
    """

    model: onnx.ModelProto
    view: OnnxView
    plan: ConversionPlan


def analyse_model(
    model: onnx.ModelProto,
    name: str,
    config: AttnResConfig,
    small: Mapping[str, Any],
    shapes: Shapes,
) -> OnnxAnalysis:
    """Finds the residual streams of an ONNX model and plans their conversion.

    Args:
        model: it is not changed; weights may lie in other files.
        name: for messages.
        config: the options.
        small: initialisers of at most `LARGEST_CONSTANT` numbers, by name.
        shapes: of inputs; the others get small sizes for their dynamic axes.

    Raises:
        AlreadyConvertedError: the model has mixes.
        InputError: the sizes do not go together, or the operators are of too old a version.
        ConfigError: the options do not fit the model's streams.
    """
    if any(node.domain == DOMAIN for node in all_nodes(model.graph)):
        raise AlreadyConvertedError(
            f"{name} has Attention Residuals already; 'inspect' shows them, 'strip' removes them."
        )
    normal = normalise_onnx(_upgraded(model, name))
    sizes = input_shapes(normal, shapes)
    values = infer_values(normal, sizes, small)
    if config.delta_sources or config.sites is not None:
        raise ConfigError(
            "delta_sources and sites are not there for ONNX files; convert the PyTorch model with "
            "them and export it: attnres_compile.save(converted, 'model.onnx')."
        )
    view = view_onnx(normal.graph, values)
    plan = plan_of_graph(view.graph, name, _size(normal), config, _owners)
    refusals = [*plan.refusals, *_fused(normal.graph), *_unknown(normal.graph, values)]
    refusals += _in_bodies(normal.graph, values)
    inputs = _described(normal, sizes)
    plan = dataclasses.replace(plan, refusals=tuple(refusals), inputs=inputs)
    return OnnxAnalysis(normal, view, plan)


def convert_model(analysis: OnnxAnalysis) -> onnx.ModelProto:
    """The model with mixes in the place of its residual additions, and new initialisers.

    Raises:
        NothingToConvertError: no residual stream can be converted.
        MismatchError: the rewrite made a model that is none; please report it.
    """
    plan = analysis.plan
    plan.require_streams()
    converted = onnx.ModelProto()
    converted.CopyFrom(analysis.model)
    graph = converted.graph
    arities = rewrite_onnx(graph, analysis.view, _found_again(analysis))
    for stream in plan.streams:
        graph.initializer.extend(_new_initialisers(stream))
    opset = main_opset(converted)
    converted.functions.extend(
        mix_function(sources, gain=plan.config.key_gain, opset=opset) for sources in sorted(arities)
    )
    converted.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    converted.ir_version = max(converted.ir_version, OLDEST_IR)
    return converted


def inline_mixes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model without functions, for runtimes that know none."""
    inlined = onnx.inliner.inline_local_functions(model)
    kept = [each for each in inlined.opset_import if each.domain != DOMAIN]
    del inlined.opset_import[:]
    inlined.opset_import.extend(kept)
    return inlined


def _upgraded(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model with operators of a version that the mixes can be written in."""
    version = main_opset(model)
    if version >= OLDEST_OPSET:
        return model
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer):
        raise InputError(
            f"{name} uses operators of version {version}, and mixes need {OLDEST_OPSET}: export it "
            "anew with that version, since weights in other files keep it from being converted."
        )
    try:
        upgraded = onnx.version_converter.convert_version(model, OLDEST_OPSET)
    except Exception as error:  # the converter raises whatever it meets
        raise InputError(
            f"{name} uses operators of version {version}; mixes need {OLDEST_OPSET}, to which ONNX "
            f"does not convert it: {in_words(error)}"
        ) from error
    return upgraded


def _owners(streams: Sequence[ResidualStream], _: Dataflow) -> Owners:
    """The innermost module around all additions of a stream; ordinals count in the whole graph."""
    owners = {}
    for stream in streams:
        calls = [[c.path for c in module_calls(a.node)] for a in stream.additions]
        shared = [level[0] for level in zip(*calls, strict=False) if len(set(level)) == 1]
        owners[id(stream)] = ModuleCall(shared[-1] if shared else "", "")
    return owners


def _found_again(
    analysis: OnnxAnalysis,
) -> dict[str, tuple[ResidualStream, MixLayout, SiteNames]]:
    """The planned streams as they stand in the graph, by name."""
    found = find_streams(analysis.view.graph).streams
    identities = identify_additions(found)
    by_additions = {tuple(identities[a.node] for a in s.additions): s for s in found}
    streams = {}
    for stream in analysis.plan.streams:
        key = tuple((a.module_path, a.ordinal) for a in stream.additions)
        if key not in by_additions:
            raise MismatchError(f"stream {stream.name!r} is not in the graph it was planned in.")
        parameters: SiteNames = {
            site.state: (site.query_name, site.gain_name)
            for site in stream.sites
            if site.query_name is not None
        }
        layout = stream.mix_layout(analysis.plan.config)
        streams[stream.name] = (by_additions[key], layout, parameters)
    return streams


def _new_initialisers(stream: PlannedStream) -> list[onnx.TensorProto]:
    element = ELEMENTS[stream_dtype(stream)]
    dtype = helper.tensor_dtype_to_np_dtype(element)
    tensors = []
    for site in stream.sites:
        for name, value in ((site.query_name, 0), (site.gain_name, 1)):
            if name is not None:
                numbers = np.full(stream.width, value).astype(dtype)
                tensors.append(numpy_helper.from_array(numbers, name))
    return tensors


def _in_bodies(graph: onnx.GraphProto, values: OnnxValues) -> list[Refusal]:
    """Residual streams in the bodies of If and Loop, which are left as they are."""
    refusals = []
    for node in graph.node:
        for _, body in subgraphs(node):
            for stream in find_streams(view_onnx(body, values).graph).streams:
                refusals += [
                    Refusal(
                        "inside-body",
                        f"the stream is inside the body of {label(node)} ({node.op_type}), which "
                        "may run once, often or never; only the main graph is converted",
                        module_path(addition.node),
                        source_line(addition.node),
                    )
                    for addition in stream.additions
                ]
            refusals += _in_bodies(body, values)
    return refusals


def _fused(graph: onnx.GraphProto) -> list[Refusal]:
    """Norms with a residual addition inside that the normal form could not take apart."""
    return [
        Refusal(
            "fused-addition",
            f"the residual addition is fused into {node.op_type}, whose statistics are used too; "
            "export the model without that fusion",
            module_path_of(node),
            label(node),
        )
        for node in graph.node
        if node.op_type in FUSED_NORMS and node.domain == MICROSOFT
    ]


def _unknown(graph: onnx.GraphProto, values: OnnxValues) -> list[Refusal]:
    """Additions of which not even the shape is known; the first says after which operator."""
    made_by = {output: node for node in graph.node for output in node.output}
    refusals = []
    for node in graph.node:
        lacking = [name for name in node.input if name and name not in values.types]
        if node.op_type == "Add" and lacking:
            cause = _first_unknown(lacking[0], made_by, values)
            refusals.append(
                Refusal(
                    "unknown-shape",
                    f"the shape of its operand is unknown, since ONNX infers none for {cause}",
                    module_path_of(node),
                    label(node),
                )
            )
    return refusals


def _first_unknown(name: str, made_by: Mapping[str, onnx.NodeProto], values: OnnxValues) -> str:
    node = made_by.get(name)
    while node is not None:
        earlier = [i for i in node.input if i in made_by and i not in values.types]
        if not earlier:
            return f"{label(node)} ({node.op_type})"
        node = made_by[earlier[0]]
    return f"the input {name}"


def _size(model: onnx.ModelProto) -> int:
    """Numbers in the floating weights."""
    constants = [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute]
    tensors = [*model.graph.initializer, *constants]
    floating = [
        t for t in tensors if t.data_type in DTYPES and DTYPES[t.data_type].is_floating_point
    ]
    return sum(math.prod(tensor.dims) for tensor in floating)


def _described(model: onnx.ModelProto, sizes: Shapes) -> CallShapes:
    """The inputs' shapes as `describe_call` writes them."""
    types = {each.name: each.type.tensor_type.elem_type for each in model.graph.input}
    described = {
        name: {"shape": list(shape), "dtype": str(DTYPES.get(types[name], "none"))[6:], "below": 2}
        for name, shape in sizes.items()
    }
    return {"args": [], "kwargs": described}
