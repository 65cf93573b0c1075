"""Compares the metadata of a checkpoint, all that Orbax and MaxText read, with the plan.

Every file is parsed and compared, value by value, with what Orbax would write for the planned
leaves, so that a flipped bit is found wherever it is. Not checked are the contents of
`commit_success.txt`, timestamps as long as they are in order, and the optimizer state.
"""

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp_v0
from etils import epath
from orbax.checkpoint import v1 as ocp

from maxconv.planning.plan import LeafPlan, Plan
from maxconv.private.orbax_metadata import PyTreeHandler
from maxconv.private.orbax_metadata import sharding as sharding_metadata
from maxconv.sources.orbax import (
    CHECKPOINT_METADATA,
    METADATA,
    SHARDING,
    Item,
    Stored,
    load_json,
    reason,
)
from maxconv.targets import orbax
from maxconv.targets.journal import ATTEMPT

ARRAYS = "array_metadatas"
COMMITTED = "commit_success.txt"
_HANDLER = f"{PyTreeHandler.__module__}.{PyTreeHandler.__qualname__}"
_LIST_KEY, _DICT_KEY = 1, 2  # Orbax' KeyType.SEQUENCE and DICT
_MISSING = "nothing"

Problems = Mapping[str, str]


def metadata_problems(item: Item, plan: Plan, custom: Mapping[str, Any] | None) -> dict[str, str]:
    """Problems with the metadata: sentences by leaf or file.

    Args:
        item: the checkpoint.
        plan: of the conversion.
        custom: MaxText's custom metadata, such as `scan_layers`; None if it is not known.
    """
    problems = dict(_leaf_problems(item, plan))
    known = [leaf for leaf in plan.leaves if leaf.name not in problems]
    is_numpy = {item.types.get(leaf.name) for leaf in known} == {"np.ndarray"}  # saved without JAX

    def check(file: str, find: Callable[[], Iterator[str]]) -> None:
        try:
            if found := next(find(), None):
                problems[file] = f"{file} is damaged: {found}."
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            problems[file] = f"{file} is damaged: {type(error).__name__}: {reason(error)}."

    check(METADATA, lambda: _tree(item, known, is_numpy))
    check(CHECKPOINT_METADATA, lambda: _step_metadata(item.directory, custom))
    if not is_numpy:
        check(SHARDING, lambda: _shardings(item, known))
        for file in _array_metadata_files(item)[jax.process_index() :: jax.process_count()]:
            check(file, lambda file=file: _array_metadata(item, file, known))
    if "://" in str(item.directory):  # elsewhere Orbax goes by the name of the directory
        for place in (item.directory.parent, item.directory):
            if not (place / COMMITTED).exists():
                problems[str(place)] = f"{place / COMMITTED} is missing: Orbax will not load it."
    return problems | _load_problems(item, known)


def _leaf_problems(item: Item, plan: Plan) -> Iterator[tuple[str, str]]:
    """A sentence for every leaf that is missing, unexpected, or differs in shape or dtype."""
    for leaf in plan.leaves:
        array = item.arrays.get(leaf.name)
        if array is None:
            yield leaf.name, f"{leaf.name} is missing."
        elif (array.shape, array.dtype) != (leaf.shape, leaf.dtype.name):
            planned = f"{leaf.shape} {leaf.dtype}"
            yield (
                leaf.name,
                f"{leaf.name} is {array.shape} {array.dtype}, but should be {planned}.",
            )
    known = {leaf.name for leaf in plan.leaves} | {"step"}
    for name in [*item.arrays, *item.others]:
        if name not in known and not _is_of_optimizer(name):
            yield name, f"{name} is in the checkpoint, but not in the plan."


def _is_of_optimizer(name: str) -> bool:
    return name.partition(".")[0] == "opt_state"


