"""A Triton backend called ``cpu`` that compiles nothing: with ``TRITON_INTERPRET=1`` kernels run in numpy.

vLLM asks for a backend of that name before it runs Triton kernels on a CPU.
"""
