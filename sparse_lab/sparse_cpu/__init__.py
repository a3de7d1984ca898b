"""Sparse arithmetic that is really faster: forward and backward passes that touch live weights only, on CPUs.

A network that is handed a tensor computes densely, as ever. `SparseArithmetic(model)` hands the same network images in
another layout (`layout`), whose functions (`functions`) run on numba kernels (`conv_kernels`, `norm_kernels`, ...) over
the positions that the masks keep (`live`).
"""
