"""What maxconv uses of other libraries without their promise is there, as it is used."""

import ast
import inspect
import re
import tomllib
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import pytest
import tensorstore as ts

from maxconv import private

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Part:
    """A private part: `takes` are the arguments that we give, `has` the attributes we use."""

    library: str
    module: str
    name: str
    takes: str = ""
    has: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def find(self) -> Any:
        try:
            found = import_module(self.module)
            for name in self.name.split("."):
                found = getattr(found, name)
            return found
        except (ImportError, AttributeError) as error:
            pytest.fail(self._moved(f"there is no {self} ({error})"))

    def check(self) -> None:
        found = self.find()
        names = {} if not self.takes else inspect.signature(found).parameters
        if missing := [name for name in self.takes.split() if name not in names]:
            pytest.fail(self._moved(f"{self} takes no {', '.join(missing)}"))
        if missing := [name for name in self.has.split() if not hasattr(found, name)]:
            pytest.fail(self._moved(f"{self} has no {', '.join(missing)}"))

    def _moved(self, what: str) -> str:
        return (
            f"In {self.library} {version(self.library)} {what}, which maxconv/private uses: mend "
            "its use, or lower the bound in pyproject.toml and in maxconv.private.TESTED."
        )


ORBAX = "orbax.checkpoint._src"
ORBAX_V1 = "orbax.checkpoint.experimental.v1._src"
SERIALIZATION = f"{ORBAX}.serialization"
PARTS = [
    Part("orbax-checkpoint", f"{ORBAX}.metadata.sharding", "from_jax_sharding"),
    Part(
        "orbax-checkpoint",
        "orbax.checkpoint",
        "CheckpointManager",
        has="_wait_for_checkpointers _finalize_checkpoint",
    ),
    Part(
        "jax",
        "jax._src.clusters",
        "ClusterEnv.auto_detect_unset_distributed_params",
        takes="coordinator_address num_processes process_id local_device_ids "
        "cluster_detection_method initialization_timeout",
    ),
    Part(
        "jax",
        "jax._src.distributed",
        "global_state",
        has="client service process_id num_processes",
    ),
    Part(
        "jaxlib",
        "jaxlib._jax",
        "DistributedRuntimeClient",
        has="key_value_set key_value_try_get blocking_key_value_get wait_at_barrier",
    ),
    Part("jaxlib", "jaxlib._jax", "get_distributed_runtime_service"),
    Part(
        "orbax-checkpoint",
        f"{ORBAX}.futures.future",
        "CommitFutureAwaitingContractedSignals",
        takes="coro name",
    ),
    Part(
        "orbax-checkpoint",
        f"{ORBAX}.metadata.array_metadata_store",
        "Serializer",
        has="serialize deserialize",
    ),
    Part("orbax-checkpoint", f"{ORBAX}.multihost.multihost", "process_index"),
    Part(
        "orbax-checkpoint",
        f"{SERIALIZATION}.jax_array_handlers",
        "ArrayHandler",
        takes="primary_host replica_id use_replica_parallel min_slice_bytes_for_replica_parallel "
        "max_replicas_for_replica_parallel enable_replica_parallel_separate_folder "
        "enable_write_sharding_file array_metadata_store",
        has="serialize",
    ),
    Part(
        "orbax-checkpoint",
        f"{SERIALIZATION}.jax_array_handlers",
        "ArrayHandler.serialize",
        takes="values infos args",
    ),
    Part(
        "orbax-checkpoint",
        f"{SERIALIZATION}.jax_array_handlers",
        "check_array_values",
        takes="values infos",
    ),
    Part(
        "orbax-checkpoint",
        f"{SERIALIZATION}.jax_array_handlers",
        "_async_serialize_shardings",
        takes="shardings infos primary_host",
    ),
    Part(
        "orbax-checkpoint",
        f"{SERIALIZATION}.jax_array_handlers",
        "_async_serialize_replica_slices",
        takes="values infos args primary_host metadata_key array_metadata_store ext_metadata "
        "enable_replica_parallel_separate_folder use_replica_parallel",
    ),
    Part(
        "orbax-checkpoint",
        f"{SERIALIZATION}.replica_slices",
        "get_replica_slices",
        takes="arr replica_id use_replica_parallel min_slice_bytes_for_replica_parallel "
        "max_replicas_for_replica_parallel",
    ),
    Part(
        "orbax-checkpoint",
        f"{SERIALIZATION}.replica_slices",
        "ReplicaSlices",
        takes="global_shape replica_slices is_on_host",
    ),
    Part(
        "orbax-checkpoint",
        f"{SERIALIZATION}.replica_slices",
        "ReplicaSlice",
        takes="index unsliced_data slice_args",
    ),
    Part(
        "orbax-checkpoint",
        f"{SERIALIZATION}.replica_slices",
        "SliceArgs",
        takes="start_index limit_index axis",
    ),
    Part(
        "orbax-checkpoint",
        f"{SERIALIZATION}.types",
        "ParamInfo",
        takes="name parent_dir is_ocdbt_checkpoint",
        has="await_path_creation",
    ),
    Part("orbax-checkpoint", f"{SERIALIZATION}.types", "SaveArgs"),
    Part(
        "orbax-checkpoint",
        f"{SERIALIZATION}.types",
        "check_input_arguments",
    ),
    Part(
        "orbax-checkpoint",
        f"{ORBAX_V1}.handlers.pytree_handler",
        "PyTreeHandler",
        takes="leaf_handler_registry",
    ),
    Part(
        "orbax-checkpoint",
        f"{ORBAX_V1}.serialization.array_leaf_handler",
        "ArrayLeafHandler",
        takes="context",
    ),
    Part(
        "orbax-checkpoint",
        f"{ORBAX_V1}.serialization.registry",
        "StandardLeafHandlerRegistry.add",
        takes="leaf_type abstract_type handler_type secondary_typestrs",
    ),
]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_the_part_is_there(part: Part) -> None:
    part.check()


