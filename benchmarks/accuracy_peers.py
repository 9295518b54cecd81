"""SmolLM2-135M by other 4-bit methods, each as a bf16 transformers folder of its dequantized weights, for
`benchmarks.accuracy --peer`.

    python -m benchmarks.accuracy_peers gptq FOLDER    llm-compressor: symmetric, group_size 64, 4.25 bits per
    weight, calibrated python -m benchmarks.accuracy_peers hqq FOLDER     hqq: asymmetric, group_size 64, 4.5
    bits per weight, no data

Needs llmcompressor or hqq, which may want other versions of transformers than ours, and none of our code.
GPTQ is calibrated on 64 runs of 512 tokens of the Wikipedia text, from where the 8192 tokens that
`benchmarks.accuracy` measures have long ended.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real_model import smollm2, wikipedia

SAMPLES, LENGTH, SKIPPED = 64, 512, 200_000  # SKIPPED: characters


def layers(model) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def gptq(model) -> dict[str, torch.Tensor]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    text = wikipedia()[SKIPPED : SKIPPED + 10 * SAMPLES * LENGTH]
    ids = torch.tensor(AutoTokenizer.from_pretrained(smollm2())(text, verbose=False)["input_ids"])[
        : SAMPLES * LENGTH
    ].view(SAMPLES, LENGTH)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    recipe = GPTQModifier(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=LENGTH, num_calibration_samples=SAMPLES)
    # Which it leaves dequantized.
    return {name: layer.weight.detach() for name, layer in layers(model).items()}


def hqq(model) -> dict[str, torch.Tensor]:
    from hqq.core.quantize import Quantizer

    # Axis 1: groups along a row.
    options = {"nbits": 4, "group_size": 64, "axis": 1, "device": "cpu", "compute_dtype": torch.bfloat16}
    return {
        name: Quantizer.dequantize(*Quantizer.quantize(layer.weight.data.float(), **options))
        for name, layer in layers(model).items()
    }


METHODS = {"gptq": gptq, "hqq": hqq}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy_peers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16).eval()
    weights = METHODS[args.method](model)

    plain = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16)
    for name, layer in layers(plain).items():
        levels = max(len(group.unique()) for group in weights[name].unflatten(1, (-1, 64)).flatten(0, 1)[:50])
        if levels > 16:
            raise RuntimeError(
                f"{name}: a group of 64 holds {levels} values, more than 4 bits can tell apart"
            )
        error = (weights[name].float() - layer.weight.data.float()).norm() / layer.weight.data.float().norm()
        print(f"{name}: at most {levels} values a group, relative error {error:.4f}")
        layer.weight.data = weights[name].to(torch.bfloat16).view_as(layer.weight)
    plain.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
