"""The passes over a captured graph, in the order in which data flows through them.

Analysis never changes a graph; a rewrite never decides, it carries out a plan.

What many of them ask, or use:

    graph_values: what a node says about itself: its value, its shape, the module calls around it
    operations: what a node does, in one vocabulary for all kinds of graphs
    gradient_modes: where a graph records gradients, and where it does not
    graph_editor: puts new nodes into a graph, with example values
    graph_bodies: copies the body of a region or of a loop into the graph around it

From a captured graph to one in which every layer can be seen:

    inline_checkpoints: opens checkpointed regions
    loops: what a loop repeats, and how often
    unroll_loops: writes the loops over layers out
    open_encoder_layers: writes PyTorch's fused encoder layer out

From that graph to streams and refusals:

    concatenations: which slice of a concatenation is one of its parts
    dataflow: what depends on what, and how
    find_existing: whether the model has Attention Residuals already
    streams: what is found: additions, states, reads, refusals
    find_streams: which additions carry a stream
    alterations: what may change the values of a carrier on the way: norms, activations, scales
    find_delta_streams: streams whose carrier is altered between additions
    layouts: streams whose carrier is transposed between additions
    explain_bodies: why what lies in a loop or branch is refused
    explain_refusals: why other additions are refused

From streams to a plan:

    classify_readers: who reads a state, who of them sees its scale, which dimension is the channel
    follow_gradients: whether a gradient comes back to a stream
    identify_additions: by what an addition is found again in another capture
    partition_blocks: which sublayers make a block
    locate_sites: by which module paths a user names a site
    explain_additions: what each addition was taken for, and by which rule

From a plan, and the graph of a call that was opened and read in the same way, to mixes:

    redirect_reads: has every reader of a state name the addition that made it
    rewrite_residuals: makes each state that is read a mix of its sources
    rewrite_deltas: does so where sources are differences of states

From mixes to what runs node by node, in eager mode:

    restore_unbind: unpacks a tensor in one operation again
    outline_checkpoints: closes checkpointed regions; for Inductor it marks what to recompute

From mixes to the phases of kernels, in the ``attnres`` backend:

    lower: chooses who computes a mix, and runs the next three
    schedule_two_phase: mixes to phases, so that a block reads a completed source once
    fuse_neighbours: moves the addition before a site and the norm after it into its phase
    keep_layouts: gives readers the order in memory that they were traced with

From phases to calls of the C++ library, on a CPU, where Inductor's own passes end:

    inline_cpp_phases: makes a phase room for results and calls that fill it, and runs the others
    cpp_calls: the arguments of such a call, by name
    absorb_gradients: lets a call add the gradients that have arrived from other sites
    absorb_biases: lets a call add the bias of the linear layer before it
    sum_tokens: lets the library sum the gradients of biases over tokens
    write_in_place: lets a call write over what nobody reads after it
    trim_calls: takes out of a call what it can do without
    realize_rows: has Inductor write rows to memory once, however many calls read them
    call_directly: has Inductor write calls of functions and not of operators

ONNX, where the analysis of streams is the same:

    onnx_graphs: questions about ONNX graphs that several files ask
    normalise_onnx: brings a model into the form that the analysis reads
    onnx_values: types of all values, and numbers in small constants
    onnx_view: shows the data flow as an FX graph
    onnx_mix: the mix as an ONNX function, and the node that calls it
    rewrite_onnx: makes each state that is read a call of that function
"""
