"""Every private name of torch is in `_torch.py`, and is there in this torch."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

import rtn_tensor

PACKAGE = Path(rtn_tensor.__file__).parent
MODULES = {file.relative_to(PACKAGE).as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}
# Ops have such names, too, and torch documents the check.
ALLOWED = ("torch.ops.", "torch._check", "torch.__")
# The instances' own: of a DTensor, and of a module that fully_shard made.
OF_INSTANCES = {"_local_tensor", "_get_fsdp_state", "_is_root", "_stable_hash_for_caching"}


def is_private(name):
    parts = name.split(".")
    return (
        parts[0] == "torch"
        and any(part.startswith("_") and not part.startswith("__") for part in parts)
        and not name.startswith(ALLOWED)
    )


def names_of(tree):
    """Private names of torch that `tree` imports or reads off an imported name."""
    aliases = {"Tensor": "torch.Tensor"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname} | {
                alias.name.partition(".")[0]: alias.name.partition(".")[0]
                for alias in node.names
                if not alias.asname
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = {name for name in aliases.values() if is_private(name)}
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in aliases:
            name = ".".join([aliases[inner.id], *reversed(parts)])
            if is_private(name):
                found.add(name)
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "_torch.py"])
def test_no_other_module_touches_one(module):
    assert not names_of(ast.parse(MODULES[module].read_text())), "move it to _torch.py"


@pytest.mark.parametrize("name", sorted(names_of(ast.parse(MODULES["_torch.py"].read_text()))))
def test_is_there(name):
    *path, last = name.split(".")
    owner = torch
    for i, part in enumerate(path[1:], 2):
        owner = getattr(owner, part) if hasattr(owner, part) else importlib.import_module(".".join(path[:i]))
    if name == "torch.distributed.tensor.DTensor._stable_hash_for_caching" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 has none, and no such cache")
    assert hasattr(owner, last), f"torch {torch.__version__} has no {name}: find what does now, or do without"


# Those of other libraries, which have no promise of staying, either: most are imported where they are needed.
OTHERS = {"accelerate", "huggingface_hub", "peft", "safetensors", "torchao", "transformers"}
IMPORTED = sorted(
    {
        (node.module, alias.name)
        for file in MODULES.values()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in OTHERS
        for alias in node.names
    }
)


@pytest.mark.parametrize(("module", "name"), IMPORTED)
def test_what_is_imported_is_there(module, name):
    package = module.partition(".")[0]
    pytest.importorskip(package)
    if not hasattr(importlib.import_module(module), name):
        assert importlib.util.find_spec(f"{module}.{name}"), f"this {package} has no {module}.{name}"


def test_the_checks_can_fail():
    tree = ast.parse(
        "import torch\nfrom torch import Tensor\nfrom torch._C import "
        "a\ntorch.x._y.z\nTensor._w\ntorch.ops.aten._p\ntorch.nn.q"
    )
    assert names_of(tree) == {"torch._C.a", "torch.x._y.z", "torch.Tensor._w"}
