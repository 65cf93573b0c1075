"""At full size, every leaf is where and what MaxText's own model has it: no weights are needed."""

import gzip
import json
from pathlib import Path

import pytest
from headers import published

from maxconv.config import parse
from maxconv.model import resolve
from maxconv.plan import make_plan
from maxconv.sharding import make_mesh
from maxconv.tables import known_models, model_facts

# Exported from MaxText 0.2.5: path, shape, logical axes, and PartitionSpec on each mesh.
TREES = {p.name.removesuffix(".json.gz"): p for p in Path(__file__).parent.glob("data/trees/*.gz")}
OURS = [name for name in TREES if name.rsplit(".", 1)[0] in known_models()]


@pytest.mark.parametrize("name", OURS)
def test_plan_is_the_tree_of_maxtext(name):
    tree = json.loads(gzip.decompress(TREES[name].read_bytes()))
    model_name = name.rsplit(".", 1)[0]
    source = published(model_name)
    model = resolve(source, model_name, model_facts(model_name))
    for mesh, sizes in tree["meshes"].items():
        words = [f"ici_{axis}_parallelism={n}" for axis, n in sizes.items() if n > 1]
        config = parse([f"model_name={model_name}", *words], {})
        plan = make_plan(
            source,
            model,
            make_mesh(config),
            config.logical_axis_rules,
            config.param_scan_axis if tree["scan_layers"] else None,
            budget=1 << 40,
        )
        ours = {leaf.leaf.path[1:]: leaf for leaf in plan.leaves}
        theirs = {tuple(leaf["path"]): leaf for leaf in tree["leaves"]}
        assert ours.keys() == theirs.keys()
        for path, leaf in theirs.items():
            assert list(ours[path].shape) == leaf["shape"], path
            assert list(ours[path].leaf.logical) == leaf["logical"], path
            spec = [list(e) if isinstance(e, tuple) else e for e in ours[path].sharding.spec]
            assert spec == leaf["spec"][mesh], path
        assert (
            plan.read_nbytes(0)
            == plan.needed_nbytes
            == sum(info.nbytes for info in source.tensors.values())
        )


def test_every_model_with_a_tree_is_compared():
    compared = {name.rsplit(".", 1)[0] for name in OURS}
    assert set(known_models()) - compared == {"mistral-7b", "llama3.1-70b-Instruct"}
