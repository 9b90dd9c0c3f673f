"""How long a large checkpoint takes to convert, and in how much memory.

    python benchmarks/checkpoint_conversion.py --out benchmarks/results/checkpoint_conversion.json

The checkpoint has the shards of an 8-billion-parameter Llama in bfloat16: right headers, and data
of the right size that is sparse, so that it takes no disk. Converting never reads the numbers but
to hash them; the hashing is measured by itself too. Every run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}
SHARD_BYTES = 5_000_000_000
RUNS: dict[str, list[str]] = {
    "hard links, hashed": [],
    "hard links, hashes put off": ["--defer-hashes"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick look")
    parser.add_argument("--folder", type=Path, help="where to make the files (default: temporary)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "model"
        parameters = write_checkpoint(source, {**LLAMA_8B, "num_hidden_layers": args.layers})
        rows = [
            {"run": name, **measured("convert", source, Path(folder) / f"out{i}", options)}
            for i, (name, options) in enumerate(RUNS.items())
        ]
        rows.append(
            {
                "run": "strip",
                **measured("strip", Path(folder) / "out0", source.with_name("back"), []),
            }
        )
        size = sum(path.stat().st_size for path in source.iterdir())
    report = {
        "parameters": parameters,
        "bytes": size,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": _torch_version(),
        "runs": rows,
    }
    print(table(report))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


def write_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """Sparse shards with the tensors of the model that a config describes."""
    from attnres_compile.checkpoint.transformers_models import model_on_meta

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = model_on_meta(config, "config.json").state_dict()
    shards: list[dict[str, Any]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * 2
        if used + size > SHARD_BYTES and shards[-1]:
            shards.append({})
            used = 0
        entry = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [used, used + size]}
        shards[-1][name] = entry
        used += size
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, file))
        header = json.dumps(shard).encode()
        with (folder / file).open("wb") as writing:
            writing.write(struct.pack("<Q", len(header)) + header)
            writing.truncate(8 + len(header) + max(e["data_offsets"][1] for e in shard.values()))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(tensor.numel() for tensor in tensors.values())


def measured(verb: str, source: Path, output: Path, options: list[str]) -> dict[str, Any]:
    """Wall time, processor time and peak memory of one command, and the disk that it took."""
    code = "from attnres_compile.cli import run; run()"
    command = [sys.executable, "-c", code, verb, str(source), str(output), "--json", *options]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        complaints = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise SystemExit(complaints)
    own = [path for path in output.rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_mb": round(usage.ru_maxrss / 1000),
        "new_disk_mb": round(sum(path.stat().st_size for path in own) / 1e6, 1),
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['parameters']:,} parameters, {report['bytes'] / 1e9:.1f} GB",
        "",
        "| run | wall s | processor s | peak memory MB | new disk MB |",
        "|---|---|---|---|---|",
    ]
    for row in report["runs"]:
        lines.append(
            f"| {row['run']} | {row['seconds']} | {row['processor_seconds']} | "
            f"{row['peak_memory_mb']} | {row['new_disk_mb']} |"
        )
    return "\n".join(lines)


def _torch_version() -> str:
    import torch

    return torch.__version__.partition("+")[0]


if __name__ == "__main__":
    main()
