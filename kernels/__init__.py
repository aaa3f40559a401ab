"""Attention, and what it takes: `from zoo.kernels import attention, Mask`. The one place that knows about hardware."""

if __name__ == "kernels":
    raise ImportError("this folder is the package zoo.kernels: write `from zoo.kernels import attention`")

from zoo.kernels.bias import Bias
from zoo.kernels.dispatch import Candidate, attention, explain
from zoo.kernels.mask import AttentionError, Mask
from zoo.kernels.problem import AttentionOutput

__all__ = ["AttentionError", "AttentionOutput", "Bias", "Candidate", "Mask", "attention", "explain"]
