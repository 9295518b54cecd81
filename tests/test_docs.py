"""Every block of README and docs/ and every tutorial runs as it stands; links and what is generated hold."""

import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from peft_version import skip_if_transformers_refuses_it
from tiny_llama import tiny_tokenizer

import rtn_tensor
from benchmarks.downloads import ModelUnavailable
from benchmarks.real_data import state_of_the_union, task_data
from benchmarks.real_model import CACHE, MODEL, smollm2, smollm2_gguf

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# torch itself still calls what it deprecates when inductor is imported; and all runs without a compiler, too.
ALLOWED = [
    "ignore:`torch.jit.script_method` is deprecated",
    "ignore:rtn_tensor runs quantized layers in plain torch:UserWarning",
]
STRICT = ["-W", "error", *(argument for allowed in ALLOWED for argument in ("-W", allowed))]
# All pages in one process, one after another, each in a folder and a namespace of its own: most of the time
# would go into imports.
RUNNER = """
import contextlib, io, json, os, sys, traceback

failed = {}
for name, program in json.load(sys.stdin).items():
    os.chdir(name)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(program, name, "exec"), {"__name__": "__main__"})
    except BaseException:
        failed[name] = traceback.format_exc()
    os.chdir("..")
print(json.dumps(failed))
"""


def blocks(page: Path, kind: str) -> list[str]:
    return [
        text
        for found, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        if found == kind
    ]


def commands(page: Path, program: str) -> list[str]:
    return [line for text in blocks(page, "sh") for line in text.splitlines() if program_of(line) == program]


def program_of(line: str) -> str | None:
    """What a line of a shell runs, be it a clone's own, after the variables that it sets."""
    words = (word for word in line.split() if not re.match(r"\w+=", word))
    return next(words, "").removeprefix(".venv/bin/") or None


def run(command: list[str], cwd: Path, text: str | None = None, **environment: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, input=text)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --------------------------------------------------------------------- Python and commands

WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    """By page, the traceback of its Python blocks, run in order as a reader would type them, beside
    `my-model`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    top = tmp_path_factory.mktemp("pages")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1000}
    model = LlamaForCausalLM(LlamaConfig(**shape)).bfloat16()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for page in WITH_PYTHON:
        model.save_pretrained(top / page.stem / "my-model")
        tokenizer.save_pretrained(top / page.stem / "my-model")
    programs = {page.stem: "\n".join(blocks(page, "python")) for page in WITH_PYTHON}
    return json.loads(
        run([sys.executable, *STRICT, "-c", RUNNER], top, json.dumps(programs)).splitlines()[-1]
    )


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_python(page, failures):
    assert "from rtn_tensor import" in blocks(page, "python")[0]  # a page can be read by itself
    if page.stem in failures and "add_adapter" in failures[page.stem]:
        skip_if_transformers_refuses_it()
    assert page.stem not in failures, failures[page.stem]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_page_has_only_kinds_of_blocks_that_are_run_here(page):
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"^```(\w*)$", text, re.M)) <= {"python", "sh", "text", ""}
    assert text.count("\n```") % 2 == 0
    shell = "".join(blocks(page, "sh")).splitlines()
    known = {"make", "pip", "python", "rtn-tensor", "vllm", "hf"}
    assert {program_of(line) for line in shell if line} <= known
    for line in commands(page, "python"):
        what = line.split()[1]
        assert what in ("-c", "-m") or (ROOT / what).is_file()


def test_readme_is_short_and_names_the_tests():
    readme = PAGES[0].read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 160
    assert "make test" in commands(PAGES[0], "make")
    assert "make test\n" in (ROOT / ".ci/run").read_text()


WITH_COMMANDS = [page for page in PAGES if commands(page, "rtn-tensor")]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_commands(page, tmp_path):
    if any(" evaluate " in line for line in commands(page, "rtn-tensor")):
        pytest.importorskip(
            "lm_eval", reason="lm-evaluation-harness, which one of them runs, is not installed"
        )
    try:
        smollm2(), smollm2_gguf(), state_of_the_union(), task_data()
    except ModelUnavailable as reason:
        pytest.skip(str(reason))
    (tmp_path / ".cache").symlink_to(CACHE)
    (tmp_path / "my-model").symlink_to(MODEL)
    for command in commands(page, "rtn-tensor"):
        assert run([sys.executable, "-m", "rtn_tensor", *shlex.split(command)[1:]], tmp_path).strip()


def test_every_command_is_shown():
    shown = {line.split()[1] for page in WITH_COMMANDS for line in commands(page, "rtn-tensor")}
    assert {"quantize", "export", "inspect", "generate", "perplexity", "evaluate", "explain"} <= shown


# ------------------------------------------------------------ links, and what is generated


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {
        re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())
        for title in re.findall(r"^#+ (.+)$", text, re.M)
    }


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=named)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            other = page.parent / path if path else page
            assert other.is_file(), f"{target} leads nowhere"
            assert not anchor or anchor in anchors(other), f"{target} leads nowhere"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_are_named_are_there(page):
    named_here = re.findall(
        r"`((?:tests|tutorials|benchmarks|rtn_tensor|docs)/[\w/.*-]+)`", page.read_text(encoding="utf-8")
    )
    for name in named_here:
        assert list(ROOT.glob(name)) or name.endswith("librtn.so"), f"{name} is not there"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_names_that_are_mentioned_are_there(page):
    for name in re.findall(r"`(rtn_tensor(?:\.[A-Za-z_]\w*)+)", page.read_text(encoding="utf-8")):
        pkgutil.resolve_name(name)


def test_every_page_is_in_the_navigation_and_every_public_name_in_the_reference():
    site = (ROOT / "mkdocs.yml").read_text()
    assert set(re.findall(r": ([\w-]+\.md)$", site, re.M)) == {page.name for page in PAGES[1:]}
    reference = re.findall(r"^::: rtn_tensor\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert sorted(reference) == sorted(rtn_tensor.__all__)


def test_the_page_of_the_command_line_is_current():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import command_line
    finally:
        sys.path.pop(0)
    assert command_line.PAGE.read_text(encoding="utf-8") == command_line.page(), (
        "`python docs/command_line.py` writes it anew"
    )


# ------------------------------------------------------------------------------- tutorials


@pytest.mark.parametrize("tutorial", sorted((ROOT / "tutorials").glob("*.py")), ids=lambda path: path.stem)
def test_tutorial(tutorial, tmp_path):
    text = tutorial.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert sum(1 for line in lines if line.strip() and not line.lstrip().startswith("#")) < 80  # of code
    if "add_adapter" in text:
        skip_if_transformers_refuses_it()
    how, file = lines[2].rsplit(maxsplit=1)
    assert file == f"tutorials/{tutorial.name}"
    if how == "python":
        assert run([sys.executable, *STRICT, str(tutorial)], tmp_path)
    else:  # its processes inherit no -W
        torchrun, *options = how.split()
        assert torchrun == "torchrun"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, str(tutorial)]
        assert run(command, tmp_path, PYTHONWARNINGS=",".join(["error", *ALLOWED]))
