"""Arguments that a user may get wrong: one line on stderr that says what to do, before anything takes long."""

import pytest


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["inspect", ""], "inspect: error: argument path: the name is empty; give that of a file or folder"),
        (
            ["quantize", "", "new"],
            "quantize: error: argument src: the name is empty; give that of a file or folder",
        ),
        (
            ["quantize", "model", ""],
            "quantize: error: argument dst: the name is empty; give that of a file or folder",
        ),
        (
            ["perplexity", "model", "--text", ""],
            "perplexity: error: argument --text: the name is empty; give that of a file or folder",
        ),
        (
            ["inspect", "\udcff"],
            "inspect: error: argument path: '\\udcff' is not UTF-8; rename it, or type it in UTF-8",
        ),
        (
            ["generate", "model", "\udcff"],
            "generate: error: argument prompt: '\\udcff' is not UTF-8; rename it, or type it in UTF-8",
        ),
        (
            ["evaluate", "model", "--tasks", ""],
            "evaluate: error: argument --tasks: '' names no task; give one or more, as in lambada,piqa",
        ),
        (
            ["evaluate", "model", "--tasks", " ,"],
            "evaluate: error: argument --tasks: ' ,' names no task; give one or more, as in lambada,piqa",
        ),
        (
            ["evaluate", "model", "--limit", "0"],
            "evaluate: error: argument --limit: '0' is no whole number of 1 or more",
        ),
        (
            ["evaluate", "model", "--limit", "-1"],
            "evaluate: error: argument --limit: '-1' is no whole number of 1 or more",
        ),
        (
            ["evaluate", "model", "--batch-size", "0"],
            "evaluate: error: argument --batch-size: '0' is no whole number of 1 or more",
        ),
        (
            ["perplexity", "model", "--text", "text", "--max-tokens", "9" * 5000],
            f"perplexity: error: argument --max-tokens: '{'9' * 5000}' is no whole number of 1 or more",
        ),
        (
            ["tune", "--size", "4x4", "--tokens", "0"],
            "tune: error: argument --tokens: '0' is no whole number of 1 or more",
        ),
        (
            ["explain", "--device", "banana"],
            "explain: error: argument --device: device='banana' is no device; cpu and cuda are",
        ),
        (
            ["serve", "model", "--port", "70000"],
            "serve: error: argument --port: '70000' is no port; give a number from 1 to 65535",
        ),
        (["explain", "--m", "1.5"], "explain: error: argument --m: invalid int value: '1.5'"),
    ],
)
def test_usage(run_at_home, command, message):
    told = f"rtn-tensor {message}; `rtn-tensor {command[0]} --help` has examples\n"
    assert run_at_home(*command) == (2, "", told)


A_FILE = "it is a file; give the folder that it lies in, or to load() the module to fill, as model="
NO_CONFIG = "it has no config.json; add its model's, or give load() the module to fill, as model="


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["inspect", "text"], f"text is not a model folder: {A_FILE}"),
        (["inspect", "/dev/null"], f"/dev/null is not a model folder: {NO_CONFIG}"),
        (["generate", "text", "We"], f"text is not a model folder: {A_FILE}"),
        (
            ["perplexity", "model", "--text", "model"],
            "cannot read model (Is a directory); --text takes a UTF-8 text file",
        ),
        (
            ["perplexity", "model", "--text", "empty"],
            "got 0 tokens and window=1024; both must be at least 2, as a token is scored given another",
        ),
        (
            ["quantize", "model", "new", "--rules", "binary"],
            "cannot read binary (invalid start byte); --rules takes a JSON file",
        ),
        (["quantize", "model", "text/new"], "text is no folder; choose another place for new"),
        (
            ["quantize", "model", "text", "--force"],
            "text is no folder, and only a model's folder is replaced; choose another name, or remove it "
            "yourself",
        ),
        (["quantize", "model", "x" * 300], f"{'x' * 300}: File name too long; choose a shorter name"),
        (["generate", "model", "We", "--max-new-tokens", "-1"], "max_new_tokens=-1; it must be at least 1"),
        (["explain", "--m", "-1"], "M=-1, N=4096, K=4096: sizes cannot be negative"),
        (
            ["tune", "--size", "4x4", "--group-size", "7"],
            "group_size=7 is not supported; use a multiple of 32 (32, 64 and 128 are usual), or -1 for one "
            "group per row",
        ),
    ],
)
def test_mistakes(run_at_home, home, command, message):
    before = sorted(home.iterdir())
    assert run_at_home(*command) == (1, "", f"rtn-tensor: error: {message}\n")
    assert sorted(home.iterdir()) == before


def test_rules_that_nest_too_deeply(run_at_home, tmp_path):
    (tmp_path / "rules").write_text("[" * 100_000)
    status, out, err = run_at_home("quantize", "model", tmp_path / "new", "--rules", tmp_path / "rules")
    assert (status, out) == (1, "")
    assert (
        err
        == f"rtn-tensor: error: {tmp_path}/rules is no JSON (it nests too deeply); --rules takes a list of "
        "[pattern, format]\n"
    )
