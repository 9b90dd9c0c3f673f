"""Train the small Llama of ``examples/stdlib-llama`` on Python's own documentation.

    python examples/train_stdlib_llama.py --out examples/stdlib-llama

Seeded: the same Python, PyTorch and machine give the same weights. Progress goes to the terminal;
the loss curve goes to standard output and, with the figures of the run, to ``training.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from stdlib_text import (
    END_OF_TEXT,
    consecutive_windows,
    documentation,
    encode,
    mean_loss,
    perplexity,
    random_batches,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

DEFAULT_OUT = Path(__file__).parent / "stdlib-llama"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the text."""

    steps: int
    vocab_size: int = 1024
    layers: int = 16
    width: int = 64
    mlp_width: int = 176
    heads: int = 4
    batch_size: int = 4
    length: int = 256
    peak_lr: float = 3e-3
    final_lr: float = 3e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    recipe = Recipe(steps=args.steps)
    torch.manual_seed(recipe.seed)
    if not sys.stderr.isatty():
        disable_progress_bar()

    text = documentation()
    tokenizer = train_tokenizer(text.train, vocab_size=recipe.vocab_size)
    train_stream = encode(tokenizer, text.train)
    held_out = consecutive_windows(encode(tokenizer, text.held_out), length=recipe.length)
    print(f"{len(train_stream):,} training tokens, {held_out.numel():,} held-out tokens")

    model = new_model(recipe, tokenizer)
    started = time.monotonic()
    curve = train(model, train_stream, held_out, recipe, eval_every=args.eval_every)
    seconds = time.monotonic() - started

    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "train_tokens": len(train_stream),
        "held_out_tokens": held_out.numel(),
        "seconds": round(seconds),
        "curve": curve,
    }
    save(model, tokenizer, record, args.out)
    report_saved(args.out, train_stream, held_out, recipe)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps (%(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="checkpoint directory")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--eval-every", type=int, default=100, metavar="STEPS")
    args = parser.parse_args(argv)
    if min(args.steps, args.threads, args.eval_every) < 1:
        parser.error("--steps, --threads and --eval-every must be positive")
    return args


def train_tokenizer(documents: Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, so that any text at all can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    end_of_text = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=2 * recipe.length,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    model = LlamaForCausalLM(config)
    # Only generation pads: in the model's own config it would freeze the end-of-text embedding.
    model.generation_config.pad_token_id = end_of_text
    return model


def train(
    model: LlamaForCausalLM,
    stream: Tensor,
    held_out: Tensor,
    recipe: Recipe,
    *,
    eval_every: int,
) -> list[dict[str, float]]:
    """Train in place; returns the loss curve, one point per ``eval_every`` steps."""
    optimizer = torch.optim.AdamW(_groups(model, recipe.weight_decay), betas=(0.9, 0.95))
    batches = random_batches(
        stream,
        num_batches=recipe.steps,
        batch_size=recipe.batch_size,
        length=recipe.length,
        seed=recipe.seed,
    )
    curve: list[dict[str, float]] = []
    recent: list[float] = []
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("training", total=recipe.steps)
        for step, batch in enumerate(batches, start=1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            recent.append(_update(model, batch, optimizer))
            progress.advance(task)
            if step % eval_every and step != recipe.steps:
                continue
            curve.append(_point(step, recent, mean_loss(model, held_out)))
            recent.clear()
    return curve


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]


def _update(model: LlamaForCausalLM, batch: Tensor, optimizer: torch.optim.Optimizer) -> float:
    model.train()
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from the peak to the final learning rate."""
    if step <= recipe.warmup_steps:
        return recipe.peak_lr * step / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return recipe.final_lr + (recipe.peak_lr - recipe.final_lr) * cosine


def _point(step: int, recent: Sequence[float], held_out_loss: float) -> dict[str, float]:
    train_loss = sum(recent) / len(recent)
    print(f"step {step:5d}  train {train_loss:.4f}  held out {held_out_loss:.4f}", flush=True)
    return {
        "step": step,
        "train_loss": round(train_loss, 4),
        "held_out_loss": round(held_out_loss, 4),
    }


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, object],
    out: Path,
) -> None:
    """Write the checkpoint beside ``out``, then move it there whole."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        fresh = Path(scratch) / "fresh"
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        for file in fresh.iterdir():
            file.chmod(0o644)
        (fresh / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        if out.exists():
            os.replace(out, Path(scratch) / "previous")
        shutil.move(fresh, out)


def report_saved(out: Path, stream: Tensor, held_out: Tensor, recipe: Recipe) -> None:
    """Judge what was written, as a reader of it will load it."""
    model = LlamaForCausalLM.from_pretrained(out)
    (train_sample,) = random_batches(
        stream, num_batches=1, batch_size=len(held_out), length=recipe.length, seed=recipe.seed
    )
    weights = out / "model.safetensors"
    print(f"{out.name}: {weights.stat().st_size / 1e6:.2f} MB")
    for name, windows in (("training", train_sample), ("held-out", held_out)):
        loss = mean_loss(model, windows)
        print(f"{name} text: loss {loss:.4f}, perplexity {perplexity(loss):.2f}")


if __name__ == "__main__":
    raise SystemExit(main())
