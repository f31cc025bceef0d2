"""The memory-bound passes around the experts' matrix products: in Triton for CUDA, in PyTorch as their reference."""
