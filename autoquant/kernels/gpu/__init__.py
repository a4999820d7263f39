"""Products of low-bit integers on CUDA GPUs, by Triton kernels.

Importing this package imports neither triton nor a kernel: ``BACKEND`` does that when it is first
asked for a product, and ``missing`` says beforehand why it could not.
"""

from autoquant.kernels.gpu.backend import BACKEND, TritonBackend

__all__ = ["BACKEND", "TritonBackend"]
