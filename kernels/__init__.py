"""The mix of Attention Residuals, from its specification to generated kernels.

``reference`` says in plain PyTorch what every other file here has to compute; ``ops`` registers
the operator ``attnres::mix``. Nothing in this package knows of FX graphs, models or files.
"""
