"""zoo.sharding: rules to specs, meshes, and state that is born sharded."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from zoo import sharding


class TwoLayers(nnx.Module):
    def __init__(self, width: int = 16, *, rngs: nnx.Rngs):
        self.up = nnx.Param(jax.random.normal(rngs.params(), (width, 32)), axes=("embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros(32), axes=("mlp",))
        self.key_value = nnx.Param(
            jax.random.normal(rngs.params(), (width, 1, 4)), axes=("embed", "kv_heads", "head_dim")
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = sharding.constrain(x @ self.up + self.bias, "act_batch", "act_mlp")
        return jnp.tanh(hidden) @ self.up.T


def build(key: jax.Array) -> TwoLayers:
    return TwoLayers(rngs=nnx.Rngs(key))


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh("data=2,fsdp=2,tensor=2", jax.devices()[:8])


def test_parse_mesh():
    assert sharding.parse_mesh("data=2, tensor=4") == {"data": 2, "tensor": 4}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model=2", "'model' is unknown"),
        ("data=0", "size '0'"),
        ("data=two", "size 'two'"),
        ("data", "size ''"),
        ("data=2,data=4", "given twice"),
    ],
)
def test_parse_mesh_names_what_is_wrong(text: str, says: str):
    with pytest.raises(sharding.ShardingError, match=re.escape(says)):
        sharding.parse_mesh(text)


def test_mesh_has_every_axis_and_defaults_to_data():
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    assert mesh.axis_names == sharding.MESH_AXES
    assert mesh.shape["data"] == 4 and mesh.size == 4
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_mesh_that_does_not_divide_the_devices():
    with pytest.raises(sharding.ShardingError, match="data=3 needs 3 devices and there are 8"):
        sharding.make_mesh("data=3", jax.devices()[:8])


def test_several_slices_lie_outermost_on_data():
    devices = [
        SimpleNamespace(id=i, slice_index=i // 4, process_index=0, platform="cpu", device_kind="cpu") for i in range(8)
    ]
    grid = sharding.device_grid((4, 1, 1, 1, 1, 2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    assert (slices[:2] == 0).all() and (slices[2:] == 1).all()
    with pytest.raises(sharding.ShardingError, match="data=1 does not divide over 2 slices"):
        sharding.device_grid((1, 8, 1, 1, 1, 1), devices)


@pytest.mark.parametrize("sides", [(4, 4), (3, 4), (2, 3, 5), (2, 2), (2,), (8,), (5,)])
def test_a_ring_passes_between_neighbours(sides: tuple[int, ...]):
    """The middle axis of a mesh spans the sides; the others lie beside it."""
    count = int(np.prod(sides))
    grid = np.empty((2, count, 2), object)
    for a, i, b in np.ndindex(grid.shape):
        grid[a, i, b] = SimpleNamespace(coords=(*np.unravel_index(i, sides), 2 * a + b))
    laid = sharding.in_a_cycle(grid, 1)
    for a, b in np.ndindex(2, 2):
        coords = np.array([device.coords for device in laid[a, :, b]])
        assert len({tuple(place) for place in coords}) == count and (coords[:, -1] == 2 * a + b).all()
        longest = 1 if len(sides) > 1 else 2
        assert np.abs(coords - np.roll(coords, 1, axis=0)).sum(1).max() <= longest


def test_parameters_follow_the_rules(mesh: jax.sharding.Mesh):
    model = sharding.initialize(build, jax.random.key(0), mesh=mesh)
    assert model.up.get_value().sharding.spec == PartitionSpec("fsdp", "tensor")
    assert model.up.get_value().addressable_shards[0].data.shape == (8, 16)
    # One key/value head over tensor=2 is held by every device.
    assert model.key_value.get_value().sharding.spec == PartitionSpec("fsdp", None, None)


def test_born_sharded_equals_born_whole(mesh: jax.sharding.Mesh):
    whole, parts = build(jax.random.key(3)), sharding.initialize(build, jax.random.key(3), mesh=mesh)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_optimizer_moments_are_laid_out_as_their_parameters(mesh: jax.sharding.Mesh):
    def state(key: jax.Array):
        return optax.adam(1e-3).init(build(key))

    moments = sharding.initialize(state, jax.random.key(0), mesh=mesh)[0].mu
    assert moments.up.get_value().sharding.spec == PartitionSpec("fsdp", "tensor")


def test_constrained_call_equals_the_plain_one(mesh: jax.sharding.Mesh):
    x = jax.random.normal(jax.random.key(1), (8, 16))
    model = build(jax.random.key(0))
    with sharding.use(mesh):
        placed = jax.device_put(model, sharding.shardings(model, mesh))
        y = jax.jit(lambda m, x: m(x))(placed, jax.device_put(x, sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(y, model(x), rtol=1e-5, atol=1e-5)


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, "act_batch", "act_embed") is x


def test_an_explicit_mesh_is_accepted():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    model = build(jax.random.key(0))
    with sharding.use(mesh) as automatic:
        y = jax.jit(lambda m, x: m(x))(jax.device_put(model, sharding.shardings(model, automatic)), jnp.ones((8, 16)))
    np.testing.assert_allclose(y, model(jnp.ones((8, 16))), rtol=1e-5, atol=1e-5)


def test_a_dimension_the_mesh_does_not_divide_is_named(mesh: jax.sharding.Mesh):
    with pytest.raises(
        sharding.ShardingError, match=r"key_value: its axis 'embed' has size 15, which mesh axis fsdp=2"
    ):
        sharding.initialize(lambda key: TwoLayers(15, rngs=nnx.Rngs(key)), jax.random.key(0), mesh=mesh)


def test_a_parameter_without_axes_is_an_error(mesh: jax.sharding.Mesh):
    with pytest.raises(sharding.ShardingError, match="names no logical axes"):
        sharding.shardings({"w": nnx.Param(jnp.ones(3))}, mesh)


def test_a_mesh_axis_is_used_once_in_an_array(mesh: jax.sharding.Mesh):
    spec = sharding.partition_spec(("heads", "mlp"), (4, 4), mesh)
    assert spec == PartitionSpec("tensor", None)


def test_abstract_state_carries_its_layout(mesh: jax.sharding.Mesh):
    tree = sharding.with_shardings(sharding.abstract(build, jax.random.key(0)), mesh)
    assert tree.up.get_value().sharding == NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    assert sharding.parameter_count(tree) == 16 * 32 + 32 + 16 * 4


def test_padding_rows_are_not_counted():
    padded = nnx.Param(jnp.zeros((128, 4)), axes=("vocab", "embed"), rows=100)
    assert sharding.parameter_count([padded]) == 400


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("embed", "mlp"), True),
        (("layers", "embed", "heads", "head_dim"), True),
        (("vocab", "embed"), True),
        (("layers", "mlp"), False),
        (("heads", "head_dim"), False),
        (("norm",), False),
        (("kernel_y", "kernel_x", None, "conv_out"), True),
    ],
)
def test_decay_is_decided_by_names(axes: tuple[str | None, ...], expected: bool):
    assert sharding.decays(axes) is expected


def test_rows_of_the_only_process_are_all_rows(mesh: jax.sharding.Mesh):
    np.testing.assert_array_equal(sharding.rows_of_process(mesh, 8), np.arange(8))
    assert sharding.batch_ways(mesh) == 4
