"""Triton kernels of routers; imported once they run."""
