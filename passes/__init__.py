"""The passes over a captured FX graph, in data-flow order.

base -> inline_checkpoints, unroll_loops, open_encoder_layers -> dataflow -> find_streams
(-> classify_readers -> layouts) -> partition_blocks -> rewrite_residuals -> restore_unbind
-> outline_checkpoints. Analysis never changes a graph; a rewrite never decides, it carries out a
plan.
"""
