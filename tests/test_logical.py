from maxconv.models.stored_names import renamer

NAMES = (
    ("model.layers.*.mlp.gate.", "model.layers.*.router."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
)


def test_names_are_read_as_the_table_has_them():
    rename = renamer(NAMES)
    assert rename("model.language_model.norm.weight") == (
        "model.norm.weight",
        "model.language_model.",
    )
    assert rename("language_model.model.layers.3.x")[0] == "model.layers.3.x"
    assert rename("model.layers.12.mlp.gate.weight")[0] == "model.layers.12.router.weight"
    assert rename("model.layers.12.mlp.gates.weight") == ("model.layers.12.mlp.gates.weight", None)
