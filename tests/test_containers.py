"""Models that are containers: `attnres` is a child of theirs, and not one of their layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile.errors import AttnResError, InputError, UnconvertedPathError
from conversions import error, randomize

WIDTH = 16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return x


class ConvLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Net(nn.Sequential):
    pass


class Sliced(nn.Sequential):
    """Indexes itself in every way."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self[1:-1]:
            x = layer(x)
        for position in range(1, len(self)):
            x = self[position](x)
        return self[-1](x)


class Listed(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class Named(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = layer(x)
        for name in self:
            x = self[name](x)
        return x


def stem() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def trunk() -> nn.Module:
    stages = [nn.Sequential(ConvLayer(), ConvLayer()), nn.Sequential(ConvLayer(), ConvLayer())]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), stem()]
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), *stages, *head)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "flat": (lambda: nn.Sequential(stem(), Layer(), Layer(), nn.LayerNorm(WIDTH)), (4,)),
    "nested": (lambda: nn.Sequential(stem(), nn.Sequential(Layer(), Layer())), (4,)),
    "subclass": (lambda: Net(stem(), nn.Sequential(Layer(), nn.Sequential(Layer()))), (4,)),
    "images": (trunk, (4,)),
    "sliced": (lambda: Sliced(stem(), Layer(), Layer(), nn.LayerNorm(WIDTH)), (8,)),
    "list": (lambda: Listed([stem(), Layer(), Layer()]), (4,)),
    "dictionary": (lambda: Named({"stem": stem(), "a": Layer(), "b": Layer()}), (4, 4)),
}


