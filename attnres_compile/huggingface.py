"""What models of the transformers library need: a config that marks them, and traceable recording.

The config of a converted model is a twin of the original's: one state, two classes. So a change to
either (`set_attn_implementation`) reaches the layers, which keep the original, while what the twin
writes names a model type and a dtype that no loader knows: what `save_pretrained` writes does not
load as the plain model.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from attnres_compile.module import owners

if TYPE_CHECKING:
    from attnres_compile.checkpoint.record import Record

SAVED_MODEL_TYPE = "attnres_compile"
KEPT = "attnres_kept_{}"
"""Keys of a saved config under which the values lie that the mark has replaced. Not a dictionary:
transformers takes any dictionary with the right "model_type" within a config for the config."""

ENTRY = "attnres"
"""Key of a saved config under which the conversion is described."""

REFUSAL = "this checkpoint has Attention Residuals: load it with attnres_compile"
"""Stands where the dtype belongs. Auto classes refuse the model type; explicit classes would only
warn of it, but every one looks its dtype up by name, fails, and shows this sentence."""


def mark_config(model: nn.Module) -> None:
    """Gives a converted transformers model a config whose saved form stock loaders refuse."""
    twins: dict[int, Any] = {}  # one for each config, as several modules hold the same
    entry = _entry_of(model)
    for module in _copied_modules(model):
        config = vars(module).get("config")
        if hasattr(config, "to_json_string"):
            own = entry if module is model else None
            module.__dict__["config"] = twins.setdefault(id(config), _marked_twin(config, own))


def restore_config(model: nn.Module) -> None:
    """Takes the mark off again."""
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, _Marked):
            module.__dict__["config"] = config._attnres_plain


class _Marked:
    """Mixin of the marked config classes."""

    __slots__ = ("_attnres_entry", "_attnres_plain")
    _attnres_plain: Any
    _attnres_entry: dict[str, Any] | None

    def __init_subclass__(cls) -> None:
        # The base has been through what transformers does to its config classes.
        pass

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        """What is written to config.json; `to_dict` tells the values in use, without the mark."""
        saved = marked(json.loads(super().to_json_string(*args, **kwargs)))  # type: ignore[misc]
        if self._attnres_entry is not None:
            saved[ENTRY] = self._attnres_entry
        return json.dumps(saved, indent=2, sort_keys=True) + "\n"

    def __copy__(self) -> Any:
        return _marked_twin(copy.copy(self._attnres_plain), self._attnres_entry)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Through the plain config, so that a copy of the model shares one state again.
        return _marked_twin, (self._attnres_plain, self._attnres_entry)


def _copied_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The owners and all modules around them: they are copies, everything else is shared."""
    paths = {""}
    for path, _ in owners(model):
        parts = path.split(".")
        paths.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    for path in sorted(paths):
        yield model.get_submodule(path)


def _entry_of(model: nn.Module) -> dict[str, Any] | None:
    """What the saved config says of the conversion, enough to load it from there alone."""
    from attnres_compile.checkpoint.record import Record

    plan = vars(model).get("plan")
    return None if plan is None else config_entry(Record(plan))


def config_entry(record: Record) -> dict[str, Any]:
    """A record as an entry of config.json: the options to read, the layout as one line."""
    options = {name: value for name, value in record.plan.config.to_json().items() if value}
    return {**options, "record": record.encode()}


def _marked_twin(config: Any, entry: dict[str, Any] | None = None) -> Any:
    twin: Any = object.__new__(_marked_class(type(config)))
    object.__setattr__(twin, "__dict__", vars(config))
    object.__setattr__(twin, "_attnres_plain", config)
    object.__setattr__(twin, "_attnres_entry", entry)
    return twin


_CLASSES: dict[type, type] = {}


def _marked_class(base: type) -> type:
    if base not in _CLASSES:
        _CLASSES[base] = _make_marked_class(base)
    return _CLASSES[base]


def _make_marked_class(base: type) -> type:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__slots__": ()}
    return type(base.__name__, (_Marked, base), {**names, "__doc__": base.__doc__})


def marked(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config, and every model's config within it, with the mark."""
    inside = {k: marked(v) if _is_config(v) else v for k, v in saved.items()}
    mark = {"model_type": SAVED_MODEL_TYPE, "dtype": REFUSAL}
    kept = {KEPT.format(key): saved[key] for key in mark if key in saved}
    return {**inside, **kept, **mark}


def unmarked(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config without the mark, as the plain model's would be.

    Example:
        >>> unmarked(marked({"model_type": "llama", "num_hidden_layers": 2}))
        {'model_type': 'llama', 'num_hidden_layers': 2}
    """
    plain = {k: unmarked(v) if _is_config(v) else v for k, v in saved.items()}
    if plain.get("model_type") != SAVED_MODEL_TYPE:
        return plain
    plain.pop(ENTRY, None)
    for key in ("model_type", "dtype"):
        plain.pop(key)
        kept = plain.pop(KEPT.format(key), None)
        if kept is not None:
            plain[key] = kept
    return plain


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and "model_type" in value


INSTALLED = "_output_capturing_hooks_installed"
"""The attribute by which transformers knows that a model's layers have its hooks."""


@contextlib.contextmanager
def recording_outputs(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Has transformers' recording hooks in place for a call that may ask for hidden states.

    The library installs them at the first such call, under a lock that cannot be traced. Here they
    go again after the call: layers are shared with the original, which would install its own and
    then record everything twice, and a layer with these hooks cannot be pickled.
    """
    if not (_asks_for_records(model, kwargs) or _holds_recorders(model)):
        yield
        return
    hooks_before = {module: set(module._forward_hooks) for module in model.modules()}
    recorders = [m for m in model.modules() if hasattr(m, "_can_record_outputs")]
    unmarked = [recorder for recorder in recorders if INSTALLED not in vars(recorder)]
    for recorder in unmarked:
        _install_recording(recorder)
    try:
        yield
    finally:
        for recorder in unmarked:
            del recorder.__dict__[INSTALLED]
        for module, before in hooks_before.items():
            for added in set(module._forward_hooks) - before:
                del module._forward_hooks[added]


@contextlib.contextmanager
def without_cache_on_meta(model: nn.Module) -> Iterator[None]:
    """Has a model without weights keep no cache: Dynamo cannot follow one that starts empty."""
    configs: list[Any] = []
    if any(parameter.is_meta for parameter in model.parameters()):
        configs = [vars(module).get("config") for module in model.modules()]
    caching = {id(c): c for c in configs if getattr(c, "use_cache", None) is True}
    for config in caching.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching.values():
            config.use_cache = True


def _asks_for_records(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    config = vars(model).get("config")
    if config is None:
        return False
    asked = [value for name, value in kwargs.items() if name.startswith("output_")]
    recorded = getattr(model, "_can_record_outputs", None) or {}
    asked += [getattr(config, f"output_{name}", None) for name in recorded]
    return any(value is not None and value is not False for value in asked)


def _holds_recorders(model: nn.Module) -> bool:
    """Whether there are models within this one, which it may ask for hidden states (as Llava)."""
    inner = (module for module in model.modules() if module is not model)
    return any(
        getattr(type(module), "_can_record_outputs", None) and INSTALLED not in vars(module)
        for module in inner
    )


def _install_recording(recorder: Any) -> None:
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    if not any(_records(h) for m in recorder.modules() for h in m._forward_hooks.values()):
        maybe_install_capturing_hooks(recorder)
    # an outer model's installation covers the models within it
    recorder.__dict__[INSTALLED] = True


def _records(hook: Callable[..., Any]) -> bool:
    return hook.__module__ == "transformers.utils.output_capturing"
