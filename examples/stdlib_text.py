"""The text that the example checkpoint is trained and judged on: Python's own documentation.

Training text is the topics of ``pydoc_data`` (what ``help("for")`` prints) and the docstrings of
the standard library's top-level modules; a few topics are held out. Large topics contain smaller
ones word for word (``compound`` repeats ``with``), so that whole topics alone make no honest split:
a paragraph that occurs in a held-out topic is removed from the training text, and a repeated one is
kept once. The text differs between Python versions, the names of the held-out topics do not.
"""

from __future__ import annotations

import ast
import math
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

HELD_OUT = ("calls", "comparisons", "exceptions", "execmodel", "import", "with")
END_OF_TEXT = "<|endoftext|>"

# Shorter paragraphs ("For example:") are idiom rather than content, and recur everywhere.
_SHORTEST_UNIQUE = 60


@dataclass(frozen=True)
class Documentation:
    """Documents to train on, and documents that no training paragraph was taken from."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def documentation() -> Documentation:
    """Split this Python's documentation into training and held-out documents."""
    seen: set[str] = set()
    held_out = [_unseen_paragraphs(topics[name], seen) for name in HELD_OUT if name in topics]
    others = sorted(set(topics) - set(HELD_OUT))
    train = [_unseen_paragraphs(topics[name], seen) for name in others]
    train += [_unseen_paragraphs(text, seen) for text in _module_docstrings()]
    return Documentation(
        train=tuple(text for text in train if text),
        held_out=tuple(text for text in held_out if text),
    )


def _module_docstrings() -> Iterator[str]:
    """All docstrings of each public top-level module, read from its source without importing it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.glob("[!_]*.py")):
        nodes = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, documented)]
        yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    """The paragraphs of ``text`` that are not in ``seen``, which grows by them."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        content = " ".join(paragraph.split())
        if not content or content in seen:
            continue
        if len(content) >= _SHORTEST_UNIQUE:
            seen.add(content)
        kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def encode(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> Tensor:
    """All documents as one stream of token ids, each closed by the end-of-text token."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document + END_OF_TEXT)["input_ids"]
    return torch.tensor(ids)


def random_batches(
    stream: Tensor, *, num_batches: int, batch_size: int, length: int, seed: int
) -> Iterator[Tensor]:
    """Batches [batch_size, length] of random excerpts; the same seed gives the same batches."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length)
    for _ in range(num_batches):
        starts = torch.randint(len(stream) - length + 1, (batch_size, 1), generator=generator)
        yield stream[starts + offsets]


def consecutive_windows(stream: Tensor, *, length: int) -> Tensor:
    """The stream cut into windows [num_windows, length]; a shorter rest is left out."""
    num_windows = len(stream) // length
    return stream[: num_windows * length].view(num_windows, length)


@torch.no_grad()
def window_losses(model: nn.Module, windows: Tensor, *, batch_size: int = 16) -> Tensor:
    """Mean cross-entropy of each window [num_windows], in nats per token, in evaluation mode."""
    was_training = model.training
    model.eval()
    losses = [_losses(model, batch) for batch in windows.split(batch_size)]
    model.train(was_training)
    return torch.cat(losses)


def _losses(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch).logits[:, :-1]
    per_token = F.cross_entropy(
        logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none"
    )
    return per_token.view(len(batch), -1).mean(dim=1).double()


def mean_loss(model: nn.Module, windows: Tensor) -> float:
    """Mean cross-entropy over all windows, in nats per token."""
    return float(window_losses(model, windows).mean())


def perplexity(loss: float) -> float:
    """The perplexity per token that belongs to a mean loss in nats."""
    return math.exp(loss)
