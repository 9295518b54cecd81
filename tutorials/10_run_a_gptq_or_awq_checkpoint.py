"""Run what others have quantized: GPTQ, AWQ, compressed-tensors, GGUF, fp8 and the like.

python tutorials/10_run_a_gptq_or_awq_checkpoint.py
"""

import tempfile
import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rtn_tensor import RTNQuantizedTensor, export, load, quantize_, report, rtn_int4, rtn_int8, save

folder = Path(tempfile.mkdtemp())

# 1. A GPTQ folder, as from the hub. Here `export` makes one; GPTQModel's, AutoAWQ's and llm-compressor's are
# read the same way, by the quantization_config in their config.json.
config = LlamaConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
)
model = LlamaForCausalLM(config).bfloat16().eval()
quantize_(model, [("model.*", rtn_int4(group_size=64))])
export(model, folder / "gptq", format="gptq")

# 2. Load it without a config: integers, scales and zero points stay as they are, packed, and run on the
# kernels of this library; scales keep their dtype, also where the model has another.
gptq = load(folder / "gptq", dtype=torch.float32)
print(report(gptq))
weight = gptq.model.layers[0].mlp.up_proj.weight
print(weight.scale_method, weight.dtype, weight.scale.dtype)
assert isinstance(weight, RTNQuantizedTensor)
assert torch.equal(weight.dequantize(), model.model.layers[0].mlp.up_proj.weight.dequantize(torch.float32))
prompt = torch.arange(8)[None]
print(
    gptq.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
)

# 3. Save it in this library's format, or `export` it again: the numbers stay the same.
save(gptq, folder / "ours")
with torch.no_grad():
    assert torch.equal(load(folder / "ours")(prompt).logits, gptq(prompt).logits)

# 4. With a config it is dequantized some rows at a time, and quantized anew. A warning says so, as what is
# quantized twice has both errors: where there is a float model, quantize that.
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", UserWarning)
    anew = load(folder / "gptq", rtn_int8())
print(caught[0].message)
assert anew.model.layers[0].mlp.up_proj.weight.bits == 8

# 5. That is the way to read formats that are no integers with one scale per group: fp8 (DeepSeek), MXFP4
# (GPT-OSS), NVFP4, bitsandbytes' nf4, GPTQ with sorted columns. On the command line:
#     rtn-tensor quantize DeepSeek-folder out --bits 4
