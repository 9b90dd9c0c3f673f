"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_first_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks, "the README shows no Python"
    # The same lines at a size that CI can afford: a two-layer ViT of the same class.
    small = (
        "torchvision.models.VisionTransformer(image_size=32, patch_size=16, num_layers=2, "
        "num_heads=2, hidden_dim=32, mlp_dim=64)"
    )
    code = blocks[0].replace("torchvision.models.vit_b_16()", small).replace("224", "32")
    namespace: dict[str, object] = {}
    exec(code, namespace)
    converted = namespace["converted"]
    assert type(converted).__name__ == "VisionTransformer"
    assert converted.encoder.attnres is not None  # type: ignore[attr-defined]
