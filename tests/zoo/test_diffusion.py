"""The transformers and UNets of diffusers that are in the list."""

import pytest
from packaging.version import Version
from zoo.sweep import DIFFUSION, entries

diffusers = pytest.importorskip("diffusers")
ENTRIES = {entry["class"]: entry for entry in entries(DIFFUSION)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.skipif(
    Version(diffusers.__version__).release[:2] != (0, 42), reason="the list is of diffusers 0.42"
)
@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if "not built" not in entry])
def test_diffusers(name, tmp_path):
    from zoo.diffusion import run

    assert run(ENTRIES[name], tmp_path) == ENTRIES[name].get("float", [])
