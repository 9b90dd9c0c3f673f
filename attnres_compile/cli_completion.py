"""``attnres-compile completion``: a completion script, made by shtab."""

from __future__ import annotations

import argparse
import sys

from attnres_compile.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh", "fish"))


def run(args: argparse.Namespace) -> int:
    from attnres_compile.cli import parser

    try:
        import shtab
    except ImportError:
        raise InputError(
            "completion scripts are made by shtab: pip install 'attnres-compile[completion]'"
        ) from None
    sys.stdout.write(shtab.complete(parser(), shell=args.shell))
    return 0
