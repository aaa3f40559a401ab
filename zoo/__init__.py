"""flaxzoo: an accelerator-first model zoo in JAX and Flax.

Importing it imports nothing else: `from zoo.models.gpt import GPT`, `from zoo.kernels import attention`.
`zoo.from_pretrained`, `zoo.save_pretrained` and `zoo.tokenizer` load what they need when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.pretrained import from_pretrained, save_pretrained
    from zoo.tokenizers import tokenizer

__all__ = ["__version__", "from_pretrained", "save_pretrained", "tokenizer"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("from_pretrained", "save_pretrained"):
        from zoo import pretrained

        return getattr(pretrained, name)
    if name == "tokenizer":
        from zoo import tokenizers

        return tokenizers.tokenizer
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
