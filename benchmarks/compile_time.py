"""Compile time against depth: a train step of a GPT of 12 and of 96 layers, equal in width.

    JAX_PLATFORMS=cpu python -m benchmarks.compile_time

Traces, lowers and compiles value and gradient of the loss for the platform that JAX finds; nothing is allocated or run,
and no compilation cache is used. The layers run as a scan over one period, so that depth should cost nothing.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.models.gpt import GPT, GPTConfig


def loss(model: GPT, tokens: jax.Array) -> jax.Array:
    logits = model(tokens[:, :-1]).logits
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()


def seconds(config: GPTConfig, batch_size: int, length: int) -> tuple[float, float]:
    """Time to trace and lower, and time to compile."""
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((batch_size, length + 1), jnp.int32)
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(jax.value_and_grad(loss)).lower(model, tokens)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 96])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--banded", action="store_true", help="GPT-3's period of two, dense and banded")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    windows = (None, 256) if options.banded else (None,)
    config = GPTConfig(width=options.width, num_heads=options.width // 64, windows=windows)
    jax.config.update("jax_enable_compilation_cache", False)
    seconds(dataclasses.replace(config, num_layers=2), options.batch_size, options.length)
    first = None
    for depth in options.depths:
        deep = dataclasses.replace(config, num_layers=depth)
        times = [seconds(deep, options.batch_size, options.length) for _ in range(options.repeats)]
        tracing, compiling = (statistics.median(column) for column in zip(*times, strict=True))
        first = first or tracing + compiling
        print(
            f"{depth:4d} layers: traced in {tracing:5.2f} s, compiled in {compiling:5.2f} s, "
            f"{(tracing + compiling) / first:.2f} times the first"
        )


if __name__ == "__main__":
    main()
