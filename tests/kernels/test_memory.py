import jax
import jax.numpy as jnp
import pytest

from zoo.kernels.memory import materialized


@pytest.mark.parametrize("written", [True, False])
def test_what_is_materialized_is_no_part_of_the_loop_that_turns_it(written) -> None:
    """XLA's CPU compiler merges what it is not kept from, and transposes such a loop one by one."""

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        x = jnp.maximum(x, 0)
        return jnp.einsum("btd,btf->df", materialized(x) if written else x, y)

    compiled = jax.jit(product).lower(jnp.ones((2, 32, 64)), jnp.ones((2, 32, 16))).compile()
    merged = [one for one in compiled.as_text().split("\n\n") if "maximum(" in one and "transpose(" in one]
    assert bool(merged) != written
