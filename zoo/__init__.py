"""flaxzoo: an accelerator-first model zoo in JAX and Flax.

Importing it imports nothing else: `from zoo.models.gpt import GPT`, `from zoo.kernels import attention`.
`zoo.from_pretrained` and `zoo.save_pretrained` load what they need when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.pretrained import from_pretrained, save_pretrained

__all__ = ["__version__", "from_pretrained", "save_pretrained"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("from_pretrained", "save_pretrained"):
        from zoo import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
