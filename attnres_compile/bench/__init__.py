"""Measurements of ``attnres-compile bench``: bytes, compiled kernels, CPU and GPU time."""
