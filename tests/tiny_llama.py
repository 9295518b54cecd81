"""A transformers model, and a tokenizer for it, that are made in milliseconds and downloaded from nowhere."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

TEXT = """We the people are of one mind. The state of the union is strong, and the people are free.
It is the duty of the state to keep the peace, and of the people to keep the state.
""".replace("\n", " ")


def tiny_llama(tied=False, dtype=torch.float32, seed=0, layers=2):
    """Two layers, unless told otherwise; hidden size 96: groups of 64 leave a shorter last one."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        # Far larger than a trained model's, so that its logits differ and its greedy tokens are its own.
        initializer_range=0.5,
        architectures=["LlamaForCausalLM"],
        bos_token_id=0,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tiny_tokenizer():
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def greedy(model, ids, n):
    """`ids [1, T]` and the n most likely tokens after them, each by a forward pass of its own."""
    for _ in range(n):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids
