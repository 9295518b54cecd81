"""A module imports only modules above it, and the heavy libraries only where they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rtn_tensor

PACKAGE = Path(rtn_tensor.__file__).parent

# Top to bottom. A folder stands for all its modules, which do not import one another.
LAYERS = [
    "_torch",
    "_torchao",
    "text_table",
    "wording",
    "formats",
    "config",
    "reference",
    "kernels.problem",
    "kernels.cpu",
    "kernels.triton.counters",
    "kernels.triton.config",
    "kernels.triton.words",
    "kernels.triton.int8_kernel",
    "kernels.triton.*",
    "kernels.triton.launch",
    "kernels.triton",
    "kernels.dense",
    "kernels.registry",
    "kernels",
    "arguments",
    "registration",
    "expert_ops",
    "ops",
    "tensor.callers",
    "tensor.errors",
    "tensor.layout",
    "tensor.memory",
    "tensor.attributes",
    "tensor.pickles",
    "tensor.sharding",
    "tensor.quantized",
    "tensor.products",
    "tensor.attention",
    "tensor.views",
    "tensor.copies",
    "tensor.collectives",
    "tensor",
    "distributed",
    "integrations",
    "quantize.printing",
    "quantize.experts",
    "quantize.kinds",
    "quantize.selection",
    "quantize.by_layer",
    "quantize.report",
    "quantize.targets",
    "quantize.activations",
    "quantize.api",
    "quantize.estimate",
    "checkpoint.files",
    "checkpoint.rows",
    "checkpoint.sources",
    "checkpoint.hub",
    "checkpoint.foreign.names",
    "checkpoint.foreign.words",
    "checkpoint.foreign.written",
    "checkpoint.foreign.config_groups",
    "checkpoint.foreign.fp8",
    "checkpoint.foreign.gguf",
    "checkpoint.foreign.fp4",
    "checkpoint.foreign.awq",
    "checkpoint.foreign.gptq",
    "checkpoint.foreign.*",
    "checkpoint.foreign.auto_round",
    "checkpoint.foreign.reading",
    "checkpoint.foreign",
    "integrations.experts",
    "integrations.quantization_config",
    "integrations.diffusers",
    "integrations.transformers.models",
    "integrations.transformers.planes",
    "integrations.transformers.names",
    "integrations.transformers.folders",
    "integrations.transformers.on_the_fly",
    "integrations.transformers.language_model",
    "integrations.transformers.experts",
    "integrations.transformers.description",
    "integrations.transformers.files",
    "integrations.transformers",
    "pretrained",
    "checkpoint.fill",
    "checkpoint.gguf",
    "checkpoint.kept",
    "checkpoint.load",
    "checkpoint.rank0",
    "checkpoint.companions",
    "checkpoint.folders",
    "checkpoint.save",
    "checkpoint.card",
    "checkpoint.shards",
    "checkpoint.export_plan",
    "checkpoint.export",
    "checkpoint",
    "evaluation.decoding",
    "evaluation.perplexity",
    "evaluation.comparison",
    "evaluation.generation",
    "evaluation.tasks",
    "evaluation",
    "quantize.cost",
    "quantize.rounding",
    "quantize.moments",
    "quantize.in_step",
    "quantize.by_module",
    "quantize.written",
    "quantize.refine",
    "quantize.plan",
    "quantize.allocation",
    "quantize",
    "tuning",
    "integrations.options",
    "integrations.vllm.parameters",
    "integrations.vllm.*",
    "integrations.vllm.quantization",
    "integrations.vllm",
    "integrations.sglang",
    "integrations.plugins",
    "cli.screen",
    "cli.summary",
    "cli.models",
    "cli.recipe",
    "cli.quantize",
    "cli.measure",
    "cli.talk",
    "cli.kernels",
    "cli.arguments",
    "cli.main",
    "cli",
    "__main__",
]
# Imported in the functions that need them.
LAZY = {
    "triton",
    "transformers",
    "diffusers",
    "vllm",
    "sglang",
    "peft",
    "safetensors",
    "rich",
    "lm_eval",
    "gguf",
}
# Modules of Triton kernels, which import triton.
DEVICE_CODE = {
    f"kernels.triton.{name}"
    for name in ("words", "int8_kernel", "linear_kernel", "grouped_kernel", "planes_kernel", "launch")
}


def name_of(file):
    """`kernels/dense.py` -> `kernels.dense`, `kernels/__init__.py` -> `kernels`, `__init__.py` -> ``."""
    return (
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
    )


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
# An engine's plugin is made of subclasses of the engine's classes, is loaded by the engine only, and imports
# nothing else that is heavy.
PLUGINS = {
    name: engine
    for name in MODULES
    for engine in ("vllm", "sglang")
    if f"{name}.".startswith(f"integrations.{engine}.")
}


def layer(name):
    if name in LAYERS:
        return LAYERS.index(name)
    for i, entry in enumerate(LAYERS):
        if entry.endswith(".*") and name.startswith(entry[:-1]):
            return i
    return None


def imports(tree):
    """Full names of what the nodes of `tree` import; of `from a import b` both `a` and `a.b`, as b may be a
    module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(tree):
    """Names of the modules of this package that `tree` imports. Only a package's `__init__` may import from
    the whole package."""
    found = {
        name.removeprefix("rtn_tensor").removeprefix(".")
        for name in imports(tree)
        if name.split(".")[0] == "rtn_tensor"
    }
    found &= set(MODULES)
    # `from rtn_tensor.kernels import dense` imports kernels.dense; that it passes through kernels is no
    # import of it.
    return {
        name for name in found if not any(other.startswith(f"{name}.") for other in found) or name == ""
    } - {""}


def outside_functions(tree):
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            node.body = []
    return tree


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_go_up(name):
    below = layer(name)
    assert below is not None, f"{name} is in no layer; give it a line in LAYERS"
    for other in ours(ast.parse(MODULES[name].read_text())):
        above = layer(other)
        assert above is not None, f"{other} is in no layer"
        assert above < below, f"{name} imports {other}, which is not above it"
        assert PLUGINS.get(other) in (None, PLUGINS.get(name)), (
            f"{name} imports {other}, a plugin of an engine, which nothing here imports"
        )


@pytest.mark.parametrize("name", MODULES)
def test_heavy_imports_are_inside_functions(name):
    top = {
        imported.split(".")[0]
        for imported in imports(outside_functions(ast.parse(MODULES[name].read_text())))
    }
    assert not top & (LAZY - ({"triton"} if name in DEVICE_CODE else {PLUGINS.get(name)}))


def test_device_code_is_imported_inside_functions():
    for name in set(MODULES) - DEVICE_CODE:
        assert not ours(outside_functions(ast.parse(MODULES[name].read_text()))) & DEVICE_CODE


def test_the_checks_can_fail():
    inner = "    from transformers import x\n    from rtn_tensor.kernels.problem import y"
    tree = ast.parse(f"import rtn_tensor.cli\nfrom rtn_tensor import ops, rtn\ndef f():\n{inner}")
    assert ours(tree) == {"cli", "ops", "kernels.problem"}
    assert "transformers" in set(imports(tree))
    assert "transformers" not in set(imports(outside_functions(tree)))
    assert (
        layer("cli")
        > layer("ops")
        > layer("kernels")
        > layer("kernels.triton.linear_kernel")
        > layer("kernels.problem")
    )
    assert layer("new_module") is None


def test_import_is_silent_and_light():
    # torch and torchao import these three.
    heavy = sorted(LAZY - {"triton", "safetensors", "lm_eval"})
    program = (
        f"import sys, rtn_tensor; assert not set(sys.modules) & set({heavy}), set(sys.modules) & set({heavy})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_torch_and_torchao_are_enough():
    missing = ["numpy", "transformers", "safetensors", "rich", "accelerate"]
    program = f"""
import sys, warnings
for name in {missing}:
    sys.modules[name] = None
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
import torch
from rtn_tensor import quantize_, rtn_int4
from rtn_tensor.cli import main
model = torch.nn.Linear(64, 8)
quantize_(model, rtn_int4(32))
assert model(torch.ones(1, 64)).shape == (1, 8)
assert main(["explain"]) == 0
assert main(["inspect", "."]) == 1
"""
    strict = ["-W", "error", "-W", "ignore:rtn_tensor runs quantized layers in plain torch:UserWarning"]
    done = subprocess.run([sys.executable, *strict, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'rtn-tensor[cli]'" in done.stderr
