"""What the README says of the models is so."""

import re
from pathlib import Path

from maxconv.families import BY_ARCHITECTURE
from maxconv.tables import known_models, model_facts

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_table_of_models_is_that_of_the_tables():
    rows = re.findall(r"^\| (\w+For\w+) \| (.*) \|$", README, re.MULTILINE)
    listed = {name: block for block, names in rows for name in names.split(", ")}
    blocks = {name: family.decoder_block for name, family in BY_ARCHITECTURE.items()}
    assert set(listed) == set(known_models())
    for name, architecture in listed.items():
        facts = model_facts(name)
        assert facts is not None and facts["decoder_block"] == blocks[architecture]
