"""The main job on a trained model: plan, convert, prove that nothing changed, then train on.

    python examples/demo.py --out .demo

The model is the small Llama of ``examples/stdlib-llama`` and the text is Python's documentation.
Ends with an error if the conversion is not lossless. Whether the converted model then learns faster
than the unconverted one is measured and reported, not promised.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from stdlib_text import (
    consecutive_windows,
    documentation,
    encode,
    mean_loss,
    perplexity,
    random_batches,
    window_losses,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

import attnres_compile

CHECKPOINT = Path(__file__).parent / "stdlib-llama"
LENGTH = 256
BATCH_SIZE = 4
PROMPT = 'The "for" statement is used to iterate over'
NEW_TOKENS = 48
LOSSLESS_TOLERANCE = 1e-5

LR = 3e-4  # Where the training of the checkpoint left off, so that neither model is shaken.
QUERY_LR = 3e-3  # Ten times the rest, for queries that start at zero and have a short run.
WARMUP_SHARE = 0.1
SEED = 1


@dataclass(frozen=True)
class Text:
    """What both models are trained and judged on."""

    tokenizer: PreTrainedTokenizerBase
    train: Tensor
    held_out: Tensor


@dataclass
class Contestant:
    """One of the two models that are trained on the same batches."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    step_seconds: list[float] = field(default_factory=list)
    held_out: dict[int, Tensor] = field(default_factory=dict)
    """Held-out loss of each window, by training step."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    if not sys.stderr.isatty():
        disable_progress_bar()
    # Enough for this width, and neither the core count nor other work on the machine matters then.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    console = Console()
    text, model = load(num_windows=16 if args.quick else 32)
    args.out.mkdir(parents=True, exist_ok=True)

    console.rule("1. What would be converted")
    plan = attnres_compile.plan(model, (), _example(text))
    print(plan)

    console.rule("2. Convert, and prove that the start is lossless")
    converted = convert(model, text, plan)
    show_perplexity(model, converted, text)
    show_verification(model, converted, text)
    show_generation(model, converted, text)

    console.rule("3. Train both on the same text")
    contestants = train_both(model, converted, text, steps=args.steps)
    console.print(comparison_table(contestants))
    console.print(verdict(contestants))

    console.rule("4. Where each site now looks")
    show_depth_attention(converted, text, args.out)
    save_losses(contestants, args.out)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, help="steps of continued training (80; quick: 8)")
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="every stage, as short as possible")
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = 8 if args.quick else 80
    if args.steps < 1:
        parser.error("--steps must be positive")
    return args


def load(*, num_windows: int) -> tuple[Text, nn.Module]:
    """The checkpoint in float32, and the documentation of the running Python as its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    documents = documentation()
    held_out = consecutive_windows(encode(tokenizer, documents.held_out), length=LENGTH)
    text = Text(tokenizer, encode(tokenizer, documents.train), held_out[:num_windows])
    num_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{CHECKPOINT.name}: {num_parameters:,} parameters; {len(text.train):,} training tokens, "
        f"{text.held_out.numel():,} held-out tokens\n"
    )
    return text, model


# The calls into the package that take more than a line.


def convert(model: nn.Module, text: Text, plan: attnres_compile.ConversionPlan) -> nn.Module:
    """A converted model that shares no parameter with ``model``, as it would without the copy."""
    return attnres_compile.convert(copy.deepcopy(model), (), _example(text), plan=plan)


def show_verification(model: nn.Module, converted: nn.Module, text: Text) -> None:
    report = attnres_compile.verify(model, converted, (), _example(text, with_labels=True))
    print(report)
    if not report.passed:
        raise SystemExit("Not lossless: the report above says which output or gradient differs.")


def query_groups(converted: nn.Module) -> list[dict[str, object]]:
    return attnres_compile.param_groups(converted, lr=LR, query_lr=QUERY_LR, weight_decay=0.0)


def show_depth_attention(converted: nn.Module, text: Text, out: Path) -> None:
    attention = attnres_compile.depth_attention(converted.eval(), (), _example(text))
    picture = out / "depth_attention.png"
    attention.plot(picture)
    print(f"Mean weight of every source at each of {len(attention.weights)} sites: {picture}")


def _example(text: Text, *, with_labels: bool = False) -> dict[str, Tensor]:
    batch = text.held_out[:2]
    if with_labels:
        return {"input_ids": batch, "labels": batch}
    return {"input_ids": batch}


# Proof that the conversion changed nothing.


def show_perplexity(model: nn.Module, converted: nn.Module, text: Text) -> None:
    before = perplexity(mean_loss(model, text.held_out))
    after = perplexity(mean_loss(converted, text.held_out))
    difference = abs(after / before - 1)
    print(
        f"Perplexity on held-out text: {before:.6f} before, {after:.6f} after "
        f"(relative difference {difference:.1e})\n"
    )
    if not difference <= LOSSLESS_TOLERANCE:
        raise SystemExit(f"Not lossless: the perplexity differs by more than {LOSSLESS_TOLERANCE}.")


