"""Options that several verbs share: the checkpoint's model, its inputs, and the conversion's."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from attnres_compile.config import AttnResConfig
from attnres_compile.errors import CheckpointError, ConfigError, InputError

NAMINGS = ("native", "kimi", "fla")


def add_source(parser: argparse.ArgumentParser, name: str, help_text: str) -> None:
    """The checkpoint that a verb reads, and what its format does not say."""
    parser.add_argument(name, type=Path, help=help_text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """What a checkpoint without a config.json does not say."""
    group = parser.add_argument_group("model and inputs")
    group.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="what makes the model, as package.module:function or :Class",
    )
    group.add_argument(
        "--model-args",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of the factory; values are JSON, or text",
    )
    group.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="example inputs by name, .safetensors or .pt; names 0, 1, ... are positional",
    )
    group.add_argument(
        "--input-shape",
        nargs="+",
        default=[],
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="random inputs instead: 2,3,224,224 or input_ids=2,16:int64/1000 (below 1000)",
    )
    group.add_argument("--seed", type=int, default=0, help="of random inputs (default 0)")


def add_dangerous(parser: argparse.ArgumentParser) -> None:
    """What runs somebody else's code."""
    group = parser.add_argument_group(
        "Dangerous options", "These run code from the checkpoint, with your rights."
    )
    group.add_argument(
        "--allow-pickle",
        action="store_true",
        help="DANGER: unpickle a whole module; a pickle can run any code, delete your files or "
        "read your keys. Only for files that you made yourself",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="DANGER: run the Python files that a model directory brings along. Read them first",
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """The options of `AttnResConfig`."""
    group = parser.add_argument_group("conversion (what is said here beats --config)")
    group.add_argument(
        "--config", type=Path, metavar="FILE", help="options as TOML, with AttnResConfig's keys"
    )
    group.add_argument(
        "--num-blocks",
        type=_blocks,
        metavar="N|auto|full",
        help="blocks of each stream, or of some: encoder=4,decoder=full",
    )
    group.add_argument(
        "--block-sublayers", type=int, metavar="N", help="attention and MLP count one each"
    )
    group.add_argument(
        "--aggregate", choices=("sum", "mean"), help="sum starts lossless, mean is the paper's"
    )
    group.add_argument("--key-gain", action=argparse.BooleanOptionalAction, default=None)
    group.add_argument("--eps", type=float, metavar="X")
    group.add_argument(
        "--streams", nargs="+", metavar="PATTERN", help="convert these only; '!PATTERN' leaves out"
    )
    group.add_argument(
        "--sites",
        nargs="+",
        metavar="PATTERN",
        help="give these only a mix, by the modules that read there: '*.self_attn', '!*.mlp', or "
        "'model.layers[::2]' for every second layer",
    )
    group.add_argument(
        "--delta-sources",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="post-norm, post-activation and scaled streams too, by differences of states",
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def config_of(args: argparse.Namespace) -> AttnResConfig:
    """The options of a file and of the command line together.

    Raises:
        ConfigError: an option is unknown or out of range.
    """
    settings = read_config(args.config) if args.config is not None else {}
    said = {
        each.name: getattr(args, each.name)
        for each in dataclasses.fields(AttnResConfig)
        if getattr(args, each.name, None) is not None
    }
    if "block_sublayers" in said and "num_blocks" not in said:
        settings.pop("num_blocks", None)
    if "num_blocks" in said and "block_sublayers" not in said:
        settings.pop("block_sublayers", None)
    return AttnResConfig(**{**settings, **said})


def read_config(path: Path) -> dict[str, Any]:
    """The options in a TOML file.

    Raises:
        ConfigError: it is no TOML, or has a key that is no option.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        settings: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path.name} is no TOML: {error}.") from error
    known = [each.name for each in dataclasses.fields(AttnResConfig)]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}."
            raise ConfigError(f"{path.name}: {key} is no option of AttnResConfig; {hint}")
    return settings


def source_of(args: argparse.Namespace, path: Path) -> Any:
    """The checkpoint at a path, with what the command line says of its model.

    Raises:
        InputError: the factory cannot be imported, or the inputs cannot be read.
    """
    from attnres_compile.checkpoint.sources import Source

    return Source(
        path=path,
        factory=_factory(args.model, _arguments(args.model_args)),
        call=_call(args),
        allow_pickle=args.allow_pickle,
        trust_remote_code=args.trust_remote_code,
    )


def _factory(name: str | None, arguments: dict[str, Any]) -> Any:
    if name is None:
        if arguments:
            raise InputError("--model-args are the arguments of --model, which is missing.")
        return None
    module_name, colon, path = name.partition(":")
    if not colon or not path:
        raise InputError(f"--model {name}: say package.module:factory, with a colon.")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in the current folder, as `python -m` finds it
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"--model {name} cannot be imported: {error}.") from error

    def make() -> Any:
        from torch import nn

        try:
            model = found(**arguments)
        except TypeError as error:
            raise InputError(
                f"--model {name} does not take these --model-args: {error}."
            ) from error
        if not isinstance(model, nn.Module):
            raise InputError(f"--model {name} made a {type(model).__name__}, no torch.nn.Module.")
        return model.eval()

    return make


def _arguments(pairs: list[str]) -> dict[str, Any]:
    arguments = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--model-args {pair}: say NAME=VALUE.")
        try:
            arguments[name] = json.loads(text)
        except ValueError:
            arguments[name] = text
    return arguments


def _call(args: argparse.Namespace) -> Any:
    if args.inputs is not None and args.input_shape:
        raise InputError("--inputs and --input-shape both say what to run; give one of them.")
    if args.inputs is not None:
        return _split(_read_inputs(args.inputs))
    if args.input_shape:
        return _split(_random_inputs(args.input_shape, args.seed))
    return None


def _read_inputs(path: Path) -> dict[str, Any]:
    from attnres_compile.checkpoint import pt
    from attnres_compile.checkpoint.safetensors import read_header, read_tensors

    if not path.exists():
        raise InputError(f"--inputs {path} does not exist.")
    if path.suffix == ".safetensors":
        return dict(read_tensors(read_header(path)))
    loaded = pt.read_file(path)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path.name} holds a {type(loaded).__name__}, not inputs by name.")
    return {str(name): value for name, value in loaded.items()}


def _random_inputs(shapes: list[str], seed: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for position, text in enumerate(shapes):
        name, equals, rest = text.rpartition("=")
        sizes, _, kind = rest.partition(":")
        kind, _, below = kind.partition("/")
        try:
            shape = [int(size) for size in sizes.split(",")]
            dtype = getattr(torch, kind or "float32")
            highest = int(below or 2)
            assert isinstance(dtype, torch.dtype)
            assert math.prod(shape) < 1 << 32
            assert min(shape) > 0
            assert highest > 0
        except (ValueError, AttributeError, AssertionError):
            raise InputError(
                f"--input-shape {text}: say sizes, as 2,3,224,224 or input_ids=2,16:int64/1000."
            ) from None
        if dtype.is_floating_point:
            value = torch.randn(shape, generator=generator).to(dtype)
        else:
            value = torch.randint(0, highest, shape, generator=generator).to(dtype)
        inputs[name if equals else str(position)] = value
    return inputs


def _split(inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional inputs by their numbers, the others by name."""
    numbers = sorted((n for n in inputs if n.isdecimal()), key=int)
    args = tuple(inputs[number] for number in numbers)
    return args, {name: value for name, value in inputs.items() if name not in numbers}


def _blocks(text: str) -> int | str | dict[str, int | str]:
    if "=" not in text:
        return _count_or_word(text)
    pairs = [part.rpartition("=") for part in text.split(",")]
    return {pattern: _count_or_word(count) for pattern, _, count in pairs}


def _count_or_word(text: str) -> int | str:
    return text if text in ("auto", "full") else int(text)
