"""Text that a causal language model writes itself, in the place of data."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.integrations.transformers.models import is_pretrained
from rtn_tensor.quantize.by_module import Progress
from rtn_tensor.quantize.targets import is_finite
from rtn_tensor.wording import with_article


def check_tokens(model: Any, given: Any, sequences: int, length: int, name: str, instead: str) -> None:
    """Raises unless `given`, the argument `name`, is tokens, or None where `model` can write some; `instead`
    is what else could be given."""
    if given is not None:
        if (
            not isinstance(given, Tensor)
            or given.dim() != 2
            or given.is_floating_point()
            or not given.numel()
        ):
            what = (
                f"{given.dtype} {list(given.shape)}"
                if isinstance(given, Tensor)
                else with_article(type(given).__name__)
            )
            raise ValueError(
                f"{name} is {what}; give int64 tokens [sequences, length], as a tokenizer's input_ids"
            )
    elif not (is_pretrained(model) and model.can_generate()):
        raise TypeError(
            f"{type(model).__name__} is no causal language model of transformers, which could "
            f"write; give {instead}"
        )
    elif sequences < 1 or length < 2:
        raise ValueError(
            f"sequences={sequences}, length={length}; give one sequence or more, of two tokens or more"
        )


class _Steps:
    """For `generate`, a streamer that goes on by one in `steps` with each token of every sequence."""

    def __init__(self, steps: Iterable[Any]) -> None:
        self.steps = iter(steps)

    def put(self, value: Tensor) -> None:
        next(self.steps, None)

    def end(self) -> None:
        for _ in self.steps:
            pass


def written(model: Any, sequences: int, length: int, seed: int, progress: Progress | None = None) -> Tensor:
    """What the model writes, drawn from its own distribution: after its first token, or where it has none,
    after any. `progress` wraps the list of tokens of a sequence to come."""
    from transformers import GenerationConfig

    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, model.get_input_embeddings().num_embeddings, (sequences, 1), generator=generator)
    first = getattr(model.config.get_text_config(), "bos_token_id", None)
    if first is not None:
        start.fill_(first)
    start = start.to(next(model.parameters()).device)
    finite_logits(model, start[:1])  # or `generate` fails with no advice
    before = model.generation_config
    # What it says of beams, penalties or smallest probabilities would be merged with arguments.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0
    )
    # The end of a text is not drawn, or sequences would be of unequal lengths.
    model.generation_config.update(
        eos_token_id=before.eos_token_id, min_new_tokens=length - 1, max_new_tokens=length - 1
    )
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            # The first that a streamer is given is what there is already.
            streamer = _Steps(progress(list(range(1, length)))) if progress else None
            return model.generate(start, attention_mask=torch.ones_like(start), streamer=streamer)
    finally:
        model.generation_config = before


def finite_logits(model: Any, ids: Tensor) -> Tensor:
    logits = model(ids, use_cache=False).logits
    if not is_finite(logits.detach()):
        raise ValueError(
            f"the model's logits hold NaN or inf in {logits.dtype}; load it in bfloat16 or float32"
        )
    return logits.float()
