"""Hot operations, the one place that knows about hardware: `from zoo.kernels import attention, Mask`.

Attention and what it takes, and the loss of a vocabulary.
"""

if __name__ == "kernels":
    raise ImportError("this folder is the package zoo.kernels: write `from zoo.kernels import attention`")

from zoo.kernels.bias import Bias
from zoo.kernels.cross_entropy import LossError, linear_cross_entropy
from zoo.kernels.dispatch import Candidate, attention, explain
from zoo.kernels.mask import AttentionError, Mask
from zoo.kernels.problem import AttentionOutput
from zoo.kernels.reference import attention_weights

__all__ = [
    "AttentionError",
    "AttentionOutput",
    "Bias",
    "Candidate",
    "LossError",
    "Mask",
    "attention",
    "attention_weights",
    "explain",
    "linear_cross_entropy",
]
