import pytest
from expecttest import assert_expected_inline

from rtn_tensor.cli import main


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # argparse wraps help there


def help_of(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main([*args, "--help"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_help(capsys):
    assert_expected_inline(
        help_of(capsys),
        """\
usage: rtn-tensor [-h] [--version] [--print-completion SHELL] COMMAND ...

Round-to-nearest int4 and int8 weights: no data, no calibration, seconds.

positional arguments:
  COMMAND
    quantize            Quantize a transformers model into a folder.
    plan                Choose a format for each layer under a budget of bits, on text that the
                        model writes itself.
    export              Write a quantized model for other engines, with the same integers and
                        scales.
    inspect             List every weight of a model: shape, bits, bytes.
    perplexity          Measure a model's perplexity on a text, by sliding window.
    compare             Compare a quantized model with the one that it was made of: size, speed,
                        perplexity, divergence.
    evaluate            Score a model in zero-shot tasks, alone or beside another, by lm-
                        evaluation-harness.
    generate            Continue a prompt.
    chat                Talk with a model.
    serve               Serve a model by transformers, as OpenAI's API has it.
    explain             Say which kernel runs a layer, and why each other does not.
    tune                Measure how the GPU's kernels are best launched, for a model or sizes of
                        weights, and remember it.

options:
  -h, --help            show this help message and exit
  --version             show program's version number and exit
  --print-completion SHELL
                        print what completes these words in bash, zsh, tcsh or fish

examples:
  rtn-tensor quantize Qwen/Qwen3-0.6B qwen3-int4           4 bits, in seconds
  rtn-tensor quantize Qwen/Qwen3-0.6B qwen3-int4 --refine  the same size, more accurate, in minutes
  rtn-tensor chat qwen3-int4
  rtn-tensor compare qwen3-int4 Qwen/Qwen3-0.6B --text a-text-of-yours.txt
  rtn-tensor serve qwen3-int4                              an OpenAI-compatible endpoint

exit status: 0; 1 after an error, which is one line on stderr; 2 for arguments that cannot be;
130 after Ctrl-C, 143 after SIGTERM
""",
    )


def test_help_quantize(capsys):
    assert_expected_inline(
        help_of(capsys, "quantize"),
        """\
usage: rtn-tensor quantize [-h] [--json] [--bits {4,8}] [--group-size GROUP_SIZE]
                           [--scheme {W4A16,W4A16_ASYM,W8A16,W4A8,W8A8}]
                           [--scale-method {absmax,signed,search,minmax,search8}]
                           [--activations {int8}] [--skip PATTERN] [--embedding]
                           [--language-model-only] [--rule PATTERN=FORMAT] [--rules FILE]
                           [--bits-per-weight B] [--refine] [--refine-on FILE] [--recipe FILE]
                           [--dry-run] [--verbose] [--push-to-hub NAME]
                           [--format {rtn,compressed-tensors,gptq,gguf}] [--like FILE] [--force]
                           src dst

Quantize a transformers model into a folder.

positional arguments:
  src                   folder of the model, or its name on the hub, as owner/name or
                        owner/name@revision
  dst                   folder to write, or .gguf file; must not exist, unless --force is given

options:
  -h, --help            show this help message and exit
  --json                print JSON
  --bits {4,8}          bits per weight (default: 4; those of GPTQ and the like are kept as they
                        are)
  --group-size GROUP_SIZE
                        weights that share a scale: a multiple of 32, or -1 for a whole row
                        (default: 64 at 4 bits, 128 at 8)
  --scheme {W4A16,W4A16_ASYM,W8A16,W4A8,W8A8}
                        bits of weights and activations by a name of vLLM's and llm-compressor's,
                        in place of --bits
  --scale-method {absmax,signed,search,minmax,search8}
                        how a group's scale is found (default: search at 4 bits, absmax at 8)
  --activations {int8}  what products round their activations to (default: they stay as they are)
  --skip PATTERN        layers to keep float, as in 'model.layers.0.*'; may repeat
  --embedding           quantize the embedding and lm_head too
  --language-model-only
                        keep float what is no part of the language model, as a vision tower and
                        its projector
  --rule PATTERN=FORMAT
                        a format of their own for some layers, as in '*.down_proj=8',
                        '*.0.*=4,32,signed' or 'lm_head=float'; may repeat, and the first that
                        matches counts
  --rules FILE          JSON of such rules, as in [["*.down_proj", {"bits": 8}]]
  --bits-per-weight B   spread so many bits per weight, scales included, by what each layer costs,
                        as `plan` does; minutes
  --refine              round so that errors make up for one another, on text that the model
                        writes itself; minutes
  --refine-on FILE      with --refine, a UTF-8 text to use in place of its own
  --recipe FILE         YAML or JSON of these options, as in 'bits: 4', which others add to; dst
                        gets one
  --dry-run             only say what would come of it, and its size
  --verbose             a line for each weight, and not for each kind of layer
  --push-to-hub NAME    also upload dst, as owner/name, with a model card
  --format {rtn,compressed-tensors,gptq,gguf}
                        rtn is this library's own; vLLM, SGLang and transformers read compressed-
                        tensors; vLLM, SGLang and GPTQModel gptq; llama.cpp, Ollama and LM Studio
                        gguf (default: rtn)
  --like FILE           for gguf, a GGUF file of the same model, which gives the tokenizer and the
                        metadata
  --force               replace dst, once the new one is whole

examples:
  rtn-tensor quantize Qwen/Qwen3-0.6B out --scheme W8A16
  rtn-tensor quantize Qwen/Qwen3-0.6B out --dry-run
  rtn-tensor quantize Qwen/Qwen3-0.6B out --rule '*.down_proj=8' --skip 'model.layers.0.*'
  rtn-tensor quantize Qwen/Qwen3-0.6B out --bits-per-weight 4.5 --refine
  rtn-tensor quantize Qwen/Qwen3-0.6B out --format compressed-tensors --push-to-hub me/qwen3-int4
""",
    )


def test_help_inspect(capsys):
    assert_expected_inline(
        help_of(capsys, "inspect"),
        """\
usage: rtn-tensor inspect [-h] [--json] [--verbose] path

List every weight of a model: shape, bits, bytes.

positional arguments:
  path        folder of the model, quantized or not, or its name on the hub, as owner/name or
              owner/name@revision

options:
  -h, --help  show this help message and exit
  --json      print JSON
  --verbose   a line for each weight, and not for each kind of layer

examples:
  rtn-tensor inspect qwen3-int4
  rtn-tensor inspect Qwen/Qwen3-0.6B --verbose
""",
    )


def test_help_perplexity(capsys):
    assert_expected_inline(
        help_of(capsys, "perplexity"),
        """\
usage: rtn-tensor perplexity [-h] [--json] --text FILE [--window WINDOW] [--max-tokens T]
                             [--stride STRIDE] [--activations {int8}]
                             path

Measure a model's perplexity on a text, by sliding window.

positional arguments:
  path                  folder of the model, quantized or not, or its name on the hub, as
                        owner/name or owner/name@revision

options:
  -h, --help            show this help message and exit
  --json                print JSON
  --text FILE           UTF-8 text
  --window WINDOW       tokens the model sees at once (default: 1024)
  --max-tokens T        use only the first tokens of the text
  --stride STRIDE       tokens from one window to the next (default: 512)
  --activations {int8}  what a quantized model rounds its activations to (default: as it was
                        saved)

example:
  rtn-tensor perplexity qwen3-int4 --text a-text-of-yours.txt --max-tokens 4096
""",
    )


def test_help_evaluate(capsys):
    assert_expected_inline(
        help_of(capsys, "evaluate"),
        """\
usage: rtn-tensor evaluate [-h] [--json] [--tasks LIST] [--against FOLDER] [--limit N]
                           [--data FOLDER] [--batch-size B] [--text FILE] [--max-tokens T]
                           [--activations {int8}]
                           path

Score a model in zero-shot tasks, alone or beside another, by lm-evaluation-harness.

positional arguments:
  path                  folder of the model, quantized or not, or its name on the hub, as
                        owner/name or owner/name@revision

options:
  -h, --help            show this help message and exit
  --json                print JSON
  --tasks LIST          comma-separated names of the harness, or perplexity (default:
                        lambada,hellaswag,arc_easy,arc_challenge,piqa,winogrande)
  --against FOLDER      a model of which to give the recovery rate, scored on the same items
  --limit N             use only the first items of each task
  --data FOLDER         folder of TASK.jsonl, the rows of each dataset; else they come from the
                        hub
  --batch-size B        options scored at once (default: 8)
  --text FILE           UTF-8 text, for perplexity: windows of 1024 tokens, 512 apart
  --max-tokens T        use only the first tokens of the text
  --activations {int8}  what a quantized model rounds its activations to (default: as it was
                        saved); of path, not of --against

examples:
  rtn-tensor evaluate qwen3-int4 --tasks piqa,arc_easy --limit 200
  rtn-tensor evaluate qwen3-int4 --against Qwen/Qwen3-0.6B
""",
    )


def test_help_generate(capsys):
    assert_expected_inline(
        help_of(capsys, "generate"),
        """\
usage: rtn-tensor generate [-h] [--json] [--raw] [--max-new-tokens T] [--temperature TEMPERATURE]
                           [--top-p TOP_P] [--seed SEED] [--compile] [--activations {int8}]
                           path prompt

Continue a prompt.

positional arguments:
  path                  folder of the model, quantized or not, or its name on the hub, as
                        owner/name or owner/name@revision
  prompt                text; the user's turn, if the model has a chat template

options:
  -h, --help            show this help message and exit
  --json                print JSON
  --raw                 continue the text as it is, without a chat template
  --max-new-tokens T    stop after this many (default: 64)
  --temperature TEMPERATURE
                        draw tokens, those of low probability more often the higher it is
                        (default: the likeliest)
  --top-p TOP_P         draw among the likeliest of so much probability
  --seed SEED           draw the same each time
  --compile             compile the decoding step first, which takes about a minute
  --activations {int8}  what a quantized model rounds its activations to (default: as it was
                        saved)

examples:
  rtn-tensor generate qwen3-int4 "Why is the sky blue?" --max-new-tokens 200
  rtn-tensor generate qwen3-int4 "Once upon a time" --raw --temperature 0.8 --top-p 0.95
""",
    )


def test_help_explain(capsys):
    assert_expected_inline(
        help_of(capsys, "explain"),
        """\
usage: rtn-tensor explain [-h] [--json] [--bits {4,8}] [--group-size GROUP_SIZE]
                          [--activations {int8}] [--op OP] [--device DEVICE]
                          [--dtype {float32,bfloat16,float16}] [--m M] [--n N] [--k K]

Say which kernel runs a layer, and why each other does not.

options:
  -h, --help            show this help message and exit
  --json                print JSON
  --bits {4,8}          bits per weight (default: 4)
  --group-size GROUP_SIZE
                        weights that share a scale: a multiple of 32, or -1 for a whole row
                        (default: 64 at 4 bits, 128 at 8)
  --activations {int8}  what the weight rounds its activations to
  --op OP               linear, linear_dx, grouped, embedding, quantize, ... (default: linear)
  --device DEVICE       device of the weight (default: cpu)
  --dtype {float32,bfloat16,float16}
                        dtype of the activations (default: bfloat16)
  --m M                 rows of activations (default: 1)
  --n N                 out_features (default: 4096)
  --k K                 in_features (default: 4096)

example:
  rtn-tensor explain --bits 4 --m 16 --n 4096 --k 4096
""",
    )
