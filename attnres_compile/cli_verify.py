"""``attnres-compile verify``: does a converted checkpoint compute what its original does?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attnres_compile import cli_options as options
from attnres_compile.cli import UNVERIFIED
from attnres_compile.cli_screen import progress, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_source(parser, "checkpoint", "a converted checkpoint")
    parser.add_argument(
        "original",
        type=Path,
        nargs="?",
        help="what it was made of; left out, its own base weights without the conversion",
    )
    parser.add_argument(
        "--no-float64", action="store_true", help="compare in the model's own dtype only"
    )
    parser.add_argument(
        "--files",
        action="store_true",
        help="compare the files with the recorded hashes instead, and record those put off",
    )
    options.add_model(parser)
    options.add_dangerous(parser)


def run(args: argparse.Namespace) -> int:
    if args.files:
        return _verify_files(args)
    from attnres_compile.checkpoint.saving import plain_model
    from attnres_compile.checkpoint.sources import load_plain, load_source
    from attnres_compile.errors import InputError
    from attnres_compile.module import is_converted
    from attnres_compile.verification import verify

    source = options.source_of(args, args.checkpoint)
    if source.suffix == ".onnx":
        return _verify_onnx(args, source)
    converted = load_source(source)
    if args.original is not None:
        original = load_plain(options.source_of(args, args.original))
    elif is_converted(converted):
        original = plain_model(converted)
    else:
        raise InputError(
            f"{args.checkpoint.name} is a program without its original; name that too, as in "
            "verify converted.pt2 original.pt2."
        )
    inputs, kwargs = call_of(args, source, converted)
    report = verify(original, converted, inputs, kwargs, float64=not args.no_float64)
    show(args, report.to_json(), report)
    return 0 if report.passed else UNVERIFIED


def _verify_onnx(args: argparse.Namespace, source: Any) -> int:
    from attnres_compile.checkpoint.onnx_extra import require
    from attnres_compile.checkpoint.saving import check_readable
    from attnres_compile.checkpoint.sources import shapes_of

    require("onnx", "onnxruntime")
    from attnres_compile.onnx_verification import verify_files

    for path in filter(None, (args.checkpoint, args.original)):
        check_readable(path)
    shapes_of(source)  # refuses inputs without names
    given = source.call[1] if source.call is not None else {}
    report = verify_files(args.checkpoint, args.original, given, seed=args.seed)
    show(args, report.to_json(), report)
    return 0 if report.passed else UNVERIFIED


def call_of(args: argparse.Namespace, source: Any, converted: Any) -> Any:
    """The inputs that were given, or random ones like those of the conversion."""
    from attnres_compile.call_shapes import make_up_call

    if source.call is not None:
        return source.call
    import torch

    torch.manual_seed(args.seed)
    shapes = converted.plan.inputs
    return ((), None) if shapes is None else make_up_call(shapes, seed=args.seed)


def _verify_files(args: argparse.Namespace) -> int:
    from attnres_compile.checkpoint import dressing
    from attnres_compile.errors import CheckpointError, InputError

    directory = args.checkpoint
    manifest = dressing.read_manifest(directory) if directory.is_dir() else None
    if manifest is None:
        raise InputError(
            f"{directory} has no record of the original's files; 'convert' writes one into "
            "directories."
        )
    with progress(args, "hashing", sum(manifest.sizes.values())) as advance:
        late = [name for name, digest in manifest.hashes.items() if digest is None]
        manifest = dressing.record_hashes(directory, manifest, advance)
        try:
            dressing.check_originals(directory, manifest, advance)
        except CheckpointError as error:
            show(args, {"passed": False, "reason": str(error)}, str(error))
            return UNVERIFIED
    text = f"All {len(manifest.sizes)} files have their recorded SHA-256"
    text += f"; {len(late)} were recorded just now." if late else "."
    show(args, {"passed": True, "files": len(manifest.sizes), "recorded_now": late}, text)
    return 0
