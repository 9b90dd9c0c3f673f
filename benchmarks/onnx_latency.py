"""What mixes cost in ONNX Runtime: latency of converted models over that of their originals.

    python benchmarks/onnx_latency.py --out benchmarks/results/onnx_latency.json

Three models of everyday shapes with random weights (which change no timing) are exported, converted
and run on the CPU, the original and the conversions in turn, so that a busy moment meets them all.
"functions" and "inline" differ in the file alone: ONNX Runtime inlines functions when it loads one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnres_compile import AttnResConfig
from attnres_compile.bench.machine import machine
from attnres_compile.checkpoint.onnx import convert_file

Inputs = dict[str, Tensor]
WARM_UP = 3


class Logits(nn.Module):
    """A causal language model of the transformers library, by position and without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output: Any = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        )
        return output.logits


def llama() -> tuple[nn.Module, Inputs]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        attn_implementation="eager",
    )
    ids = torch.randint(0, 8192, (1, 128))
    return Logits(LlamaForCausalLM(config)), {"input_ids": ids, "attention_mask": ids * 0 + 1}


def vit() -> tuple[nn.Module, Inputs]:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768
    )
    return model, {"x": torch.randn(1, 3, 224, 224)}


def mobilenet() -> tuple[nn.Module, Inputs]:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(), {"x": torch.randn(1, 3, 224, 224)}


MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "Llama, 8 layers of 512, 128 tokens": llama,
    "ViT-Ti/16, 197 tokens": vit,
    "MobileNetV2, 224 x 224": mobilenet,
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A file to run."""

    name: str
    path: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--runs", type=int, default=30, help="per variant (default 30)")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime (default 1)")
    args = parser.parse_args()
    before, rows = machine(), []
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, inputs = make()
        with tempfile.TemporaryDirectory() as folder:
            variants, sites = write_variants(model.eval(), inputs, Path(folder))
            times = measured(variants, inputs, args.runs, args.threads)
        rows += summarised(name, sites, times)
        for row in rows[-len(variants) :]:
            print(json.dumps(row), file=sys.stderr)
    results = {
        "what": "seconds per run in ONNX Runtime on the CPU, batch of one",
        "threads": args.threads,
        "runs": args.runs,
        "machine": before,
        "rows": rows,
    }
    text = json.dumps(results, indent=2) + "\n"
    if args.out is not None:
        args.out.write_text(text)
    else:
        print(text, end="")


def write_variants(
    model: nn.Module, inputs: Inputs, folder: Path
) -> tuple[list[Variant], dict[str, int]]:
    """The original and its conversions; and how many sites with a query each has."""
    plain = folder / "original.onnx"
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            str(plain),
            dynamo=False,
            input_names=list(inputs),
            opset_version=17,
        )
    variants, sites = [Variant("original", plain)], {"original": 0}
    for name, config, inline in (
        ("functions", AttnResConfig(), False),
        ("inline", AttnResConfig(), True),
        ("functions, 2 blocks", AttnResConfig(num_blocks=2), False),
    ):
        path = folder / f"{len(variants)}.onnx"
        plan = convert_file(plain, path, config, {}, inline=inline)
        variants.append(Variant(name, path))
        sites[name] = sum(s.query_name is not None for t in plan.streams for s in t.sites)
    return variants, sites


def measured(
    variants: list[Variant], inputs: Inputs, runs: int, threads: int
) -> dict[str, list[float]]:
    """Seconds of every run of every variant, taken in turn."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    sessions = {
        variant.name: onnxruntime.InferenceSession(
            str(variant.path), options, providers=["CPUExecutionProvider"]
        )
        for variant in variants
    }
    feeds = {name: value.numpy() for name, value in inputs.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(WARM_UP + runs):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feeds)
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return times


def summarised(
    model: str, sites: dict[str, int], times: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Medians and quartiles; ratios are medians of the ratios of one turn."""
    rows = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["original"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "model": model,
                "variant": name,
                "sites": sites[name],
                "median_ms": round(1000 * statistics.median(seconds), 3),
                "ratio": round(middle, 3),
                "ratio_quartiles": [round(low, 3), round(high, 3)],
            }
        )
    return rows


if __name__ == "__main__":
    main()
