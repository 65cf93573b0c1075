"""The jitted functions that compute leaves from raw bytes.

Every input arrives as unsigned bits in the sharding that the plan chose, is exchanged between
devices if necessary, and is then bitcast to its dtype. A recipe that only moves data works on bits
throughout, so that NaN payloads survive. Leaves of several cells are written cell by cell into one
donated buffer.
"""

import contextvars
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from maxconv.algebra import Apply, Concat, Expr, Fit, Rearrange, Shape, Slice, Tensor, nodes, trace
from maxconv.execution.timeline import span
from maxconv.planning.cells import Recipe
from maxconv.planning.placement import shards

_COMPILERS = 4  # maximum number of threads; programs for a slice take seconds each


def bits(dtype: np.dtype) -> np.dtype:
    """The unsigned integer of the same width; sources have no dtypes that JAX would truncate."""
    assert dtype.itemsize <= 4, dtype
    return np.dtype(f"u{dtype.itemsize}")


def buffer_dtype(dtype: np.dtype, sharding: NamedSharding) -> np.dtype:
    """The dtype of a buffer that the cells of a leaf are written into.

    On CPUs it holds bits: XLA widens small floats there, which quiets NaNs, and for a bitcast of
    the buffer copies all of it. `typed` gives it the leaf's dtype in the end.
    """
    on_cpu = all(device.platform == "cpu" for device in sharding.device_set)
    return bits(dtype) if on_cpu else dtype


