"""torch's scaled-dot-product attention in the suite, for CPUs: `--implementations chunked torch`.

Needs torch, which is no dependency of this package. Arrays lie as torch likes them, [B, N, T, H].
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.attention_cases import Arrays, Case


class TorchAttention:
    """scaled_dot_product_attention of one case; mask: bool [1, 1, T, S], or None where the case is causal or plain."""

    def __init__(self, case: Case, mask: np.ndarray | None) -> None:
        import torch

        self.torch, self.case = torch, case
        self.mask = None if mask is None else torch.from_numpy(mask)

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        attention = self.torch.nn.functional.scaled_dot_product_attention
        causal, grouped = self.case.causal and self.mask is None, self.case.heads != self.case.kv_heads
        return attention(q, k, v, attn_mask=self.mask, is_causal=causal, enable_gqa=grouped)

    def run(self, mode: str, arrays: Arrays) -> tuple[Callable[..., Any], tuple]:
        """A function of the suite's mode, and its arguments."""
        *inputs, gradient = self._tensors(arrays)
        if mode == "forward":
            return self.attend, tuple(inputs)
        inputs = [x.requires_grad_() for x in inputs]
        if mode == "residuals":
            return self.attend, tuple(inputs)
        if mode == "both":
            return self._both, (inputs, gradient)
        output = self.attend(*inputs)
        return lambda: self.torch.autograd.grad(output, inputs, gradient, retain_graph=True), ()

    def answer(self, arrays: Arrays) -> tuple:
        """(output, gradients), as the suite's implementations give them."""
        *inputs, gradient = self._tensors(arrays)
        output, gradients = self._both([x.requires_grad_() for x in inputs], gradient)
        q, *rest = (jnp.asarray(x.detach().float().numpy().swapaxes(1, 2)) for x in (output, *gradients))
        return q, tuple(rest)

    def _both(self, inputs: list, gradient: Any) -> tuple:
        output = self.attend(*inputs)
        return output, self.torch.autograd.grad(output, inputs, gradient)

    def _tensors(self, arrays: Arrays) -> list:
        dtype = getattr(self.torch, str(arrays.q.dtype))
        wide = (np.array(x.astype(jnp.float32).swapaxes(1, 2), order="C") for x in arrays)
        return [self.torch.from_numpy(x).to(dtype) for x in wide]
