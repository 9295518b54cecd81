"""Weights as other libraries quantize and pack them, written down from the descriptions of their formats, a number
at a time: nothing here is shared with the package."""

import json

import torch
from safetensors.torch import load_file, save_file

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def words_along_rows(u, bits):
    """int32 [N, ceil(K * bits / 32)] of numbers [N, K]: the first in the lowest bits, zeros at the end."""
    count = 32 // bits
    rows = []
    for row in u.tolist():
        row = row + [0] * (-len(row) % count)
        words = [
            sum(x << (bits * i) for i, x in enumerate(row[at : at + count]))
            for at in range(0, len(row), count)
        ]
        rows.append([w - (1 << 32) if w >= 1 << 31 else w for w in words])
    return torch.tensor(rows, dtype=torch.int32).view(len(u), -1)


def integers(n, k, bits, group_size, symmetric, dtype=torch.float16, order=None):
    """Random u [N, K], S [N, G], zeros [N, G], the group of each column, and the weight that they stand for."""
    size = k if group_size == -1 else group_size
    count = -(-k // size)
    u = torch.randint(0, 2**bits, (n, k))
    scale = ((torch.rand(n, count) + 0.1) / 2**bits / 8).to(dtype)
    middle = 2 ** (bits - 1)
    zero = torch.full((n, count), middle) if symmetric else torch.randint(1, 2**bits, (n, count))
    group_of = torch.arange(k) // size
    if order is not None:
        group_of = group_of[order]
    return u, scale, zero, group_of, (u - zero[:, group_of]).float() * scale.float()[:, group_of]


def gptq(
    n, k, bits=4, group_size=32, symmetric=True, act_order=False, v2=False, index=True, dtype=torch.float16
):
    order = torch.randperm(k) if act_order else None
    u, scale, zero, group_of, w = integers(n, k, bits, group_size, symmetric, dtype, order)
    planes = {
        "qweight": words_along_rows(u, bits).t().contiguous(),
        "scales": scale.t().contiguous(),
        "qzeros": words_along_rows(zero.t() - (0 if v2 else 1), bits),
        "g_idx": group_of.int(),
    }
    if not index:
        del planes["g_idx"]
    return planes, w


def awq(n, k, group_size=32, symmetric=False, dtype=torch.float16):
    u, scale, zero, _, w = integers(n, k, 4, group_size, symmetric, dtype)

    def packed(numbers):
        turned = numbers.unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(-2)
        return words_along_rows(turned, 4)

    return {"qweight": packed(u.t()), "qzeros": packed(zero.t()), "scales": scale.t().contiguous()}, w


def compressed(
    n, k, bits=4, group_size=32, symmetric=True, act_order=False, dtype=torch.bfloat16, tensor=False
):
    order = torch.randperm(k) if act_order else None
    u, scale, zero, group_of, w = integers(n, k, bits, group_size, symmetric, dtype, order)
    if tensor:
        scale, zero = scale[:1, 0], zero[:1, 0]
        w = (u - zero).float() * scale.float()
    planes = {
        "weight_packed": words_along_rows(u, bits),
        "weight_scale": scale.clone(),
        "weight_shape": torch.tensor([n, k]),
    }
    if tensor and not symmetric:
        planes["weight_zero_point"] = (zero - 2 ** (bits - 1)).to(torch.int8)
    elif not symmetric:
        planes["weight_zero_point"] = words_along_rows(zero.t(), bits).t().contiguous()
    if act_order:
        planes["weight_g_idx"] = group_of.int()
    return planes, w


def int_quantized(n, k, group_size=-1, symmetric=True, dtype=torch.bfloat16, tensor=False):
    u, scale, zero, group_of, w = integers(n, k, 8, group_size, symmetric, dtype)
    if tensor:
        scale, zero = scale[:1, :1].expand(n, 1), zero[:1, :1].expand(n, 1)
        w = (u - zero).float() * scale.float()
    planes = {"weight": (u - 128).to(torch.int8), "weight_scale": scale[:1, 0].clone() if tensor else scale}
    if not symmetric:
        planes["weight_zero_point"] = (zero - 128).to(torch.int8)
    return planes, w


def fp8(n, k, kind="block", block=(128, 128), end="_scale_inv", dtype=torch.float32, fp8=torch.float8_e4m3fn):
    q = (torch.randn(n, k) * 40).clamp(-400, 400).to(fp8)
    if kind == "tensor":
        scale = torch.rand(()) / 1000 + 1e-4
        per_element = scale
    elif kind in ("channel", "vector"):
        scale = torch.rand(n, 1) / 1000 + 1e-4
        per_element = scale
        scale = scale[:, 0].clone() if kind == "vector" else scale
    else:
        scale = (torch.rand(-(-n // block[0]), -(-k // block[1])) / 1000 + 1e-4).to(dtype)
        per_element = scale[torch.arange(n) // block[0]][:, torch.arange(k) // block[1]].float()
    return {"weight": q, f"weight{end}": scale}, q.float() * per_element


def fp4_bytes(codes):
    """Two numbers in each byte, the first in the low bits."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def mxfp4(e, n, k):
    """GPT-OSS's blocks and scales, and the experts [E, K, N] that they stand for."""
    codes = torch.randint(0, 16, (e, n, k))
    exponents = torch.randint(117, 123, (e, n, k // 32))
    w = torch.tensor(FP4)[codes] * 2.0 ** (exponents - 127).repeat_interleave(32, -1)
    blocks = fp4_bytes(codes).view(e, n, k // 32, 16)
    return {"_blocks": blocks, "_scales": exponents.to(torch.uint8)}, w.mT


def nvfp4(n, k, compressed=False):
    codes = torch.randint(0, 16, (n, k))
    scale = (torch.rand(n, k // 16) * 400).to(torch.float8_e4m3fn)
    of_all = torch.tensor(5000.0) if compressed else torch.tensor(1 / 5000)
    per_block = scale.float() / of_all if compressed else scale.float() * of_all
    w = torch.tensor(FP4)[codes] * per_block.repeat_interleave(16, -1)
    if compressed:
        return {
            "weight_packed": fp4_bytes(codes),
            "weight_scale": scale,
            "weight_global_scale": of_all.view(1),
        }, w
    return {"weight": fp4_bytes(codes), "weight_scale": scale, "weight_scale_2": of_all}, w


def ct_mxfp4(n, k):
    planes, w = mxfp4(1, n, k)
    return {"weight_packed": planes["_blocks"].view(n, k // 2), "weight_scale": planes["_scales"][0]}, w[
        0
    ].t()


def bnb4(n, k, kind="nf4", nested=False, block=64):
    codes = torch.randint(0, 16, (n * k,))
    values = torch.linspace(-1, 1, 16) if kind == "nf4" else torch.tensor(FP4) / 6
    count = -(-n * k // block)
    about = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [n, k]}
    planes = {
        "weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8).view(-1, 1),
        "weight.quant_map": values,
    }
    if nested:
        about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
        some = torch.randint(0, 256, (count,))
        outer, table = torch.rand(-(-count // 256)) / 50, torch.linspace(-1, 1, 256)
        absmax = table[some] * outer.repeat_interleave(256)[:count] + 0.05
        planes |= {
            "weight.absmax": some.to(torch.uint8),
            "weight.nested_absmax": outer,
            "weight.nested_quant_map": table,
        }
    else:
        absmax = planes["weight.absmax"] = torch.rand(count) / 10
    text = json.dumps(about).encode()
    planes[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return planes, (values[codes] * absmax.repeat_interleave(block)[: n * k]).view(n, k)


def bnb8(n, k):
    q, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) + 0.1
    planes = {"weight": q, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return planes, q.float() * (scale[:, None] / 127)


def ct_config(
    fmt="pack-quantized", bits=4, group_size=32, symmetric=True, kind="int", targets=("Linear",), **more
):
    strategy = "group" if group_size and group_size > 0 else "channel"
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size if strategy == "group" else None,
        "dynamic": False,
        **more,
    }
    group = {
        "targets": list(targets),
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def gptq_config(bits=4, group_size=32, **more):
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        **more,
    }


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
BNB4_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "_load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_skip_modules": None,
}
BNB8_CONFIG = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def write(folder, model, make, config, chosen=lambda name: name.endswith("_proj.weight")):
    """`model` as a folder, the weights that `chosen` chooses in the format of `make(n, k)`; gives those as floats,
    by name."""
    model.save_pretrained(folder)
    return rewrite(folder, make, config, chosen)


def rewrite(folder, make, config, chosen=lambda name: name.endswith("_proj.weight")):
    state, stands_for = {}, {}
    for name, w in load_file(folder / "model.safetensors").items():
        if not chosen(name):
            state[name] = w
            continue
        planes, stands_for[name] = make(*w.shape)
        state |= {f"{name.removesuffix('weight')}{end}": plane for end, plane in planes.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"quantization_config": config}))
    return stands_for