def typed(array: jax.Array, dtype: np.dtype) -> jax.Array:
    """A buffer with the dtype of its leaf; on CPUs its bits are looked at, not copied."""
    if array.dtype == dtype:
        return array
    shards = [
        jax.device_put(np.asarray(shard.data).view(dtype), shard.device)
        for shard in array.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def cell_function(recipe: Recipe) -> Callable[..., jax.Array]:
    """The pure function of a recipe, over its reads as unsigned bits.

    `f(*reads)` if a step makes the whole leaf; else `f(leaf, offset, *reads)`, which writes the
    cell into `leaf`, a buffer of `buffer_dtype`, at `offset` (int32, one per axis; on the axis of
    lanes, within each shard).
    """
    run = trace(recipe.cell, recipe.box).run
    moves = _only_moves(recipe.cell) and all(r.dtype == recipe.dtype for r in recipe.reads)

    def cell(*reads: jax.Array) -> jax.Array:
        if moves:
            return _retype(run(reads), recipe.dtype)
        typed = [_retype(x, r.dtype) for x, r in zip(reads, recipe.reads, strict=True)]
        return jnp.asarray(run(typed)).astype(recipe.dtype)

    def made(*reads: jax.Array) -> jax.Array:
        needed = [r.local(x) for r, x in zip(recipe.reads, reads, strict=True)]
        if recipe.lanes is None:
            return cell(*needed)
        return jnp.moveaxis(jax.vmap(cell)(*needed), 0, recipe.lanes)

    def write(leaf: jax.Array, offset: jax.Array, *reads: jax.Array) -> jax.Array:
        at = [offset[axis] for axis in range(leaf.ndim)]
        if recipe.lanes is None:
            return lax.dynamic_update_slice(leaf, _retype(made(*reads), leaf.dtype), at)
        axis, pieces = recipe.lanes, shards(recipe.sharding, recipe.lanes)
        cells = made(*reads)  # (..., lanes, rows, ...)
        cells = cells.reshape(*cells.shape[:axis], pieces, -1, *cells.shape[axis + 2 :])
        by_shard = leaf.reshape(*leaf.shape[:axis], pieces, -1, *leaf.shape[axis + 1 :])
        zero = jnp.zeros((), offset.dtype)
        at = [*at[:axis], zero, *at[axis:]]
        cells = _retype(cells, leaf.dtype)
        return lax.dynamic_update_slice(by_shard, cells, at).reshape(leaf.shape)

    def whole(*reads: jax.Array) -> jax.Array:
        return made(*reads).reshape(recipe.shape)

    return whole if recipe.is_whole else write


def compile_cell(recipe: Recipe) -> Any:
    """Compiles the function of a recipe, for the mesh of its shardings; the leaf is donated."""
    reads = [
        jax.ShapeDtypeStruct(shape, bits(r.dtype), sharding=sharding)
        for r in recipe.reads
        for shape, sharding in [r.as_read]
    ]
    function = cell_function(recipe)
    if recipe.is_whole:
        return jax.jit(function, out_shardings=recipe.sharding).lower(*reads).compile()
    shape, dtype, sharding = _buffer(recipe)
    leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    everywhere = NamedSharding(recipe.sharding.mesh, PartitionSpec())
    offset = jax.ShapeDtypeStruct((len(recipe.shape),), np.int32, sharding=everywhere)
    jitted = jax.jit(function, donate_argnums=0, out_shardings=recipe.sharding)
    return jitted.lower(leaf, offset, *reads).compile()


def _buffer(recipe: Recipe) -> tuple[Shape, np.dtype, NamedSharding]:
    dtype = buffer_dtype(recipe.dtype, recipe.sharding)
    return recipe.shape, dtype, recipe.sharding


def compile_blank(shape: Shape, dtype: np.dtype, sharding: NamedSharding) -> Any:
    """Compiles a function that makes zeros, for cells to be written into."""

    def blank() -> jax.Array:
        return jnp.zeros(shape, dtype)

    return jax.jit(blank, out_shardings=sharding).lower().compile()


def compile_places(
    shape: Shape,
    dtype: np.dtype,
    sharding: NamedSharding,
    to: NamedSharding,
    places: Sequence[tuple[int, ...]],
) -> Any:
    """Compiles a function of a stack that returns some of its places, each in the sharding `to`."""

    def taken(stack: jax.Array) -> list[jax.Array]:
        raw = _retype(stack, bits(dtype))  # else small floats would be widened
        return [_retype(raw[place], dtype) for place in places]

    stack = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return jax.jit(taken, out_shardings=to).lower(stack).compile()


class Programs:
    """Compiled programs; each is compiled once, in the background, before it is used."""

    def __init__(self, recipes: Iterable[Recipe] = ()):
        """`recipes`: in the order in which they will be used."""
        workers = max(1, min(_COMPILERS, (os.cpu_count() or 1) - 1))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="compile")
        self._made: dict[Any, Future[Any]] = {}
        for recipe in recipes:
            if recipe.is_read:
                continue
            if not recipe.is_whole:
                self._submit(compile_blank, *_buffer(recipe))
            self._submit(compile_cell, recipe)

    @property
    def compiled(self) -> int:
        """Number of programs that are compiled or being compiled."""
        return len(self._made)

    def cell(self, recipe: Recipe) -> Any:
        """The compiled function of a recipe."""
        return self._submit(compile_cell, recipe).result()

    def places(
        self,
        stack: jax.Array,
        to: NamedSharding,
        places: tuple[tuple[int, ...], ...],
    ) -> Any:
        """The compiled function that takes places from a stack, see `compile_places`."""
        key = stack.shape, stack.dtype, stack.sharding, to, places
        return self._submit(compile_places, *key).result()

    def blank(self, recipe: Recipe) -> Any:
        """The compiled function that makes zeros for the cells of a recipe to be written into."""
        return self._submit(compile_blank, *_buffer(recipe)).result()

    def _submit(self, compile: Callable[..., Any], *key: Any) -> Future[Any]:
        if (compile, key) not in self._made:
            context = contextvars.copy_context()  # jax.config is thread-local
            made = self._pool.submit(context.run, self._timed, compile, *key)
            self._made[compile, key] = made
        return self._made[compile, key]

    def _timed(self, compile: Callable[..., Any], *key: Any) -> Any:
        with span("compile", compile.__name__):
            return compile(*key)

    def close(self) -> None:
        """Cancels compilations that have not started."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _retype(x: jax.Array, dtype: np.dtype) -> jax.Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def _only_moves(expr: Expr) -> bool:
    return all(
        isinstance(node.op, Rearrange | Slice | Fit)
        if isinstance(node, Apply)
        else isinstance(node, Tensor | Concat)
        for node in nodes(expr)
    )
