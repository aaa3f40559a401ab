"""flaxzoo: an accelerator-first model zoo in JAX and Flax.

Importing it imports nothing else: `from zoo.models.gpt import GPT`, `from zoo.kernels import attention`.
"""

__version__ = "0.1.0"
