"""The mix of Attention Residuals, from its specification to compiled kernels.

Nothing in this package knows of FX graphs, models or files of weights. In the order from what has
to be computed to how it is:

Specification:

    reference: the mix in plain PyTorch; every other file here has to compute the same

Operators, each with its schema, its shapes for tracing and its gradient:

    ops: ``attnres::mix``, a whole mix
    complete: ``attnres::complete``, a source is complete and gets its logits for later sites
    phase1: ``attnres::phase1``, all sites of a block attend over its completed sources
    phase2: ``attnres::phase2``, one site, from the last branch to the norm that reads it
    phases: registers the three of them
    implementations: who computes a phase, and what the operators share
    stand_ins: tensors without data, by which gradients find their way back

In plain PyTorch:

    plain_mix: a mix and its gradient
    plain_phases: the six functions of the phases, forward and backward

In generated Triton kernels:

    triton_phases: the six functions: chooses specialisations, allocates, launches
    arguments: how rows lie in memory, and arguments by the names of parameters
    launch: launches a kernel, compiled once per specialisation, or interpreted on a CPU
    specialise: which kernels there are, with their tiles, warps and blocks
    codegen: from a specialisation to the text of its kernel, by ``templates/*.jinja``
    cache: keeps that text on disk, and tells where

In C++, on a CPU:

    cpp_phases: the six functions: makes room for results and calls the library
    cpp_library: compiles ``templates/*.cpp`` on first use; its functions as operators that write

To measure:

    traffic: counts what kernels load and store, in Triton's interpreter
    aot: compiles kernels for four targets with no GPU, and reads what they use
"""
