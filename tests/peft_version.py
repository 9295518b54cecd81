"""Whether transformers takes the PEFT that is installed: a release of it may ask for one that is not out
yet."""

import pytest
from packaging.version import Version


def skip_if_transformers_refuses_it():
    peft = pytest.importorskip("peft")
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers takes PEFT {MIN_PEFT_VERSION} and later")