def show_generation(model: nn.Module, converted: nn.Module, text: Text) -> None:
    before, after = (generate(each, text.tokenizer) for each in (model, converted))
    print(f"\nGreedy text of the model as it was:\n{_quote(before)}\n")
    if before != after:
        raise SystemExit(f"Not lossless: the converted model writes something else:\n{after}")
    print("The converted model writes the same, token for token.\n")


def generate(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    prompt = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return tokenizer.decode(output[0])


def _quote(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())


# Continued training of both models.


def train_both(
    model: nn.Module, converted: nn.Module, text: Text, *, steps: int
) -> list[Contestant]:
    """Train a copy of ``model``, and ``converted`` in place, on the same batches in one order."""
    plain = copy.deepcopy(model)
    contestants = [
        _contestant("unconverted", plain, [{"params": list(plain.parameters()), "lr": LR}], steps),
        _contestant("converted", converted, query_groups(converted), steps),
    ]
    batches = list(
        random_batches(
            text.train, num_batches=steps, batch_size=BATCH_SIZE, length=LENGTH, seed=SEED
        )
    )
    print(
        f"{steps} steps of {BATCH_SIZE} x {LENGTH} tokens that the checkpoint was trained on; "
        f"AdamW, learning rate {LR:g}, {QUERY_LR:g} for queries and gains\n"
    )
    checkpoints = _checkpoints(steps)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        for contestant in contestants:
            task = progress.add_task(contestant.name, total=steps)
            contestant.held_out[0] = window_losses(contestant.model, text.held_out)
            for step, batch in enumerate(batches, start=1):
                train_step(contestant, batch)
                progress.advance(task)
                if step in checkpoints:
                    contestant.held_out[step] = window_losses(contestant.model, text.held_out)
    return contestants


def _contestant(
    name: str, model: nn.Module, groups: Iterable[dict[str, object]], steps: int
) -> Contestant:
    # No weight decay for either: a short run is no place for it, and it must not differ.
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _lr_factor(done, steps))
    return Contestant(name, model, optimizer, schedule)


def _lr_factor(done: int, steps: int) -> float:
    """Linear up from zero, then linear down to a tenth."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if done < warmup:
        return (done + 1) / warmup
    return 1 - 0.9 * (done - warmup) / max(1, steps - warmup)


def _checkpoints(steps: int) -> set[int]:
    return {max(1, round(steps * quarter / 4)) for quarter in (1, 2, 3, 4)}


def train_step(contestant: Contestant, batch: Tensor) -> None:
    started = time.monotonic()
    contestant.model.train()
    contestant.model(input_ids=batch, labels=batch).loss.backward()
    contestant.optimizer.step()
    contestant.schedule.step()
    contestant.optimizer.zero_grad()
    contestant.step_seconds.append(time.monotonic() - started)


# The report.


def comparison_table(contestants: Sequence[Contestant]) -> Table:
    plain, converted = contestants
    table = Table(title="Loss on held-out text, nats per token (perplexity)")
    for heading in ("step", plain.name, converted.name, "difference"):
        table.add_column(heading, justify="right")
    for step in plain.held_out:
        losses = [float(each.held_out[step].mean()) for each in contestants]
        cells = [f"{loss:.4f} ({perplexity(loss):.2f})" for loss in losses]
        table.add_row(str(step), *cells, f"{losses[1] - losses[0]:+.4f}")
    table.add_section()
    # The median, since the first step of the converted model includes capturing its graph.
    times = [f"{median(each.step_seconds):.2f} s" for each in contestants]
    table.add_row("time per step", *times, "")
    return table


def verdict(contestants: Sequence[Contestant]) -> str:
    """What the last row says, and how little one run says."""
    plain, converted = contestants
    last = max(plain.held_out)
    differences = converted.held_out[last] - plain.held_out[last]
    gain = -float(differences.mean())
    error = float(differences.std()) / len(differences) ** 0.5
    outcome = "no clear difference"
    if abs(gain) > 2 * error:
        outcome = f"the converted model is {'ahead' if gain > 0 else 'behind'}"
    return (
        f"After {last} steps: {outcome} (gain {gain:+.4f} nats per token, standard error "
        f"{error:.4f} over {len(differences)} excerpts).\n"
        "That error covers the choice of held-out text only. One short run with one seed and no "
        "search for learning rates shows how to find out; it does not settle whether this model "
        "gains."
    )


def save_losses(contestants: Sequence[Contestant], out: Path) -> None:
    losses = {
        each.name: {step: float(loss.mean()) for step, loss in each.held_out.items()}
        for each in contestants
    }
    path = out / "losses.json"
    path.write_text(json.dumps(losses, indent=1) + "\n")
    print(f"The losses of the table: {path}")


if __name__ == "__main__":
    raise SystemExit(main())
