"""Compiling kernels with no GPU, for four targets, and reading what they use from the result.

NVIDIA: ptxas prints registers, spills and shared memory, and nvdisasm the accesses; both come with
Triton. AMD: the assembly says it all. Nothing is launched and no driver is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnres_compile.errors import BackendError
from attnres_compile.kernels import launch, specialise
from attnres_compile.kernels.codegen import Specialisation

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses.

    Attributes:
        kernel: the name of the template and what it is specialised on, in words.
        target: one of ``TARGETS``.
        warps: warps per program.
        registers: per thread (vector registers on AMD).
        spills: bytes per thread that do not fit into registers.
        shared: bytes of shared memory per program.
        loads: instructions that load from global memory, by bytes per thread.
        stores: instructions that store to global memory, by bytes per thread.
    """

    kernel: str
    target: str
    warps: int
    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]


def compile_for(specialisation: Specialisation, target: str, name: str = "") -> Resources:
    """Compile one kernel for one target.

    Raises:
        BackendError: in a process that interprets kernels, where there is nothing to compile.
    """
    if launch.interpreted():
        raise BackendError("kernels are interpreted here; unset TRITON_INTERPRET to compile them.")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    parameters = specialisation.parameters
    function = launch.kernel(specialisation)
    source = ASTSource(
        fn=function,
        signature={**{p.name: p.type for p in parameters}, "TOK": "constexpr"},
        constexprs={(len(parameters),): specialisation.block},
        # What a launch finds out about the memory of rows and vectors.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, p in enumerate(parameters)
            if p.kind in ("row", "vector")
        },
    )
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    options = launch.options(specialisation, nvidia=nvidia)
    compiled = compile(source, target=gpu, options=options)
    read = _read_nvidia if nvidia else _read_amd
    return Resources(
        kernel=name or specialisation.template,
        target=target,
        warps=options["num_warps"],
        shared=compiled.metadata.shared,
        **read(compiled.asm, target),
    )


def kernels_of_a_block(
    *, sources: int, sites: int, width: int, dtype: torch.dtype, norm: str = "rms"
) -> dict[str, Specialisation]:
    """Every kernel of a block of ``sites`` over ``sources`` completed ones, forward and backward.

    With one or two completed sources there is no phase 1. The norm has a weight of ``dtype``.
    """
    common: dict[str, Any] = {"width": width, "dtype": dtype, "images": False}
    weight = None if norm == "none" else dtype
    bias = dtype if norm == "layer" else None
    normed = None if norm == "none" else dtype
    vectors = ["query", *(["weight"] if weight else []), *(["bias"] if bias else [])]
    site_forward: dict[str, Any] = {
        **common,
        "norm": norm,
        "weight": weight,
        "bias": bias,
        "normed": dtype,
        "wants_mix": norm == "none",
        "eps": 1e-6,
        "norm_eps": 1e-6,
    }
    site_backward: dict[str, Any] = {
        **common,
        "norm": norm,
        "weight": weight,
        "normed": normed,
        "has_mixed": norm == "none",
    }
    streamed = sources > 2
    direct = 0 if streamed else sources
    kernels = {
        "site 0": specialise.phase2_forward(
            before=streamed, sources=direct, addends=0, **site_forward
        ),
        "site 1": specialise.phase2_forward(
            before=streamed, sources=direct, addends=1, **site_forward
        ),
        "site": specialise.phase2_forward(
            before=streamed, sources=direct, addends=2, **site_forward
        ),
        "site 0 backward": specialise.phase2_backward(
            before=streamed,
            sources=direct,
            has_partial=False,
            has_grad_partial=False,
            wants_before=streamed,
            wanted=range(direct),
            vectors=vectors[1:] if streamed else vectors,
            **site_backward,
        ),
        "site backward": specialise.phase2_backward(
            before=streamed,
            sources=direct,
            has_partial=True,
            has_grad_partial=True,
            wants_before=streamed,
            wanted=range(direct + 1),
            vectors=vectors,
            **site_backward,
        ),
        "sums of partials": specialise.sum_partials(dtype=dtype),
    }
    if not streamed:
        return kernels
    scored = min(sites, specialise.MAX_SITES["complete"])
    group = min(sites, specialise.MAX_SITES["phase1_forward"])
    present = range(min(sites, specialise.MAX_SITES["phase1_backward"]))
    tiles = -(-width // specialise.streaming_tile(width))
    every = range(sources)
    return kernels | {
        "complete": specialise.complete_forward(addends=2, sites=scored, eps=1e-6, **common),
        "complete backward": specialise.complete_backward(
            sites=scored, has_grad_source=True, wants_source=True, wants_queries=True, **common
        ),
        "weights": specialise.phase1_weights(sources=sources, sites=sites, dtype=dtype),
        "phase 1": specialise.phase1_forward(
            sources=sources, sites=sites, first_site=0, group=group, **common
        ),
        "phase 1 backward": specialise.phase1_backward(
            sources=sources,
            sites=sites,
            present=present,
            arrived=every,
            wanted=every,
            wants_slopes=True,
            **common,
        ),
        "phase 1 logits": specialise.phase1_logits(
            sources=sources, sites=sites, tiles=tiles, dtype=dtype
        ),
    }


def _read_nvidia(asm: dict[str, Any], target: str) -> dict[str, Any]:
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    # The architecture that Triton has named in the text, such as sm_90a.
    named = re.search(r"^\.target (\w+)", asm["ptx"], re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(asm["ptx"])
        # The newer of the two assemblers knows the version of every target's text.
        report = _run(
            *(tools / "ptxas-blackwell", "-v", f"--gpu-name={named[1] if named else target}"),
            *(ptx, "-o", cubin),
        )
        listing = _run(tools / "nvdisasm", "-c", cubin)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    registers = re.search(r"Used (\d+) registers", report)
    return {
        "registers": int(registers[1]) if registers else 0,
        "spills": sum(map(int, spilled)),
        "loads": _accesses(r"\bLDG(?:STS)?\.E([.\w]*)", listing),
        "stores": _accesses(r"\bSTG\.E([.\w]*)", listing),
    }


def _accesses(pattern: str, listing: str) -> dict[int, int]:
    """Instructions by bytes; one without a width in its name moves four."""
    found: Counter[int] = Counter()
    for modifiers in re.findall(pattern, listing):
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
        found[int(bits[1]) // 8 if bits else 4] += 1
    return dict(sorted(found.items()))


def _read_amd(asm: dict[str, Any], target: str) -> dict[str, Any]:
    text = asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}

    def accesses(verb: str) -> dict[int, int]:
        found: Counter[int] = Counter()
        for suffix in re.findall(rf"\b(?:global|buffer)_{verb}_(\w+)", text):
            found[next((b for s, b in widths.items() if suffix.startswith(s)), 2)] += 1
        return dict(sorted(found.items()))

    return {
        "registers": number("vgpr_count"),
        # Scalar registers spill into lanes of vector registers, which costs no memory.
        "spills": number("private_segment_fixed_size"),
        "loads": accesses("load"),
        "stores": accesses("store"),
    }


def _run(*command: Path | str) -> str:
    finished = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    )
    return finished.stdout + finished.stderr
