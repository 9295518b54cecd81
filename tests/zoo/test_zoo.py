"""Every architecture of transformers that is in the list, and that docs/models.md says what the lists do."""

import pytest
import transformers
from packaging.version import Version
from zoo.sweep import DIFFUSION, KNOWN, entries, of_page, run, section

ENTRIES = {entry["type"]: entry for entry in entries()}
BUILT = [kind for kind, entry in ENTRIES.items() if "not built" not in entry]


# Some models warn as they are made, or run.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__).release[:2] != (5, 23), reason="the list is of transformers 5.23"
)
@pytest.mark.parametrize("kind", BUILT)
def test_transformers(kind):
    assert run(ENTRIES[kind]) == ENTRIES[kind].get("float", [])


def test_page():
    assert of_page() == section(list(ENTRIES.values()), entries(DIFFUSION))
    assert set(KNOWN) <= set(BUILT)
