"""nn.TransformerEncoder and its masks: they are traced whole, and PyTorch is left as it was."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

from attnres_compile import AttnResConfig, convert
from attnres_compile.capture import _straight_encoders
from tolerances import assert_matches

TOKENS = 5
CAUSAL = nn.Transformer.generate_square_subsequent_mask(TOKENS)
PADDING = torch.arange(TOKENS).repeat(2, 1) > torch.tensor([[2], [9]])
MASKS: dict[str, dict[str, Tensor]] = {
    "causal": {"mask": CAUSAL},
    "distances": {"mask": -torch.arange(25.0).view(TOKENS, TOKENS)},
    "padding": {"src_key_padding_mask": PADDING},
    "booleans": {"mask": CAUSAL.isinf(), "src_key_padding_mask": PADDING},
    # PyTorch warns of masks of two dtypes
    "two dtypes": {"mask": CAUSAL, "src_key_padding_mask": PADDING},
}


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("planned_with_masks", [True, False])
@pytest.mark.parametrize("masks", MASKS)
def test_masks(masks: str, planned_with_masks: bool) -> None:
    model, x = encoder(), torch.randn(2, TOKENS, 16)
    given = MASKS[masks] if planned_with_masks else {}
    converted = convert(model, (x,), given, config=AttnResConfig(num_blocks=2))
    expected = model(x, **MASKS[masks])
    assert_matches(converted(x, **MASKS[masks]), expected, name=masks)
    assert not torch.allclose(expected, model(x)), "the mask is of no effect"


def settings() -> tuple[bool, Any]:
    return torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask


def test_settings_are_as_before_when_the_last_one_leaves() -> None:
    """Threads may trace beside each other, and one of them may fail."""
    before = settings()
    with _straight_encoders():
        within = settings()
        with pytest.raises(ZeroDivisionError), _straight_encoders():
            _ = 1 / 0
        assert settings() == within
    assert settings() == before
    assert not within[0]
    assert within[1] is not before[1]
    seen = []

    def trace() -> None:
        for _ in range(300):
            with _straight_encoders():
                seen.append(settings() == within)

    threads = [threading.Thread(target=trace) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1200
    assert all(seen)
    assert settings() == before
