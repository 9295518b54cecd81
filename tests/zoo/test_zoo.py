"""Every architecture of transformers that is in the list, and that docs/models.md says what the list does."""

import pytest
import transformers
from packaging.version import Version
from zoo.sweep import KNOWN, entries, of_page, run, section

ENTRIES = {entry["type"]: entry for entry in entries()}


# Some of transformers' own warn as they are made, or run.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__).release[:2] != (5, 23), reason="the list is of transformers 5.23"
)
@pytest.mark.parametrize("kind", [kind for kind, entry in ENTRIES.items() if "not built" not in entry])
def test_zoo(kind):
    assert run(ENTRIES[kind]) == ENTRIES[kind].get("float", [])


def test_page():
    assert of_page() == section(list(ENTRIES.values()))
    assert set(KNOWN) <= set(ENTRIES)
