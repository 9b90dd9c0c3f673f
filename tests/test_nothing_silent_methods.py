"""Ways into a converted model other than its forward: converted, or they raise with a sentence.

The queries are random, so that a way through the unconverted layers would show.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from attnres_compile.errors import MismatchError, UnconvertedPathError
from conversions import Tower, convert_randomized, error, tower, tower_inputs, tower_oracle
from zoo import by_name
from zoo_case import images, perturb

EXACT = 1e-6
PLAN_DIFFERS = "^stream '.*': the plan has . residual additions, this call of the model has "


class FeatureMixin:
    """A base that is no module and has no forward."""

    def mixed_in(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class BaseTower(Tower):
    """A base without a forward of its own."""

    def inherited(self, x: Tensor) -> Tensor:
        return self.mixed_in(x)  # type: ignore[attr-defined]


class ManyWays(BaseTower, FeatureMixin):
    def inlined(self, x: Tensor) -> Tensor:
        """Calls parts of the layers and makes their additions itself."""
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer.dropout(layer.linear(layer.norm(x)))
        return self.norm(x)

    def without_calls(self, x: Tensor) -> Tensor:
        """Runs the layers past their hooks."""
        x = self.stem(x)
        for layer in self.layers:
            x = layer.forward(x)
        return self.norm(x)

    def with_fallback(self, x: Tensor) -> Tensor:
        try:
            return self.features(x)
        except Exception:
            return x.new_zeros(x.shape)

    def by_name(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in dict(self.named_children())["layers"]:  # type: ignore[attr-defined]
            x = layer(x)
        return self.norm(x)

    def states(self, x: Tensor) -> Iterator[Tensor]:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
            yield x

    def counted(self) -> Iterator[int]:
        """A generator that runs no layer."""
        for index, _ in enumerate(self.layers):
            yield index

    def twice(self, x: Tensor) -> Tensor:
        return self(x) + self.forward(x)


def converted_ways() -> Any:
    model = tower()
    model.__class__ = ManyWays
    return convert_randomized(model, (tower_inputs(),))


@pytest.mark.parametrize("method", ["mixed_in", "inherited", "with_fallback", "by_name"])
def test_ways_through_all_layers_are_converted(method: str) -> None:
    converted, x = converted_ways(), tower_inputs()
    expected = tower_oracle(converted, x, "auto")
    for _ in range(2):
        assert error(converted.head(getattr(converted, method)(x)), expected) < EXACT


@pytest.mark.parametrize("method", ["inlined", "without_calls"])
def test_additions_that_are_not_known_as_the_layers_raise(method: str) -> None:
    with pytest.raises(MismatchError, match=PLAN_DIFFERS + "4; without the addition 0 of layers.0"):
        getattr(converted_ways(), method)(tower_inputs())


def test_a_part_of_the_layers_raises() -> None:
    with pytest.raises(MismatchError, match=PLAN_DIFFERS + "2; without the addition 0 of layers.2"):
        converted_ways().first_features(tower_inputs())


def test_a_generator_over_the_layers_is_converted() -> None:
    converted, x = converted_ways(), tower_inputs()
    *_, last = converted.states(x)
    expected = tower_oracle(converted, x, "auto")
    assert error(converted.head(converted.norm(last)), expected) < EXACT


def test_methods_that_run_no_layer_are_left_alone() -> None:
    converted, x = converted_ways(), tower_inputs()
    assert list(converted.counted()) == [0, 1, 2, 3]
    assert error(converted.stem_and_head(x), tower().stem_and_head(x)) == 0


def test_a_method_that_calls_the_model_is_converted() -> None:
    converted, x = converted_ways(), tower_inputs()
    assert error(converted.twice(x), 2 * tower_oracle(converted, x, "auto")) < EXACT


def test_methods_of_a_copy_run_its_own_weights() -> None:
    original, x = converted_ways(), tower_inputs()
    original.features(x)
    converted = copy.deepcopy(original)
    with torch.no_grad():
        converted.stem.weight.mul_(2)
    expected = tower_oracle(converted, x, "auto")
    assert error(converted.head(converted.features(x)), expected) < EXACT


class OwnAdditions(nn.Module):
    """Makes its additions in its own forward, so that none of its parts is a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.norm(x))
        x = x + self.second(self.norm(x))
        return self.norm(x + self.third(self.norm(x)))

    def again(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def shorter(self, x: Tensor) -> Tensor:
        x = x + self.first(self.norm(x))
        return self.norm(x + self.second(self.norm(x)))


def test_an_owner_that_makes_the_additions_itself() -> None:
    x = torch.randn(4, 8)
    converted = convert_randomized(OwnAdditions(), (x,))
    assert error(converted.again(x), converted(x)) == 0
    with pytest.raises(MismatchError, match=PLAN_DIFFERS + "2"):
        converted.shorter(x)


class TestTimm:
    @pytest.fixture
    def model(self) -> Any:
        model = timm.models.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5
        ).eval()
        perturb(model)
        return convert_randomized(model, (images(16),))

    def test_feature_methods_are_converted(self, model: Any) -> None:
        x = images(16)
        features = model.forward_features(x)
        assert error(model.forward_head(features), model(x)) < EXACT

        last, intermediates = model.forward_intermediates(x, output_fmt="NLC")
        assert error(last, features) < EXACT
        assert error(model.norm(intermediates[-1]), features[:, 1:]) < EXACT
        assert len(intermediates) == 3

        (tokens,) = model.get_intermediate_layers(x, n=1, norm=True)
        assert error(tokens, features[:, 1:]) < EXACT

    def test_fewer_layers_raise(self, model: Any) -> None:
        with pytest.raises(MismatchError, match=PLAN_DIFFERS + "2"):
            model.forward_intermediates(
                images(16), indices=[0], stop_early=True, intermediates_only=True
            )


class TestPartsCalledDirectly:
    def test_an_encoder_is_converted(self) -> None:
        case = by_name("t5")
        args, kwargs = case.inputs()
        plain = case.build()
        converted = convert_randomized(plain, args, kwargs)
        expected = converted(**kwargs).encoder_last_hidden_state
        assert error(converted.get_encoder()(kwargs["input_ids"])[0], expected) == 0
        assert error(plain.encoder(kwargs["input_ids"])[0], expected) > 0.1

    def test_containers_raise_and_layers_are_plain(self) -> None:
        model = torchvision.models.VisionTransformer(
            image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=16
        ).eval()
        perturb(model)
        converted = convert_randomized(model, (images(16),))
        tokens = torch.randn(2, 5, 16)
        sentence = (
            "^this Sequential is a part of a converted model, whose Attention Residuals belong to "
            "the module around it; call that module instead"
        )
        with pytest.raises(UnconvertedPathError, match=sentence):
            converted.encoder.layers(tokens)
        with pytest.raises(UnconvertedPathError, match=sentence):
            converted.encoder.layers[:1](tokens)
        for duplicate in (converted, copy.deepcopy(converted)):
            layer = duplicate.encoder.layers[0]
            assert error(layer(tokens), model.encoder.layers[0](tokens)) == 0
        assert error(converted.encoder(tokens), model.encoder(tokens)) > 0.1
