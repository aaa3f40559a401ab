from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.kernels.memory import awaiting, materialized, recomputed


@pytest.mark.parametrize("written", [True, False])
def test_what_is_materialized_is_no_part_of_the_loop_that_turns_it(written) -> None:
    """XLA's CPU compiler merges what it is not kept from, and transposes such a loop one by one."""

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        x = jnp.maximum(x, 0)
        return jnp.einsum("btd,btf->df", materialized(x) if written else x, y)

    compiled = jax.jit(product).lower(jnp.ones((2, 32, 64)), jnp.ones((2, 32, 16))).compile()
    merged = [one for one in compiled.as_text().split("\n\n") if "maximum(" in one and "transpose(" in one]
    assert bool(merged) != written


def test_what_awaits_is_not_made_when_the_program_begins() -> None:
    """Turned kernels of a backward pass, each of which is read once."""
    kernels = [jnp.ones((256, 256)) for _ in range(8)]

    def there_and_back(kernels: list[jax.Array], x: jax.Array, waits: bool) -> jax.Array:
        for kernel in kernels:
            x = jnp.tanh(x @ kernel)
        for kernel in reversed(kernels):
            x = jnp.tanh(x @ (awaiting(kernel, x) if waits else kernel)[::-1, ::-1])
        return x

    def temporaries(waits: bool) -> int:
        compiled = jax.jit(there_and_back, static_argnums=2).lower(kernels, jnp.ones((8, 256)), waits).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(waits=True) < temporaries(waits=False) / 2
    x, weights = jnp.ones((8, 256)), [0.01 * kernel for kernel in kernels]
    assert jnp.array_equal(there_and_back(weights, x, True), there_and_back(weights, x, False))


def test_recomputed_keeps_less_and_changes_nothing() -> None:
    def layer(told: jax.Array, x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = jnp.tanh(told * x + x.mean(0))
        return x

    def through(apply: Callable[..., jax.Array], x: jax.Array, told: jax.Array) -> jax.Array:
        for _ in range(8):
            x = apply(told, x)
        return x.sum()

    x, told = jnp.linspace(0, 1, 2**18).reshape(-1, 256), jnp.full(256, 0.5)
    plain, again = (
        jax.jit(jax.value_and_grad(partial(through, apply), (0, 1))).lower(x, told).compile()
        for apply in (layer, partial(recomputed, layer))
    )
    assert again.memory_analysis().temp_size_in_bytes < 0.6 * plain.memory_analysis().temp_size_in_bytes
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), again(x, told), plain(x, told))
