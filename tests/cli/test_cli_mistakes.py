"""What a user may get wrong besides the arguments: one line on stderr that says what to do, before anything
takes long, and nothing else happens."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny_llama import tiny_tokenizer


@pytest.mark.parametrize(
    "task", [["generate", "We the people"], ["perplexity", "--text", "text"]], ids=["generate", "perplexity"]
)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "t5",
            "T5ForConditionalGeneration is an encoder-decoder, which does not continue a text; give a "
            "causal language model",
        ),
        (
            "bert",
            "BertForMaskedLM does not predict the next token; give a causal language model, as of a "
            "class ...ForCausalLM",
        ),
        (
            "bert-lm",
            "BertLMHeadModel predicts a token from those after it, too, so that neither its perplexity nor "
            "what it writes means anything; "
            "give a causal language model (where it can be one, with is_decoder in its config)",
        ),
    ],
)
def test_models_that_are_not_causal(run_at_home, task, model, message):
    assert run_at_home(task[0], model, *task[1:]) == (1, "", f"rtn-tensor: error: {message}\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["generate", "model", "We", "--max-new-tokens", "300"],
            "the prompt has 1 tokens and max_new_tokens=300, and LlamaForCausalLM has 256 positions "
            "(max_position_embeddings); "
            "use max_new_tokens=255 or less",
        ),
        (
            ["generate", "model", "x" * 400],
            "the prompt has 400 tokens and max_new_tokens=64, and LlamaForCausalLM has 256 positions "
            "(max_position_embeddings); "
            "shorten it to less than 256 tokens",
        ),
        (
            ["perplexity", "model", "--text", "long"],
            "window=1024, and LlamaForCausalLM has 256 positions (max_position_embeddings); use a window of "
            "256 or less, and a stride no "
            "larger",
        ),
    ],
)
def test_more_tokens_than_positions(run_at_home, command, message):
    assert run_at_home(*command) == (1, "", f"rtn-tensor: error: {message}\n")


def test_as_many_tokens_as_positions(run_at_home):
    assert run_at_home("generate", "model", "We", "--max-new-tokens", "3")[0] == 0
    assert (
        run_at_home(
            "perplexity",
            "model",
            "--text",
            "long",
            "--window",
            "256",
            "--stride",
            "256",
            "--max-tokens",
            "300",
        )[0]
        == 0
    )


# ------------------------------------------------------------------------- spoiled folders


@pytest.mark.parametrize(
    "template",
    ["{% if %}", "{{ raise_exception('no system role') }}", "{{ messages[0].a.b }}", "{{ 1 + messages }}"],
)
def test_a_chat_template_that_fails(run_at_home, copy, template):
    (copy / "chat_template.jinja").write_text(template)
    status, out, err = run_at_home("generate", copy, "We")
    assert (status, out) == (1, "")
    assert err.startswith("rtn-tensor: error: the tokenizer's chat template fails (")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": 1}'),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_tokenizer_that_is_none(run_at_home, copy, file, text):
    (copy / file).write_text(text)
    for command in (["generate", copy, "We"], ["perplexity", copy, "--text", "text"]):
        status, out, err = run_at_home(*command)
        assert (status, out) == (1, "")
        assert err.startswith(
            f"rtn-tensor: error: {copy} has no tokenizer that can be read; copy the "
            "model's tokenizer files there ("
        )
        assert err.count("\n") == 1


def test_a_tokenizer_of_more_tokens_than_the_model_has(run_at_home, copy):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"unheard of {i}" for i in range(320 - len(tokenizer))] + ["people"])
    tokenizer.save_pretrained(copy)
    message = "rtn-tensor: error: token 320 is none of the 320 of the model's vocabulary; use the tokenizer that came with the model\n"
    assert run_at_home("generate", copy, "We the people") == (1, "", message)
    assert run_at_home("perplexity", copy, "--text", "text") == (1, "", message)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_config_that_is_none(run_at_home, copy, tmp_path, text):
    (copy / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    for command in (
        ["inspect", copy],
        ["generate", copy, "We"],
        ["quantize", copy, tmp_path / "new"],
        ["tune", "--model", copy],
    ):
        status, out, err = run_at_home(*command)
        assert (status, out) == (1, "")
        assert err.startswith(f"rtn-tensor: error: {copy / 'config.json'}")
        assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_no_code_of_the_folders_is_run_or_asked_for(run_at_home, copy, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    (copy / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    changed = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.C", None]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer | changed))
    status, out, err = run_at_home("generate", copy, "We")
    assert (status, out) == (1, "")
    assert "code of its own (auto_map), which is never run here" in err
    config = json.loads((copy / "config.json").read_text())
    changed = {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C"}}
    (copy / "config.json").write_text(json.dumps(config | changed))
    for command in (["inspect", copy], ["quantize", copy, tmp_path / "new"]):
        status, out, err = run_at_home(*command)
        assert (status, out) == (1, "")
        assert err.count("\n") == 1
        # What transformers advises no command takes.
        assert "its model is code of the folder's own (auto_map), which is never run here; read it" in err
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------- evaluate


@pytest.mark.parametrize("against", ["nowhere", "text", "bert", "broken"])
def test_both_models_are_looked_at_before_one_is_scored(run_at_home, home, tmp_path, monkeypatch, against):
    monkeypatch.setattr("rtn_tensor.cli.models.load", lambda path: pytest.fail(f"{path} was loaded"))
    broken = shutil.copytree(home / "model", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    other = broken if against == "broken" else against
    status, out, err = run_at_home(
        "evaluate", "model", "--tasks", "perplexity", "--text", "text", "--against", other
    )
    assert (status, out) == (1, "")
    assert err.count("\n") == 1


def test_other_tokens_cannot_be_compared(run_at_home, copy):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["people"])
    tokenizer.save_pretrained(copy)
    message = f"model and {copy} make other tokens of the text, so that their perplexities cannot be compared"
    command = ["evaluate", "model", "--tasks", "perplexity", "--text", "text", "--against", copy]
    assert run_at_home(*command) == (1, "", f"rtn-tensor: error: {message}\n")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "is empty; each line is a row of the dataset, as JSON"),
        (
            "{}\nno",
            ", line 2: Expecting value: line 1 column 1 (char 0); each line is a row of the dataset, as JSON",
        ),
        ("[1]", ", line 1: it is no JSON object; each line is a row of the dataset, as JSON"),
    ],
)
def test_rows_that_are_none(run_at_home, tmp_path, rows, message):
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed; pip install 'rtn-tensor[evaluate]'"
    )
    (tmp_path / "lambada.jsonl").write_text(rows)
    status, out, err = run_at_home("evaluate", "model", "--tasks", "lambada", "--data", tmp_path)
    assert (status, out) == (1, "")
    assert (
        err == f"rtn-tensor: error: {tmp_path / 'lambada.jsonl'}{'' if message[0] == ',' else ' '}{message}\n"
    )


# ------------------------------------------------------ streams, and what was not foreseen


def shell(command, **env):
    """Runs `command` in a shell where $RTN is the command line."""
    env = os.environ | {"RTN": f"{sys.executable} -m rtn_tensor"} | env
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)
    return done.returncode, done.stdout, done.stderr


def test_a_stdout_that_takes_nothing():
    full = "rtn-tensor: error: stdout cannot be written to (No space left on device); redirect it elsewhere\n"
    assert shell("$RTN explain > /dev/full") == (1, "", full)
    status, _, err = shell("$RTN explain >&-")
    assert (status, err) == (
        1,
        "rtn-tensor: error: stdout is closed, so that nothing can be printed; redirect it to a file or to "
        "/dev/null\n",
    )
    assert shell("$RTN explain --help | true; echo ${PIPESTATUS[0]}") == (0, "0\n", "")


def test_a_stderr_that_nobody_reads_stops_nothing(home, tmp_path):
    """As in `quantize ... 2>&1 | head -1`."""
    command = "$RTN quantize model $NEW 2> >(exec 0<&-; sleep 0) > /dev/null; $RTN quantize model $NEW.2 2>&- > /dev/null"
    assert shell(f"cd {home}; {command}", NEW=str(tmp_path / "new"))[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"new", "new.2"}
    assert (tmp_path / "new" / "tokenizer.json").exists()


def test_letters_that_the_locale_has_not(home):
    status, out, err = shell(
        f"cd {home}; $RTN generate model 'We the people' --max-new-tokens 30", PYTHONIOENCODING="ascii"
    )
    assert status == 0
    assert err.startswith("Loading model\n30 tokens in ")
    assert "\\u" in out or "\\x" in out


def test_what_was_not_foreseen(run_at_home, monkeypatch):
    def fails(**kwargs):
        raise KeyError("x")

    monkeypatch.setattr("rtn_tensor.cli.kernels.explain", fails)
    assert run_at_home("explain") == (
        1,
        "",
        f"rtn-tensor: error: KeyError: 'x'; `{sys.executable} -X dev -m rtn_tensor` and the same words show "
        "where\n",
    )


def test_ctrl_c(run_at_home, monkeypatch):
    def stopped(**kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rtn_tensor.cli.kernels.explain", stopped)
    assert run_at_home("explain") == (130, "", "rtn-tensor: stopped by SIGINT\n")


def test_names_cannot_command_a_terminal(run_at_home):
    status, _, err = run_at_home("inspect", "\x1b[2Jhere")
    assert status == 1
    assert err.startswith("rtn-tensor: error: \\x1b[2Jhere is not a model folder")
