"""Copies of tiny models' folders as other libraries quantize them, from random planes."""

import shutil

import foreign_formats as ff
import torch


def first(name):
    return ".layers.0." in name and name.endswith("proj.weight")


def second(name):
    return ".layers.1." in name and name.endswith("proj.weight")


def linears(name):
    return name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))


def quantized(source, to, config, *makes, seed=3):
    """A copy of the folder `source` at `to`, with weights by each (function of their names, function that makes
    planes)."""
    shutil.copytree(source, to)
    torch.manual_seed(seed)
    for chosen, make in makes:
        ff.rewrite(to, make, config, chosen)
    return to


def gptq_mixed(source, to):
    """4 bits without zero points, then 8 bits with such."""
    config = ff.gptq_config(4, 32, dynamic={r"+:.*\.layers\.1\..*": {"bits": 8, "group_size": 64}})
    return quantized(
        source,
        to,
        config,
        (first, lambda n, k: ff.gptq(n, k, 4, 32)),
        (second, lambda n, k: ff.gptq(n, k, 8, 64, symmetric=(n, k) == (384, 256))),
    )


def gptq_v2(source, to):
    """With an output layer."""
    config = ff.gptq_config(4, 128, checkpoint_format="gptq_v2", sym=False, lm_head=True)
    return quantized(
        source,
        to,
        config,
        (
            lambda name: linears(name) or name == "lm_head.weight",
            lambda n, k: ff.gptq(n, k, 4, 128, symmetric=False, v2=True, index=False),
        ),
    )


def gptq_rows(source, to):
    return quantized(
        source, to, ff.gptq_config(4, -1), (linears, lambda n, k: ff.gptq(n, k, 4, -1, dtype=torch.bfloat16))
    )


def ct_mixed(source, to):
    """4 bits with zero points in groups, then 8 bits in rows."""
    config = ff.ct_config(bits=4, group_size=64, symmetric=False, targets=[r"re:.*\.layers\.0\..*"])
    config["config_groups"]["group_1"] = ff.ct_config(bits=8, group_size=None)["config_groups"]["group_0"]
    return quantized(
        source,
        to,
        config,
        (first, lambda n, k: ff.compressed(n, k, 4, 64, symmetric=False)),
        (second, lambda n, k: ff.compressed(n, k, 8, -1)),
    )


def int8(source, to):
    config = ff.ct_config("int-quantized", 8, None)
    return quantized(source, to, config, (linears, lambda n, k: ff.int_quantized(n, k)))


def ct_experts(source, to, seed):
    """One expert's weights have zero points."""
    config = ff.ct_config(bits=4, group_size=32)

    def odd(name):
        return linears(name) and ".experts.1." in name

    return quantized(
        source,
        to,
        config,
        (odd, lambda n, k: ff.compressed(n, k, 4, 32, symmetric=False)),
        (lambda name: linears(name) and not odd(name), lambda n, k: ff.compressed(n, k, 4, 32)),
        seed=seed,
    )


def awq(source, to):
    return quantized(source, to, ff.AWQ_CONFIG, (linears, lambda n, k: ff.awq(n, k)))


def auto_round(source, to):
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False}
    config["packing_format"] = "auto_round:auto_gptq"
    return quantized(source, to, config, (linears, lambda n, k: ff.gptq(n, k, symmetric=False)))


def bitsandbytes(source, to):
    return quantized(source, to, ff.BNB8_CONFIG, (linears, ff.bnb8))