def _tree(item: Item, leaves: list[LeafPlan], is_numpy: bool) -> Iterator[str]:
    found = load_json(item.directory / METADATA)
    # Leaves that differ from the plan are reported by name elsewhere.
    other = set(item.types) - {leaf.name for leaf in leaves} - {"step"}
    entries = {
        key: value
        for key, value in found["tree_metadata"].items()
        if ".".join(str(part["key"]) for part in value["key_metadata"]) not in other
    }
    tree = dict([_entry("step", {"value_type": "scalar", "skip_deserialize": False})])
    for leaf in leaves:
        value: dict[str, Any] = {"value_type": "np.ndarray", "skip_deserialize": False}
        if not is_numpy:
            value["value_type"] = "jax.Array"
            key, _ = _entry(leaf.name, value)
            said = entries.get(key, {}).get("value_metadata", {}).get("write_shape")
            value["write_shape"] = _write_shape(item.arrays[leaf.name], said)
        tree |= [_entry(leaf.name, value)]
    if not any(name.startswith("opt_state.") for name in item.types):
        nothing = {"value_type": "Dict", "skip_deserialize": True}
        key, empty = _entry("opt_state", nothing)
        tree[key] = empty
        entries |= {k: v for k, v in found["tree_metadata"].items() if k == key}
    wanted = {
        "tree_metadata": tree,
        "use_ocdbt": (item.directory / "manifest.ocdbt").exists(),
        "use_zarr3": item.zarr3,  # or no array would have been found
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    yield from _differences({**found, "tree_metadata": entries}, wanted)


def _entry(name: str, value: Mapping[str, Any]) -> tuple[str, Any]:
    keys = name.split(".")
    kinds = (_LIST_KEY if orbax.is_place(key) else _DICT_KEY for key in keys)
    path = [{"key": key, "key_type": kind} for key, kind in zip(keys, kinds, strict=True)]
    return str(tuple(keys)), {"key_metadata": path, "value_metadata": value}


def _step_metadata(directory: epath.Path, custom: Mapping[str, Any] | None) -> Iterator[str]:
    found = load_json(directory.parent / CHECKPOINT_METADATA)
    begun, done = found["init_timestamp_nsecs"], found["commit_timestamp_nsecs"]
    if type(begun) is not int or type(done) is not int or not 0 < begun <= done:
        yield f"it was begun at {begun} and finished at {done}"
    wanted = {
        "item_handlers": {directory.name: _HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": begun,
        "commit_timestamp_nsecs": done,
        "custom_metadata": found["custom_metadata"] if custom is None else dict(custom),
    }
    yield from _differences(found, wanted)


def _array_metadata_files(item: Item) -> list[str]:
    """The files, existing or expected, of all processes that saved."""
    stores = [store.name for store in item.directory.glob("ocdbt.process_*")]
    files = [file.name for file in item.directory.glob(f"{ARRAYS}/*")]
    of = {name.partition("process_")[2] for name in [*stores, *files] if ATTEMPT not in name}
    numbers = [int(number) for number in of if number.isdigit()]
    return [f"{ARRAYS}/process_{i}" for i in range(max(numbers, default=0) + 1)]


def _write_shape(array: Stored, said: Any) -> list[int]:
    """The recorded shape of a write if it is plausible (whole chunks), else that of a chunk."""
    chunk = list(array.chunk or ())
    if isinstance(said, list) and len(said) == len(chunk):
        sizes = zip(said, chunk, array.shape, strict=True)
        if all(type(n) is int and c and n % c == 0 and 0 < n <= max(c, of) for n, c, of in sizes):
            return said
    return chunk


def _array_metadata(item: Item, file: str, leaves: list[LeafPlan]) -> Iterator[str]:
    document = load_json(item.directory / file)
    found = [entry["array_metadata"] for entry in document["array_metadatas"]]
    said = {entry["param_name"]: entry.get("write_shape") for entry in found}
    wanted = {
        leaf.name: {
            "param_name": leaf.name,
            "write_shape": _write_shape(item.arrays[leaf.name], said.get(leaf.name)),
            "chunk_shape": list(item.arrays[leaf.name].inner or ()),
            "ext_metadata": None,
        }
        for leaf in leaves
    }
    by_name = {
        entry["param_name"]: {**entry, "ext_metadata": entry["ext_metadata"] or None}
        for entry in found
        if entry["param_name"] in wanted or entry["param_name"] not in item.arrays
    }
    yield from _differences(by_name, wanted)
    if len({entry["param_name"] for entry in found}) < len(found):
        yield "an array is listed twice"


def _shardings(item: Item, leaves: list[LeafPlan]) -> Iterator[str]:
    """Compares shardings with the plan; those of another mesh must only fit their arrays."""
    document = {_decoded(key): text for key, text in load_json(item.directory / SHARDING).items()}
    wanted = {leaf.name: _sharding(leaf) for leaf in leaves}
    others = set(item.arrays) - set(wanted)
    found = {name: json.loads(text) for name, text in document.items() if name not in others}
    yield from _differences(dict.fromkeys(found), dict.fromkeys(wanted))
    meshes = [_without_spec(sharding) for sharding in found.values()]
    here = [_without_spec(sharding) for sharding in wanted.values()]
    from_another = all(mesh == meshes[0] for mesh in meshes) and meshes[:1] != here[:1]
    for leaf in leaves:
        if from_another:
            yield from _misfit(leaf, document[leaf.name])
        else:
            pair = (_normal(found[leaf.name]), _normal(wanted[leaf.name]))
            yield from _differences(*pair, leaf.name)


def _decoded(key: str) -> str:
    name = base64.b64decode(key, validate=True)
    if base64.b64encode(name).decode() != key:
        raise ValueError(f"{key} is not a valid name")
    return name.decode()


def _sharding(leaf: LeafPlan) -> dict[str, Any]:
    described = sharding_metadata.from_jax_sharding(leaf.sharding)
    assert described is not None
    return json.loads(described.to_serialized_string())


def _without_spec(sharding: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sharding.items() if key != "partition_spec"}


def _normal(sharding: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a PartitionSpec may leave out at its end."""
    spec = list(sharding["partition_spec"])
    while spec and spec[-1] is None:
        spec.pop()
    return {**sharding, "partition_spec": spec}


def _misfit(leaf: LeafPlan, text: str) -> Iterator[str]:
    sharding = json.loads(text)
    sharding_metadata.from_serialized_string(text)  # raises if Orbax cannot parse it
    if sharding["sharding_type"] != "NamedSharding":
        return
    sizes = dict(zip(sharding["axis_names"], sharding["shape"], strict=True))
    spec = sharding["partition_spec"]
    names = [[axes] if isinstance(axes, str) else axes or [] for axes in spec]
    pieces = [math.prod(sizes[name] for name in of) for of in names]
    fits = all(n % p == 0 for n, p in zip(leaf.shape, pieces, strict=False))
    if not fits or len(pieces) > len(leaf.shape):
        yield f"{leaf.name} of shape {leaf.shape} cannot be sharded by {spec}"


def _load_problems(item: Item, leaves: list[LeafPlan]) -> dict[str, str]:
    """Problems when Orbax opens the checkpoint, in both ways that MaxText uses."""
    ctx = orbax.context()
    ctx.multiprocessing.primary_host = jax.process_index()
    ctx.multiprocessing.active_processes = {jax.process_index()}  # nobody to wait for
    name, parent = item.directory.name, item.directory.parent
    try:
        with ctx:
            step = ocp.load(parent, {"step": 0}, checkpointable_name=name)["step"]
            trees = [ocp.metadata(parent, checkpointable_name=name).metadata]
        trees.append(ocp_v0.PyTreeCheckpointHandler().metadata(item.directory).tree)
    except Exception as error:  # Orbax raises many kinds
        return {"step": f"Orbax cannot read step: {reason(error)}."}
    of_a_run = any(leaf.name == "step" for leaf in leaves)  # then it is compared as a leaf
    problems = {} if step == 0 or of_a_run else {"step": f"step is {step}, but should be 0."}
    for leaf in leaves:
        for node in trees:
            for key in leaf.name.split("."):
                node = node[int(key)] if isinstance(node, list | tuple) else node[key]
            if (tuple(node.shape), node.dtype) != (leaf.shape, leaf.dtype):
                problems[leaf.name] = f"{leaf.name} loads as {node.shape} {node.dtype}."
    return problems


def _differences(found: Any, wanted: Any, at: str = "it") -> Iterator[str]:
    """The differences between two JSON documents, as phrases."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            there, should = (of.get(key, _MISSING) for of in (found, wanted))
            yield from _differences(there, should, key if at == "it" else f"{at}, {key}")
    elif found != wanted or type(found) is not type(wanted):
        yield f"{at} is {_short(found)}, but should be {_short(wanted)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:100]}..."
