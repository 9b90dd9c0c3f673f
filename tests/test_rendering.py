"""Plans and reports as text: golden text, the numbers in it, and two widths."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile import AttnResConfig, ConversionPlan
from attnres_compile.passes.classify_readers import Reader
from attnres_compile.passes.streams import Refusal
from attnres_compile.plans import PlannedAddition, PlannedStream, Site, Sublayer
from attnres_compile.rendering import to_text
from handwritten_models import GPTBlock, TokenModel

PLAN_AT_100 = """\
Decoder: 24 residual additions in 1 stream, 6,144 new parameters (+0.614%)
Options: num_blocks=8, aggregate='sum', key_gain=True, eps=1e-06, delta_sources=False

Stream model.layers
  owner             model
  root              model.embedding
  depth             24 residual additions in 24 sublayers of 12 layers
  width             128 channels in the last dimension, bfloat16
  blocks            8: 7 x 2 + 10 sublayers = 7 x 1 + 5 layers
  sites             25, 24 of them with a query and a key gain
  new parameters    6,144
  inference memory  2,048 more bytes per token in flight
  training memory   7,424 more bytes per token kept for backward
  readers           25 scale-invariant norms

Not converted
  4  post-norm: the carrier passes a norm
     - 3 x model.tail.*.out, first: model.tail.0.out, tail.py:10
     - the model itself, tail.py:20"""


def test_a_plan_is_a_table_of_its_streams_and_refusals() -> None:
    refusals = [
        *(
            Refusal("post-norm", "the carrier passes a norm", f"model.tail.{i}.out", "tail.py:10")
            for i in range(3)
        ),
        Refusal("post-norm", "the carrier passes a norm", "", "tail.py:20"),
    ]
    plan = make_plan(make_stream(), refusals=tuple(refusals), num_blocks=8)

    assert to_text(plan) == PLAN_AT_100
    assert str(plan) == PLAN_AT_100


@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_longer_than_the_width(width: int) -> None:
    reason = "a sentence that explains at some length why this addition cannot be converted"
    refusals = (Refusal("kind", reason, "a.rather.long.path.of.modules.0.attention", "file.py:1"),)
    readers = tuple(Reader(f"model.layers.{i}.mixer", "linear", False, "f.py:1") for i in range(9))
    stream = make_stream(last_readers=readers)

    lines = to_text(make_plan(stream, refusals=refusals, aggregate="mean"), width).splitlines()

    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)


def test_text_has_no_colour_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")

    assert "\x1b" not in str(make_plan(make_stream()))


def test_readers_that_are_no_norms_are_named() -> None:
    others = tuple(Reader(f"blocks.{i}.mixer", "linear", False, "f.py:1") for i in range(12))
    output = Reader("", "output", False, "")

    text = joined(make_plan(make_stream(last_readers=(*others, output))))

    assert (
        "24 scale-invariant norms, 13 other: blocks.*.mixer (linear) x 12, the model's output"
        in text
    )
    assert "do not see the same function" not in text


def test_the_mean_form_says_which_readers_see_another_function() -> None:
    plan = make_plan(make_stream(last_readers=(Reader("head", "linear", False, ""),)))
    mean = dataclasses.replace(plan, config=AttnResConfig(aggregate="mean"))

    assert (
        '24 scale-invariant norms, 1 other: head (linear). With aggregate="mean" this 1 does not '
        'see the same function as before; aggregate="sum" is lossless for every reader'
    ) in joined(mean)
    assert "as before" not in joined(plan)


def test_blocks_inside_layers_are_said_to_split_them() -> None:
    text = to_text(make_plan(make_stream(blocks=(1, 1, 22))))

    assert "blocks            3: 2 x 1 + 22 sublayers; layers are split between blocks" in text


def test_a_plan_without_streams_says_so() -> None:
    text = to_text(make_plan())

    assert text.splitlines()[0] == "Decoder: nothing to convert"
    assert "Stream" not in text


@pytest.mark.parametrize(
    ("dtype", "inference", "training"),
    [
        # 8 block sums; 24 partial sums, and 2 statistics for each of 160 sources:
        # 2 * (2 + ... + 8) of the sites in the first seven blocks, 10 * 9 in the last
        ("float32", 8 * 128 * 4, 24 * 128 * 4 + 4 * 2 * 160),
        ("float64", 8 * 128 * 8, 24 * 128 * 8 + 8 * 2 * 160),
        ("float16", 8 * 128 * 2, 24 * 128 * 2 + 4 * 2 * 160),
    ],
)
def test_memory_is_counted_in_bytes_of_the_dtype(dtype: str, inference: int, training: int) -> None:
    stream = dataclasses.replace(make_stream(), dtype=dtype)
    assert sum(site.num_sources for site in stream.sites if site.num_sources > 1) == 160

    text = to_text(make_plan(stream))

    assert f"{inference:,} more bytes per token in flight" in text
    assert f"{training:,} more bytes per token kept for backward" in text


def test_training_memory_is_what_autograd_keeps() -> None:
    model = TokenModel(*(GPTBlock(16, 2) for _ in range(3)), width=16)
    idx = torch.randint(96, (2, 5))
    converted = attnres_compile.convert(copy.deepcopy(model), (idx,))

    more = bytes_kept(converted, idx) - bytes_kept(model, idx)

    assert f"{more // idx.numel():,} more bytes per token kept" in str(converted.plan)


def bytes_kept(model: nn.Module, idx: Tensor) -> int:
    """Bytes of the distinct tensors, other than parameters, saved for the backward pass."""
    model(idx)  # compiles; the hooks below shall see no fake tensors
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(idx)
    del output
    return sum(
        tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in parameters
    )


def make_stream(
    *, blocks: tuple[int, ...] = (2,) * 7 + (10,), last_readers: tuple[Reader, ...] = ()
) -> PlannedStream:
    """A decoder of 12 layers with two sublayers each, 128 wide, in bfloat16."""
    sublayers = [
        Sublayer(
            (PlannedAddition(f"model.layers.{i // 2}", i % 2, "decoder.py:7"),),
            f"model.layers.{i // 2}",
        )
        for i in range(sum(blocks))
    ]
    ends = [sum(blocks[: i + 1]) for i in range(len(blocks))]
    starts = [0, *ends[:-1]]
    return PlannedStream(
        name="model.layers",
        owner="model",
        root="model.embedding",
        blocks=tuple(tuple(sublayers[a:b]) for a, b in zip(starts, ends, strict=True)),
        sites=tuple(make_site(depth, ends, last_readers) for depth in range(len(sublayers) + 1)),
        width=128,
        channel_dim=-1,
        dtype="bfloat16",
        methods=("forward",),
    )


def make_site(depth: int, ends: list[int], last_readers: tuple[Reader, ...]) -> Site:
    completed = sum(end <= depth for end in ends)
    partial = depth > 0 and depth not in ends
    name = f"before_{depth}"
    is_last = depth == ends[-1]
    return Site(
        name=name,
        depth=depth,
        state=depth,
        num_sources=1 + completed + partial,
        module_path=name,
        readers=(is_last and last_readers) or (Reader(name, "norm", True, "decoder.py:5"),),
        query_name=f"model.attnres.{name}.query" if depth else None,
        gain_name=f"model.attnres.{name}.gain" if depth else None,
    )


def make_plan(
    *streams: PlannedStream, refusals: tuple[Refusal, ...] = (), **options: object
) -> ConversionPlan:
    config = AttnResConfig(**options)  # type: ignore[arg-type]
    return ConversionPlan("Decoder", config, streams, refusals, base_parameters=1_000_000)


def joined(plan: ConversionPlan) -> str:
    """The text with all runs of blanks and line breaks made one blank."""
    return " ".join(str(plan).split())
