"""At full size, every leaf is where and what MaxText's own model has it: no weights are needed."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
from headers import published
from plans import make_plan
from shapes import DATA

from maxconv.algebra import tensors
from maxconv.config import parse
from maxconv.config.mesh import make_mesh, partition_spec
from maxconv.config.tables import known_models, model_facts
from maxconv.errors import UserError
from maxconv.jobs import leaves
from maxconv.models.parameters import parameters
from maxconv.models.resolve import resolve

# Exported from MaxText 0.2.5: path, shape, logical axes, and PartitionSpec on each mesh.
TREES = {p.name.removesuffix(".json.gz"): p for p in Path(__file__).parent.glob("data/trees/*.gz")}


def model_of(name):
    # mm: with use_multimodal; mtp: with mtp_num_layers=1
    return re.sub(r"\.(scan|unscan)(\.mm|\.mtp)?$", "", name)


def read(name):
    return json.loads(gzip.decompress(TREES[name].read_bytes()))


def words_of(name):
    """Those with which MaxText made a tree."""
    tree = read(name)
    words = {key: tree.get(key, False) for key in ("use_multimodal", "use_audio")}
    return words | {"mtp_num_layers": int(name.endswith(".mtp"))}


# MaxText's converter has a name for it that its models do not have.
ALSO = {"qwen3-480b-a35b": "qwen3-coder-480b-a35b"}

OURS = [(name, model_of(name)) for name in TREES if model_of(name) in known_models()]
OURS += [(name, ALSO[of]) for name, of in OURS if of in ALSO]

# Leaves that are not in the dtype of --save_dtype. MaxText's converter adds 1 to Gemma's norms in
# float32; it rounds numbers of experts, which are integers here, to bfloat16.
DTYPES = (
    (r"gemma[23]?-", r"^decoder/.*norm(_local|_global)?/scale$", "float32"),
    (r"gemma3-", r"/mm_soft_embedding_norm/scale$", "float32"),
    (r"deepseek4-", r"/mhc_norm/scale$", "float32"),
    (r"deepseek4-", r"/tid2eid$", "int32"),
)


FP8_NAME = "float8_e4m3fn"
# With fp8 weights kept; the larger size differs in nothing that these do not have.
FP8 = ["qwen3.5-35b-a3b-fp8.scan", "qwen3.5-35b-a3b-fp8.unscan"]


# Trees of more tensors than this are slow. Of models that differ in sizes alone only the smallest
# is compared then, its layers stacked if MaxText can; a run may ask for all.
MANY = 5000
ALL = "MAXCONV_ALL_TREES" in os.environ


def trees():
    """Every tree, once."""
    seen = set()
    distinct = {content(*run): run for run in reversed(OURS)}.values()
    for name, of in sorted(distinct, key=lambda run: (tensors_of(run[1]), run)):
        facts, layers = model_facts(of) or {}, name.removeprefix(model_of(name))
        for dtype in ("bfloat16", *[FP8_NAME] * (name in FP8 and of == model_of(name))):
            tied = facts.get("logits_via_embedding", False)
            kind = facts["architecture"], facts["decoder_block"], tied, layers
            is_slow = kind in seen or dtype != "bfloat16" or tensors_of(of) > MANY
            stacks = layers.startswith(".scan") or f"{model_of(name)}.scan" not in TREES
            is_new = kind not in seen and stacks
            if ALL or tensors_of(of) <= MANY or is_new or dtype != "bfloat16":
                yield pytest.param(name, of, dtype, marks=pytest.mark.slow if is_slow else [])
            seen.add(kind)


def content(name, of):
    """What is compared: some models are published under several names."""
    headers = json.loads((DATA / "published" / f"{of}.json").read_text())
    tree, facts = read(name), dict(model_facts(of) or {})
    for named, key in ((headers, "hf_id"), (facts, "hf_id"), (tree, "model")):
        named.pop(key)
    return json.dumps([headers, tree, facts], sort_keys=True)


def tensors_of(model_name):
    """About how many tensors a model has."""
    facts = model_facts(model_name) or {}
    return facts["base_num_decoder_layers"] * (1 + facts.get("num_experts", 1))


@pytest.mark.parametrize(("name", "model_name", "save_dtype"), [*trees()])
def test_plan_is_the_tree_of_maxtext(name, model_name, save_dtype, monkeypatch):
    tree = read(name)
    source = published(model_name)
    keeps = save_dtype != "bfloat16"
    words = words_of(name)
    model = resolve(source, model_name, model_facts(model_name), words, keeps)
    config = parse([f"model_name={model_name}", "ici_fsdp_parallelism=8"], {})
    rules = config.logical_axis_rules
    scan_axis = config.param_scan_axis if tree["scan_layers"] else None
    bound = parameters(model, source.root, scan_axis)
    monkeypatch.setattr(leaves, "parameters", lambda *_: bound)  # once: it takes the longest
    plan = make_plan(source, model, make_mesh(config), rules, scan_axis, save_dtype, 1 << 40)
    ours = {tuple(leaf.name.split(".")[2:]): leaf for leaf in plan.leaves}
    logical = {p.name: p.logical for p in bound}
    theirs = {tuple(leaf["path"]): leaf for leaf in tree["leaves"]}
    if model_name.endswith("-fp8") and not keeps:  # the scales dequantise the weights
        theirs = {path: leaf for path, leaf in theirs.items() if not path[-1].endswith("_scale")}
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert list(ours[path].shape) == leaf["shape"], path
        if keeps:  # MaxText's model names a dtype for those alone
            assert (leaf["dtype"] == FP8_NAME) == (str(ours[path].dtype) == FP8_NAME), path
        else:
            assert ours[path].dtype == dtype_of(model_name, "/".join(path)), path
        assert is_named(logical[ours[path].name], leaf["logical"]), path
        for mesh in tree["meshes"].keys() - leaf.get("indivisible", ()):
            sizes = tree["meshes"][mesh]
            sizes = sizes.get("axes", sizes)  # some files say how the tree was made, too
            spec, _ = partition_spec(logical[ours[path].name], ours[path].shape, sizes, rules)
            entries = [list(e) if isinstance(e, tuple) else e for e in spec]
            assert trimmed(entries) == trimmed(leaf["spec"][mesh]), path
    assert [leaf.sharding.spec for leaf in plan.leaves] == [
        partition_spec(logical[leaf.name], leaf.shape, dict(plan.mesh.shape), rules)[0]
        for leaf in plan.leaves
    ]
    needed = [x for name, x in model.tensors.items() if not model.is_dropped(name)]
    everything = sum(source.tensors[t.name].nbytes for x in needed for t in tensors(x))
    cut = max(0, model.published.vocab - model.dims.vocab) * model.dims.emb * 2  # bfloat16
    assert plan.needed_nbytes == everything - cut
    assert plan.read_nbytes(0) == plan.needed_nbytes


def dtype_of(model_name, path):
    found = (d for model, end, d in DTYPES if re.match(model, model_name) and re.search(end, path))
    return next(found, "bfloat16")


def test_what_maxtext_cannot_scan_is_refused():
    source = published("qwen3-vl-2b", layers=2)
    model = resolve(source, None, {}, {"use_multimodal": False})
    config = parse(["ici_fsdp_parallelism=8"], {})
    with pytest.raises(UserError, match="cannot scan .*Qwen3VL.*add scan_layers=False"):
        make_plan(source, model, make_mesh(config), config.logical_axis_rules, 1, budget=1 << 40)


def is_named(ours, theirs):
    """Whether axes are named alike. Of some leaves MaxText names none, or only stacked ones."""
    if theirs is None or len(theirs) < len(ours):
        return all(a is None or a.endswith("layers") or a == "scanned_blocks" for a in ours)
    return list(ours) == theirs


def trimmed(spec):
    """A PartitionSpec's entries without those at the end that say nothing."""
    return spec[: max((i + 1 for i, entry in enumerate(spec) if entry), default=0)]


def test_every_model_is_compared():
    assert {model for _, model in OURS} == set(known_models())
    assert {model_of(name) for name in TREES} <= set(known_models())
