"""Models that are more than a decoder of linear layers and experts."""

import torch
from engine import ROUNDING, difference, engine, greedy, rtn
from PIL import Image
from torchao.quantization import FqnToConfig
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from vllm import SamplingParams
from vllm_models import reference, saved, weights

from rtn_tensor import load, rtn_int4


def test_latent_attention(folder, tmp_path):
    """DeepSeek's: vLLM asks the layer kv_b_proj for its dequantized weight, and multiplies it into the
    queries and the outputs. Its backend for AMX, which it takes where it can, has no fp32."""
    path, config = folder("deepseek_v2"), rtn_int4(64, "absmax")
    with engine(path, attention_backend="CPU_MLA", **rtn(bits=4, group_size=64)) as llm:
        generated = greedy(llm)
        names = {name.rpartition(".layers.")[2] for name in weights(llm)}
    assert {"0.self_attn.kv_b_proj.weight", "0.self_attn.kv_a_proj_with_mqa.weight"} <= names
    assert difference(reference(path, config), generated) < ROUNDING["float32"]
    assert difference(reference(path), generated) > 100 * ROUNDING["float32"]
    with engine(saved(path, tmp_path / "q", config=config), dtype="bfloat16") as llm:
        generated = greedy(llm)
    assert difference(reference(path, config, torch.bfloat16), generated) < ROUNDING["bfloat16"]


SIZE = {"height": 28, "width": 28}


def blip2(path, source):
    """A folder of a tiny BLIP-2 with the tokenizer of `source`, and its processor: of the vision-language
    models of vLLM the one that needs no torchvision, of which there is none for this torch."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = OPTConfig(
        vocab_size=320,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=256,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        **heads,
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=64, intermediate_size=128, image_size=28, patch_size=14, **heads
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=64, intermediate_size=128, encoder_hidden_size=64, vocab_size=320, **heads
        ).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
    model.save_pretrained(path)
    processor = Blip2Processor(BlipImageProcessorPil(size=SIZE), tokenizer, num_query_tokens=4)
    processor.save_pretrained(path)
    return processor


def test_images(folder, tmp_path):
    """The language model is quantized; what sees, and what hands it over, a rule keeps float."""
    path = tmp_path / "blip2"
    processor = blip2(path, folder("llama"))
    image = Image.effect_mandelbrot((28, 28), (-2, -1, 1, 1), 50).convert("RGB")
    kept = [r"re:(?!language_model\.).*"]
    with engine(path, **rtn(bits=4, group_size=64, ignore=kept)) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True)
        asked = {"prompt": "What is it?", "multi_modal_data": {"image": image}}
        (answer,) = llm.generate([asked], sampling, use_tqdm=False)
        names = set(weights(llm))
    assert len(names) == 8
    assert all(name.startswith("language_model.model.decoder.layers.") for name in names)
    output = answer.outputs[0]
    logprobs = [step[t].logprob for step, t in zip(output.logprobs, output.token_ids, strict=True)]
    generated, ids = [(list(output.token_ids), logprobs)], answer.prompt_token_ids
    assert ids[:5] == 4 * [processor.tokenizer.convert_tokens_to_ids("<image>")] + ids[4:5]
    language = FqnToConfig({r"re:.*language_model\..*layers\..*(_proj|fc\d)": rtn_int4(64, "absmax")})
    model = load(path, language, dtype=torch.float32)
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]

    def seen(shown):
        return lambda ids, use_cache: model(input_ids=ids, pixel_values=shown, use_cache=use_cache)

    assert difference(seen(pixels), generated, [ids]) < ROUNDING["float32"]
    assert difference(seen(torch.zeros_like(pixels)), generated, [ids]) > 0.1
