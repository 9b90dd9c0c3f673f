"""Models of the transformers library from a config.json: named by it, built without its code."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnres_compile.checkpoint.filling import tied_groups
from attnres_compile.errors import AttnResError, CheckpointError, UnsafeFileError, in_words

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]

_MOST_LAYERS = 10_000
_COUNTS_LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks?|experts)|\w*depths?")


def model_on_meta(config: Mapping[str, Any], place: str, *, trust: Path | None = None) -> nn.Module:
    """The model that a config describes, without memory for its weights, to be planned.

    Args:
        config: what stands in config.json.
        place: the file, for messages.
        trust: the directory whose own code may run; by default none may.

    Raises:
        CheckpointError: the config is damaged or names no model of transformers.
        UnsafeFileError: it asks for code of its own.
    """
    model_class, settings = _named(config, place, trust)
    with _explained(place), torch.device("meta"):
        model: nn.Module = model_class._from_config(settings)
    return model


def model_with(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    place: str,
    *,
    trust: Path | None = None,
) -> nn.Module:
    """The model that a config describes, with these weights, by the library's own rules.

    Raises:
        CheckpointError: a weight is missing or does not fit; names it.
    """
    model_class, settings = _named(config, place, trust)
    with _explained(place), quiet():
        model, report = model_class.from_pretrained(
            None, config=settings, state_dict=dict(tensors), output_loading_info=True
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"{place} has no tensor {missing[0]}, which its model needs.")
    for name in sorted(report["unexpected_keys"]):
        logger.info("%s: %s is not used by %s.", place, name, type(model).__name__)
    loaded: nn.Module = model
    return loaded


def check_shapes(model: nn.Module, found: Shapes, place: str) -> None:
    """Compares the tensors of a checkpoint, by their headers alone, with the model's.

    A name that the model lacks may be one that the library renames when it loads; so a missing
    tensor is an error here only where nothing is left that could become it.

    Raises:
        CheckpointError: names the tensor, the shape it should have and the one that it has.
    """
    expected = model.state_dict()
    common = [name for name in expected if name in found]
    if not common:
        raise CheckpointError(
            f"{place}: no tensor has a name that {type(model).__name__} knows; the weights belong "
            "to another model."
        )
    for name in common:
        shape = tuple(expected[name].shape)
        if found[name][1] != shape:
            raise CheckpointError(
                f"{place}: {name} should have the shape {list(shape)} and has "
                f"{list(found[name][1])}."
            )
    unknown = [name for name in found if name not in expected]
    for group in tied_groups(model):
        if not unknown and not any(name in found for name in group):
            raise CheckpointError(
                f"{place} has no tensor {group[0]}, which {type(model).__name__} needs."
            )


def _named(config: Mapping[str, Any], place: str, trust: Path | None) -> tuple[Any, Any]:
    """The class and the config object that config.json names."""
    transformers = _transformers()
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{place} names no model_type; it is no config of transformers.")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise CheckpointError(
            f"{place} names no architecture; say which class it is by --model "
            "transformers:LlamaForCausalLM or the like, or add it to the config."
        )
    _check_counts(config, place)
    model_class = getattr(transformers, str(architectures[0]), None)
    known = model_type in transformers.CONFIG_MAPPING
    if known and _is_model_class(model_class):
        with _explained(place):
            plain = {k: v for k, v in config.items() if k not in ("model_type", "auto_map")}
            return model_class, transformers.AutoConfig.for_model(model_type, **plain)
    if trust is not None:
        return _remote(transformers, config, trust, place)
    if "auto_map" in config:
        raise UnsafeFileError(
            f"{place} wants to run code from the model's own directory ({architectures[0]}), which "
            "is not done unless you say --trust-remote-code; read that code first."
        )
    raise CheckpointError(
        f"{place}: transformers {transformers.__version__} has no {architectures[0]} of type "
        f"{model_type!r}; update it, or name your own class by --model package.module:factory."
    )


def _remote(
    transformers: Any, config: Mapping[str, Any], directory: Path, place: str
) -> tuple[Any, Any]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    with _explained(place):
        auto = config["auto_map"]
        names = [name for name in auto if name != "AutoConfig" and name.startswith("AutoModel")]
        wanted = config["architectures"][0]
        reference = next((auto[n] for n in names if auto[n].endswith(f".{wanted}")), auto[names[0]])
        settings = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True)
        return get_class_from_dynamic_module(reference, directory), settings


def _is_model_class(model_class: object) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)


def _check_counts(config: Mapping[str, Any], place: str) -> None:
    """Refuses a config that asks for more layers than anybody has: building them would not end."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, place)
        numbers = value if isinstance(value, list) else [value]
        counts = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool)]
        if _COUNTS_LAYERS.fullmatch(str(key)) and any(n > _MOST_LAYERS for n in counts):
            raise CheckpointError(f"{place}: {key} = {value!r} is not a number of layers.")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise AttnResError(
            "a Hugging Face directory needs the transformers library: "
            "pip install 'attnres-compile[hf]'"
        ) from error
    return transformers


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    """What the library raises over a damaged config, as one sentence."""
    try:
        yield
    except AttnResError:
        raise
    except Exception as error:  # configs of strangers fail in every way
        raise CheckpointError(f"{place}: transformers cannot use it: {in_words(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's own progress bar and warnings: what matters is raised here."""
    from transformers.utils import logging

    library: Any = logging

    shown = library.is_progress_bar_enabled()
    verbosity = library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if shown:
            library.enable_progress_bar()