def test_handlers_keep_what_they_were_made_with() -> None:
    """Attributes of instances, which classes do not show."""
    from orbax.checkpoint import v1 as ocp

    from maxconv.private.orbax import array_leaf_handler, jax_array_handlers

    handler = jax_array_handlers.ArrayHandler()
    for name in (
        "_array_metadata_store",
        "_enable_replica_parallel_separate_folder",
        "_enable_write_sharding_file",
        "_max_replicas_for_replica_parallel",
        "_metadata_key",
        "_min_slice_bytes_for_replica_parallel",
        "_primary_host",
        "_replica_id",
        "_use_replica_parallel",
    ):
        assert hasattr(handler, name), f"Orbax' ArrayHandler has no {name} any more"
    leaves = array_leaf_handler.ArrayLeafHandler(context=ocp.Context())
    for name in ("_context", "_handler_impl"):
        assert hasattr(leaves, name), f"Orbax' ArrayLeafHandler has no {name} any more"


def test_an_uploaded_file_is_let_go() -> None:
    from huggingface_hub import CommitOperationAdd

    from maxconv.private.huggingface_hub import is_uploaded, nbytes

    addition = CommitOperationAdd("a", b"four")
    assert hasattr(addition, "upload_info"), "CommitOperationAdd has no upload_info any more"
    assert nbytes(addition) == 4 and not is_uploaded(addition)
    addition.path_or_fileobj = b""  # as after preupload_lfs_files; test_publish.py has it done
    assert nbytes(addition) == 4 and is_uploaded(addition)


def test_ocdbt_files_are_of_the_format_that_is_read(tmp_path: Path) -> None:
    """What each file begins with, and how a location is written."""
    from maxconv.private.tensorstore import MAGIC, parse_location

    base = {"driver": "file", "path": f"{tmp_path}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    value = bytes(range(256)) * 16
    store["key"] = value
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    nodes = [path.read_bytes()[:4] in MAGIC for path in files]
    assert any(nodes) and (tmp_path / "manifest.ocdbt") in files
    assert (tmp_path / "manifest.ocdbt").read_bytes()[:4] in MAGIC

    directory = ts.KvStore.open(base).result()
    root = ts.ocdbt.dump(directory).result()["versions"][-1]["root"]["location"]
    (entry,) = ts.ocdbt.dump(directory, root).result()["entries"]
    file, start, length = parse_location(entry["indirect_value"])
    assert (tmp_path / file).read_bytes()[start : start + length] == value


def test_private_parts_are_used_in_one_place() -> None:
    """No other module of maxconv imports from `_src` or any module with an underscore."""
    for path in (ROOT / "maxconv").rglob("*.py"):
        if path.parent.name == "private":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                if (node.module or "").startswith("maxconv"):
                    continue
                names = [f"{node.module}.{name}" for name in names]
            hidden = [n for n in names if any(p.startswith("_") for p in n.split(".")[1:])]
            assert not hidden, f"{path} imports {hidden}: that belongs into maxconv/private"


def pins(name: str) -> dict[str, str]:
    """The releases of a file of CI's two ends."""
    lines = (ROOT / "tests/versions" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("library", private.TESTED)
def test_the_installed_release_was_tested(library: str) -> None:
    assert private.is_tested(library), private.tested_releases(library)


def test_what_was_tested_is_what_ci_installs() -> None:
    oldest, newest = pins("oldest.txt"), pins("newest.txt")
    ends = {library: (oldest[library], newest[library]) for library in private.TESTED}
    assert private.TESTED == ends


def test_bounds_begin_with_the_oldest_and_let_the_newest_in() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [re.match(r"([\w-]+)>=([\d.]+),<([\d.]+)$", d) for d in project["dependencies"]]
    bounds = {found[1]: found.groups()[1:] for found in ranges if found}
    assert bounds.keys() == private.TESTED.keys() | {"flax", "numpy"}
    for library, (low, high) in bounds.items():
        assert low == pins("oldest.txt")[library], library
        assert private._numbers(pins("newest.txt")[library]) < private._numbers(high), library


def test_a_part_that_is_gone_is_named() -> None:
    with pytest.raises(ImportError, match=r"gone_elsewhere.*jax .* is installed, maxconv was test"):
        with private.private_parts("jax"):
            import_module("jax._src.gone_elsewhere")


def test_other_releases_are_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = private.TESTED["orbax-checkpoint"]
    said = {first: True, last: True, "0.11.40": False, f"{last}.1": False, "1.0.0": False}
    for release, tested in said.items():
        monkeypatch.setattr(private, "version", lambda _, release=release: release)
        assert private.is_tested("orbax-checkpoint") is tested, release
    assert distribution("orbax-checkpoint")
