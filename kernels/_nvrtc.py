"""CUDA C++ compiled at first use by NVRTC, which PyTorch's Linux wheel brings: no nvcc, nothing at install time."""

MISSING = ""
