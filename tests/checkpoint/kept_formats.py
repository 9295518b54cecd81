"""Foreign formats that this library's planes hold: how each is made, its config, and what it becomes."""

from functools import partial

import foreign_formats as made
import torch

CT = made.ct_config
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
AUTO_ROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "int",
    "autoround_version": "0.9.2",
    "packing_format": "auto_round:auto_gptq",
}
FORMATS = {
    "GPTQ": (made.gptq, made.gptq_config(), F16, (4, 32)),
    "GPTQ, scales bf16, without g_idx": (
        partial(made.gptq, index=False, dtype=BF16),
        made.gptq_config(),
        BF16,
        (4, 32),
    ),
    "GPTQ, version 2": (
        partial(made.gptq, v2=True),
        made.gptq_config(checkpoint_format="gptq_v2"),
        F16,
        (4, 32),
    ),
    "GPTQ, 8 bits": (partial(made.gptq, bits=8), made.gptq_config(8), F16, (8, 32)),
    "GPTQ, 8 bits, version 2": (
        partial(made.gptq, bits=8, v2=True),
        made.gptq_config(8, checkpoint_format="gptq_v2"),
        F16,
        (8, 32),
    ),
    "GPTQ, rows": (partial(made.gptq, group_size=-1), made.gptq_config(group_size=-1), F16, (4, -1)),
    "GPTQ, said to be asymmetric and sorted": (
        made.gptq,
        made.gptq_config(sym=False, desc_act=True),
        F16,
        (4, 32),
    ),
    "GPTQ, the last group shorter": (
        partial(made.gptq, group_size=64),
        made.gptq_config(group_size=64),
        F16,
        (4, 64),
    ),
    "auto-round": (made.gptq, AUTO_ROUND, F16, (4, 32)),
    "auto-round, packed as AWQ": (
        made.awq,
        AUTO_ROUND | {"sym": False, "packing_format": "auto_round:auto_awq"},
        F16,
        (4, 32),
    ),
    "AWQ": (made.awq, made.AWQ_CONFIG, F16, (4, 32)),
    "GPTQ, asymmetric": (partial(made.gptq, symmetric=False), made.gptq_config(sym=False), F16, (4, 32)),
    "GPTQ, asymmetric, 8 bits, version 2": (
        partial(made.gptq, bits=8, symmetric=False, v2=True),
        made.gptq_config(8, sym=False, checkpoint_format="gptq_v2"),
        F16,
        (8, 32),
    ),
    "compressed-tensors, asymmetric": (
        partial(made.compressed, symmetric=False),
        CT(symmetric=False),
        BF16,
        (4, 32),
    ),
    "compressed-tensors, asymmetric rows of 8 bits": (
        partial(made.compressed, bits=8, group_size=-1, symmetric=False),
        CT(bits=8, group_size=None, symmetric=False),
        BF16,
        (8, -1),
    ),
    "compressed-tensors, int8, asymmetric": (
        partial(made.int_quantized, symmetric=False),
        CT("int-quantized", 8, None, symmetric=False),
        BF16,
        (8, -1),
    ),
    "AWQ, symmetric": (partial(made.awq, symmetric=True), made.AWQ_CONFIG, F16, (4, 32)),
    "compressed-tensors": (made.compressed, CT(), BF16, (4, 32)),
    "compressed-tensors, 8 bits": (partial(made.compressed, bits=8), CT(bits=8), BF16, (8, 32)),
    "compressed-tensors, rows": (
        partial(made.compressed, group_size=-1),
        CT(group_size=None),
        BF16,
        (4, -1),
    ),
    "compressed-tensors, rows of 8 bits": (
        partial(made.compressed, bits=8, group_size=-1, dtype=F16),
        CT(bits=8, group_size=None),
        F16,
        (8, -1),
    ),
    "compressed-tensors, int8": (made.int_quantized, CT("int-quantized", 8, None), BF16, (8, -1)),
    "compressed-tensors, int8, one scale": (
        partial(made.int_quantized, tensor=True),
        CT("int-quantized", 8, None, strategy="tensor"),
        BF16,
        (8, -1),
    ),
    "compressed-tensors, packed, one scale": (
        partial(made.compressed, group_size=-1, tensor=True),
        CT(group_size=None, strategy="tensor"),
        BF16,
        (4, -1),
    ),
    "compressed-tensors, packed, one scale and one zero point": (
        partial(made.compressed, bits=8, group_size=-1, symmetric=False, tensor=True),
        CT(bits=8, group_size=None, symmetric=False, strategy="tensor"),
        BF16,
        (8, -1),
    ),
    "bitsandbytes, int8": (made.bnb8, made.BNB8_CONFIG, F32, (8, -1)),
}


def same_planes(a, b):
    assert (a.bits, a.group_size, a.transposed, a.dtype) == (b.bits, b.group_size, b.transposed, b.dtype)
    assert torch.equal(a.qdata, b.qdata)
    assert a.scale.dtype == b.scale.dtype
    assert torch.equal(a.scale, b.scale)
    assert (a.zero is None) == (b.zero is None)
    assert a.zero is None or torch.equal(a.zero, b.zero)
