"""The code that runs on the GPU: Triton kernels, and nothing that runs on the host.

Every kernel here computes in IEEE float32 and exact int32; ``triton.jit`` functions carry no type
annotations besides ``tl.constexpr``, because Triton reads them.
"""
