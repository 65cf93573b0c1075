"""What the README says of the models is so."""

import re
from pathlib import Path

from maxconv.cli.family_tables import families_markdown, families_text
from maxconv.config.tables import known_models, model_facts
from maxconv.families import BY_ARCHITECTURE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_of_models_is_that_of_the_tables():
    assert families_markdown() in README


def test_every_model_is_listed_with_the_family_that_makes_it():
    listed = {line.split()[0]: line for line in families_text().splitlines()[1:]}
    assert set(listed) == set(known_models())
    for name, line in listed.items():
        facts = model_facts(name)
        assert facts is not None and facts["hf_id"] in line
        families = BY_ARCHITECTURE[facts["architecture"]]
        assert facts["decoder_block"] in [family.decoder_block for family in families]


def test_the_example_of_a_family_is_the_real_one():
    guide = (ROOT / "maxconv/guide/models.md").read_text()
    (example,) = re.findall(r"This is all of Mixtral:\n\n```python\n(.*?)```", guide, re.DOTALL)
    assert example in (ROOT / "maxconv/families/mixtral.py").read_text()
