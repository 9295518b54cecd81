"""A model by other 4-bit methods, each as a folder of its dequantized weights, for
`benchmarks.accuracy --peer` and `benchmarks.four_bits --peer`.

    python -m benchmarks.accuracy_peers METHOD FOLDER [--model smollm2|whisper|minilm]

| METHOD | by | format, in groups of 64 | data |
|---|---|---|---|
| gptq | llm-compressor | symmetric, 4.25 bits per weight | 64 runs of 512 tokens |
| awq | llm-compressor | symmetric, 4.25 | 64 runs of 512 tokens |
| auto-round | auto-round, 50 iterations | symmetric, 4.25 | 64 runs of 512 tokens |
| auto-round-rtn | auto-round, no iterations | symmetric, 4.25 | none |
| hqq | hqq | asymmetric, 4.5 | none |
| sinq | sinq | asymmetric, 4.5, and a scale per column | none |

Needs llmcompressor, auto-round, hqq or sinq, which may want other versions of torch and transformers than
ours, and none of our code. What needs data has it from the Wikipedia text, from where the 8192 tokens that
`benchmarks.accuracy` measures have long ended; only SmolLM2 is given to these.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, WhisperForConditionalGeneration

from benchmarks.real_data import wikipedia
from benchmarks.real_model import minilm, smollm2, whisper

SAMPLES, LENGTH, SKIPPED = 64, 512, 200_000  # SKIPPED: characters
GROUP = 64
MODELS: dict[str, Any] = {
    "smollm2": lambda: AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16),
    "whisper": lambda: WhisperForConditionalGeneration.from_pretrained(whisper(), dtype=torch.float16),
    "minilm": lambda: AutoModel.from_pretrained(minilm(), dtype=torch.float16),
}
OUTPUTS = {"lm_head", "proj_out"}  # stay float


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in OUTPUTS
    }


def runs() -> torch.Tensor:
    """[SAMPLES, LENGTH]"""
    text = wikipedia()[SKIPPED : SKIPPED + 10 * SAMPLES * LENGTH]
    ids = AutoTokenizer.from_pretrained(smollm2())(text, verbose=False)["input_ids"]
    return torch.tensor(ids)[: SAMPLES * LENGTH].view(SAMPLES, LENGTH)


def _oneshot(model: Any, recipe: Any) -> Any:
    from datasets import Dataset
    from llmcompressor import oneshot

    ids = runs()
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=LENGTH, num_calibration_samples=SAMPLES)
    return model  # whose weights it leaves dequantized


def _groups() -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    return {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def gptq(model: Any) -> Any:
    from llmcompressor.modifiers.gptq import GPTQModifier

    return _oneshot(model, GPTQModifier(**_groups()))


def awq(model: Any) -> Any:
    from compressed_tensors.quantization import forward
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if not torch.cuda.is_available():  # where llm-compressor 0.14 pins memory all the same
        torch.Tensor.pin_memory = lambda self, device=None: self
    _oneshot(model, [AWQModifier(duo_scaling=True), QuantizationModifier(**_groups())])
    for layer in layers(model).values():
        layer.weight.data = forward.fake_quantize(
            layer.weight.data,
            layer.weight_scale,
            getattr(layer, "weight_zero_point", None),
            layer.quantization_scheme.weights,
        )
    return model


def auto_round(model: Any, iterations: int) -> Any:
    import tempfile

    from auto_round import AutoRound

    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in runs()]
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(smollm2()),
        scheme="W4A16",
        group_size=GROUP,
        iters=iterations,
        disable_opt_rtn=True,  # which takes the importance of columns from data
        nsamples=SAMPLES,
        seqlen=LENGTH,
        dataset=data if iterations else None,
        device_map="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        rounding.quantize_and_save(folder, format="fake")
        (saved,) = {config.parent for config in Path(folder).rglob("config.json")}
        return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)


def hqq(model: Any) -> Any:
    from hqq.core.quantize import Quantizer

    for layer in layers(model).values():
        dtype = layer.weight.dtype
        # Axis 1: groups along a row.
        options = {"nbits": 4, "group_size": GROUP, "axis": 1, "device": "cpu", "compute_dtype": dtype}
        made = Quantizer.dequantize(*Quantizer.quantize(layer.weight.data.float(), **options))
        layer.weight.data = made.to(dtype).view_as(layer.weight)
    return model


def sinq(model: Any) -> Any:
    from sinq.sinqlinear import SINQLinear, sinq_base_quant_config

    options = sinq_base_quant_config(nbits=4, group_size=GROUP, tiling_mode="1D", method="sinq")
    for layer in layers(model).values():
        dtype = layer.weight.dtype
        made = SINQLinear(layer, options, del_orig=False, compute_dtype=dtype, device="cpu")
        layer.weight.data = made.dequantize().to(dtype).view_as(layer.weight)
    return model


METHODS = {
    "gptq": gptq,
    "awq": awq,
    "auto-round": partial(auto_round, iterations=50),
    "auto-round-rtn": partial(auto_round, iterations=0),
    "hqq": hqq,
    "sinq": sinq,
}
DATA_FREE = ("hqq", "sinq")  # and of any model
AS_THEY_ARE = ("gptq", "auto-round", "auto-round-rtn", "hqq")  # weights that have no scale per column


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy_peers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    args = parser.parse_args()
    if args.model != "smollm2" and args.method not in DATA_FREE:
        parser.error(f"{args.method} is made of smollm2 only")
    started = time.perf_counter()
    made = METHODS[args.method](MODELS[args.model]().eval())
    print(f"{time.perf_counter() - started:.0f} s")
    plain = MODELS[args.model]()
    for name in layers(made):
        before, after = (
            each.get_submodule(name).get_parameter("weight").data.float() for each in (plain, made)
        )
        levels = max(len(group.unique()) for group in after.unflatten(1, (-1, GROUP)).flatten(0, 1)[:50])
        if args.method in AS_THEY_ARE and levels > 16:
            raise RuntimeError(
                f"{name}: a group of {GROUP} holds {levels} values, more than 4 bits can tell apart"
            )
        error = (after - before).norm() / before.norm()
        print(f"{name}: at most {levels} values per group, relative error {error:.4f}")
    known = plain.state_dict().keys()
    plain.load_state_dict({name: t for name, t in made.state_dict().items() if name in known})
    plain.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