def inputs(name: str) -> Tensor:
    size = (2, 3, 8, 8) if name == "images" else (2, 5, WIDTH)
    return torch.randn(size, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_a_container_is_converted_without_loss(name: str) -> None:
    make, additions = MODELS[name]
    model, x = make().double(), inputs(name)
    converted = attnres_compile.convert(model, (x,))
    assert tuple(len(stream.additions) for stream in converted.plan.streams) == additions
    assert error(converted(x), model(x)) < 1e-12
    assert type(converted).__name__ == type(model).__name__
    assert len(converted) == len(model)
    assert list(converted) == list(model) or name in ("nested", "subclass", "images")
    assert [n for n in converted.state_dict() if "attnres" not in n] == list(model.state_dict())
    assert any(n.startswith("attnres.") for n in converted.state_dict())

    randomize(converted)
    trained = converted(x).detach()
    assert error(trained, model(x)) > 1e-3
    assert error(copy.deepcopy(converted)(x), trained) == 0
    assert error(pickle.loads(pickle.dumps(converted))(x), trained) == 0
    assert error(attnres_compile.export(converted, (x,)).module()(x), trained) < 1e-12
    with pytest.warns(UserWarning, match="queries are not zero"):
        stripped: Any = attnres_compile.strip(converted)
    assert type(stripped) is type(model)
    assert list(stripped.state_dict()) == list(model.state_dict())
    assert error(stripped(x), model(x)) == 0


def test_its_layers_are_indexed_as_before_and_a_slice_does_not_run() -> None:
    model = Net(stem(), Layer(), Layer())
    converted = attnres_compile.convert(model, (torch.randn(2, 5, WIDTH),))
    assert converted[-1] is model[-1]
    assert converted[1] is model[1]
    part = converted[1:]
    assert isinstance(part, Net)
    assert list(part) == [model[1], model[2]]
    with pytest.raises(UnconvertedPathError, match="call that module instead"):
        part(torch.randn(2, 5, WIDTH))
    for edit in (lambda: converted.__delitem__(0), lambda: converted.insert(0, stem())):
        with pytest.raises(InputError, match="cannot be removed or moved; strip"):
            edit()
    del model[0]
    assert len(model) == 2


class Stage(nn.Module):
    """Like the stages of timm's RegNet."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("b1", "b2"):
            self.add_module(name, Layer())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class NamingStage(Stage):
    def forward(self, x: Tensor) -> Tensor:
        return self.b2(self.b1(x))


class Staged(nn.Module):
    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stem, self.stage, self.norm = stem(), stage, nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.stage(self.stem(x)))


def staged_by_hand(model: Staged, converted: Any, x: Tensor) -> Tensor:
    """Four sublayers, each a block of its own, so that every site reads all that was before it."""
    parameters = dict(converted.named_parameters())
    (stream,) = converted.plan.streams
    sources = [model.stem(x)]

    def mix(depth: int) -> Tensor:
        (site,) = (site for site in stream.sites if site.depth == depth)
        query, gain = parameters[site.query_name], parameters[site.gain_name]
        values = torch.stack(sources)
        keys = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6) * gain
        weights = (keys @ query).softmax(0)
        return len(sources) * (weights.unsqueeze(-1) * values).sum(0)

    for name in ("b1", "b2"):
        layer = model.stage.get_submodule(name)
        for norm, linear in zip(layer.norms, layer.linears, strict=True):
            depth = len(sources) - 1
            sources.append(linear(norm(mix(depth) if depth else sources[0])))
    return model.norm(mix(4))


def test_a_stage_that_runs_all_its_children_is_passed_over() -> None:
    model, x = Staged(Stage()).double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    converted = attnres_compile.convert(model, (x,))
    assert [(s.owner, len(s.additions)) for s in converted.plan.streams] == [("", 4)]
    assert error(converted(x), model(x)) < 1e-12
    randomize(converted)
    trained = converted(x).detach()
    assert error(trained, model(x)) > 1e-3
    assert error(trained, staged_by_hand(model, converted, x)) < 1e-12
    assert error(copy.deepcopy(converted)(x), trained) == 0
    assert error(pickle.loads(pickle.dumps(converted))(x), trained) == 0
    with pytest.raises(UnconvertedPathError, match="call that module instead"):
        converted.stage(x)
    with pytest.warns(UserWarning, match="queries are not zero"):
        stripped: Any = attnres_compile.strip(converted)
    assert type(stripped.stage) is Stage
    assert error(stripped(x), model(x)) == 0


def test_a_stage_that_names_its_layers_is_the_owner() -> None:
    x = torch.randn(2, 5, WIDTH)
    plan = attnres_compile.plan(Staged(NamingStage()), (x,))
    assert [stream.owner for stream in plan.streams] == ["stage"]


@pytest.mark.parametrize("make", [lambda: Net(stem(), Layer(), Layer()), Layer])
def test_what_the_class_itself_makes_was_never_converted(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(2, 5, WIDTH)
    model = make()
    converted = attnres_compile.convert(model, (x,))
    made = type(converted)(stem()) if isinstance(model, Net) else type(converted)()
    assert type(made) is type(model)
    assert not hasattr(made, "attnres")
    assert made(x).shape == x.shape
    assert isinstance(converted, type(model))
    assert hasattr(converted, "attnres")


class Children(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class NamedChildren(Stage):
    def forward(self, x: Tensor) -> Tensor:
        for _, layer in self.named_children():
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", [Stage, NamedChildren, Children])
def test_a_model_that_runs_all_its_children_runs_its_own(kind: Any) -> None:
    """There is no module around it, so it holds the parameters itself, and does not run them."""
    naming: Any = NamingStage().double()
    model: Any = kind(naming.b1, naming.b2) if kind is Children else kind().double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    first, second = (dict(m.named_parameters()) for m in (model, naming))
    for parameter, other in zip(first.values(), second.values(), strict=True):
        parameter.data.copy_(other.data)
    converted: Any = attnres_compile.convert(model, (x,))
    by_name: Any = attnres_compile.convert(naming, (x,))
    for each in (converted, by_name):
        assert [s.owner for s in each.plan.streams] == [""]
        randomize(each)
    assert error(converted(x), by_name(x)) < 1e-12
    assert error(converted(x), model(x)) > 1e-3
    assert converted.attnres in list(converted.children())
    assert {p.dtype for p in converted.float().parameters()} == {torch.float32}
    assert not converted.eval().attnres.training


def test_a_model_that_runs_all_its_children_in_another_way_says_so() -> None:
    class Modules(Stage):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self._modules.values():
                assert layer is not None
                x = layer(x)
            return x

    x = torch.randn(2, 5, WIDTH)
    converted = attnres_compile.convert(Modules(), (x,))
    with pytest.raises(AttnResError, match="runs all the children of its module"):
        converted(x)
