"""The command ``attnres-compile``: a table of verbs, thin over the package's own functions.

Exit codes: 0 done, 1 failure, 2 refused or misused, 3 verification failed. Results go to standard
output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from attnres_compile import __version__
from attnres_compile.errors import (
    AlreadyConvertedError,
    AttnResError,
    ConfigError,
    InputError,
    NothingToConvertError,
    OutputExistsError,
    UnsafeFileError,
    in_words,
)

PROGRAM = "attnres-compile"
DONE, FAILED, REFUSED, UNVERIFIED = range(4)
_REFUSALS = (
    AlreadyConvertedError,
    ConfigError,
    InputError,
    NothingToConvertError,
    OutputExistsError,
    UnsafeFileError,
)

AddArguments = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


@dataclass(frozen=True)
class Verb:
    """A word of the command line; its module is imported when the word is used.

    Attributes:
        help: one line for the list of verbs.
        module: has ``add_arguments(parser)`` and ``run(args) -> exit code``.
        usage: what follows the verb.
        example: lines that can be typed as they are.
    """

    help: str
    module: str
    usage: str
    example: str


VERBS = {
    "plan": Verb(
        "say what convert would do, and why not more; changes nothing",
        "attnres_compile.cli_plan",
        "[options] CHECKPOINT",
        """\
  attnres-compile plan examples/stdlib-llama
  attnres-compile plan examples/stdlib-llama/config.json --num-blocks 4 --graph spine.svg
  attnres-compile plan weights.pt --model my_package.models:make --input-shape 2,3,224,224""",
    ),
    "convert": Verb(
        "give a checkpoint Attention Residuals, without loading its weights",
        "attnres_compile.cli_convert",
        "[options] CHECKPOINT OUTPUT",
        """\
  attnres-compile convert examples/stdlib-llama converted
  attnres-compile convert model.safetensors out.safetensors --model my_package.models:make
  attnres-compile convert model.onnx out.onnx --inline
  attnres-compile convert examples/stdlib-llama k3 --names kimi --aggregate mean""",
    ),
    "verify": Verb(
        "compare a converted checkpoint with its original, outputs and gradients",
        "attnres_compile.cli_verify",
        "[options] CHECKPOINT [ORIGINAL]",
        """\
  attnres-compile verify converted
  attnres-compile verify converted examples/stdlib-llama --json
  attnres-compile verify out.pt weights.pt --model my_package.models:make --inputs batch.pt""",
    ),
    "inspect": Verb(
        "show what a checkpoint holds, and what its layers attend over",
        "attnres_compile.cli_inspect",
        "[options] CHECKPOINT",
        """\
  attnres-compile inspect converted
  attnres-compile inspect converted --depth-attention heatmap.html
  attnres-compile inspect converted --depth-attention - --inputs batch.safetensors""",
    ),
    "strip": Verb(
        "give the original checkpoint back, checked against its recorded hashes",
        "attnres_compile.cli_strip",
        "[options] CHECKPOINT OUTPUT",
        """\
  attnres-compile strip converted plain
  attnres-compile strip out.safetensors back.safetensors --json""",
    ),
    "bench": Verb(
        "measure bytes, compiled kernels, and time on a CPU or a GPU",
        "attnres_compile.cli_bench",
        "[options] {bytes,aot,cpu,gpu} ...",
        """\
  attnres-compile bench bytes --completed 8 --sublayers 6 --width 4096
  attnres-compile bench aot --width 5120 --sources 9 --dtype bfloat16
  attnres-compile bench cpu --shapes b --json cpu.json
  attnres-compile bench gpu""",
    ),
    "env": Verb(
        "print versions and devices, to paste into a bug report",
        "attnres_compile.cli_env",
        "[options]",
        "  attnres-compile env",
    ),
    "completion": Verb(
        "print a completion script for a shell",
        "attnres_compile.cli_completion",
        "[options] SHELL",
        """\
  attnres-compile completion bash > ~/.local/share/bash-completion/completions/attnres-compile""",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    Example:
        >>> main(["env", "--json", "--quiet"])  # doctest: +SKIP
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser(words[:1]).parse_args(words)
    except SystemExit as stop:  # --help, --version and misuse
        return stop.code if isinstance(stop.code, int) else REFUSED
    if args.verb is None:
        parser().print_help()
        return REFUSED
    _set_up(args)
    try:
        with _terminable():
            return int(args.run(args))
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return _report(args, "interrupted; nothing was left behind.", FAILED)
    except _REFUSALS as error:
        return _report(args, str(error), REFUSED)
    except AttnResError as error:
        return _report(args, str(error), FAILED)
    except (OSError, MemoryError) as error:
        return _report(args, _system_sentence(error), FAILED)
    except Exception as error:
        return _report(args, _bug(error), FAILED)


def run() -> NoReturn:
    """The entry point of the installed command."""
    sys.exit(main())


def parser(used: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser; only the verbs in `used` know their options, or all of them if there is none."""
    top = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Attention Residuals for any PyTorch model, from checkpoint to checkpoint.",
        epilog="Exit codes: 0 done, 1 failure, 2 refused or misused, 3 verification failed.\n"
        f"'{PROGRAM} VERB --help' shows examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    chosen = [word for word in used if word in VERBS] or list(VERBS)
    for name, verb in VERBS.items():
        each = verbs.add_parser(
            name,
            usage=f"{PROGRAM} {name} {verb.usage}".rstrip(),
            help=verb.help,
            description=f"{verb.help[0].upper()}{verb.help[1:]}.",
            epilog=f"examples:\n{verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in chosen:
            module = importlib.import_module(verb.module)
            module.add_arguments(each)
            _add_common(each)
            each.set_defaults(run=module.run)
    return top


def _add_common(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    group.add_argument("--no-color", action="store_true", help="no colours (as NO_COLOR does)")
    noise = group.add_mutually_exclusive_group()
    noise.add_argument("-v", "--verbose", action="store_true", help="say more, with tracebacks")
    noise.add_argument("-q", "--quiet", action="store_true", help="say nothing but the result")


def _set_up(args: argparse.Namespace) -> None:
    if args.no_color:
        os.environ["NO_COLOR"] = "1"
    level = logging.INFO if args.verbose else logging.ERROR if args.quiet else logging.WARNING
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("attnres_compile").setLevel(level)
    if not args.verbose:
        # what libraries say while they are imported and traced is not for the user of a command
        warnings.simplefilter("ignore")
        for library in ("torch", "torch.utils._pytree", "transformers", "torchao"):
            logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a checkpoint is a path; nothing is fetched


def _report(args: argparse.Namespace, sentence: str, code: int) -> int:
    if args.verbose:
        traceback.print_exc()
    line = " ".join(sentence.split())
    print(f"{PROGRAM}: {line}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": line, "exit_code": code}))
    return code


def _system_sentence(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory."
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or error}."


def _bug(error: Exception) -> str:
    return (
        f"unexpected {type(error).__name__} (a bug, or a model that fails by itself; --verbose "
        f"shows where): {in_words(error)}"
    )


class _terminable:  # noqa: N801  reads as a statement
    """SIGTERM ends the work as Ctrl-C does, so that temporary files go."""

    def __enter__(self) -> None:
        self.before = None
        if _is_main_thread():
            self.before = signal.signal(signal.SIGTERM, _interrupt)

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)


def _is_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
