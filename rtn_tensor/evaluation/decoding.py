"""Greedy decoding over a key-value cache of fixed size, one token at a time."""

import tempfile
import warnings
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtn_tensor import _torch
from rtn_tensor.integrations.transformers.models import is_pretrained


def positions(model: Any) -> int | None:
    """How many tokens `model` can tell the positions of, as its config says; None where that says nothing."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    config = config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes] if "rope_type" in ropes else ropes.values():  # one, or one for each kind of layer
        if isinstance(rope, dict) and rope.get("rope_type") in ("linear", "dynamic", "yarn"):
            # Whether max_position_embeddings is before or after the stretching, no rule says.
            most = max(
                most, int((rope.get("original_max_position_embeddings") or most) * (rope.get("factor") or 1))
            )
    return most


class _Step(nn.Module):
    """A model over a key-value cache of its own."""

    model: Any
    cache: Any

    def __init__(self, model: Any, room: int):
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        name = type(model).__name__
        if (
            not is_pretrained(model)
            or getattr(model.config, "is_encoder_decoder", False)
            or not model.can_generate()
        ):
            raise TypeError(
                f"{name} is no causal language model of transformers; give one, as of a class ...ForCausalLM"
            )
        other = TypeError(f"{name} keeps other states than keys and values; decode by model.generate")

        super().__init__()
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        if not all(isinstance(layer, StaticLayer) for layer in self.cache.layers):
            raise other
        # Of one size all, as transformers exports them: a sliding layer branches on how full it is, and the
        # mask leaves out the same.
        self.cache.layers = [StaticLayer(room) for _ in self.cache.layers]
        self(
            torch.zeros(1, 1, dtype=torch.long, device=model.device),
            torch.zeros(1, dtype=torch.long, device=model.device),
        )
        if not any(layer.is_initialized for layer in self.cache.layers):
            raise other
        for i, layer in enumerate(self.cache.layers):
            self.register_buffer(f"keys{i}", layer.keys, persistent=False)
            self.register_buffer(f"values{i}", layer.values, persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The most likely token [1, 1] after `tokens [1, T]`, which stand at `positions [T]`; their keys and
        values go into the cache."""
        for i, layer in enumerate(self.cache.layers):
            if layer.is_initialized:
                # An exporter swaps the buffers.
                layer.keys, layer.values = getattr(self, f"keys{i}"), getattr(self, f"values{i}")
            layer.cumulative_length = positions[0].clone()
        out = self.model(
            tokens, position_ids=positions[None], past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1].argmax(-1, keepdim=True)


class Decoder:
    """Greedy decoding, batch 1, of a transformers causal language model.

    transformers' own `generate` does more, and on a CPU spends more time on it than on the model.

    Args:
        model: a transformers causal language model. Its weights may change in place afterwards; where one is
            replaced, make a new Decoder.
        room: tokens that fit, those of the prompt included.
        compile: compile the step from token to token. It takes about a minute; where the model is on a CPU a
            C++ compiler must be there.

    Raises:
        TypeError: `room` is no whole number, or the model keeps other states than keys and values.
        ValueError: less room than two tokens, or more than the model has positions.
    """

    def __init__(self, model: Any, room: int, compile: bool = False):
        if not isinstance(room, int) or isinstance(room, bool):
            raise TypeError(f"room={room!r}; it must be a whole number of tokens")
        most = positions(model)
        if room < 2 or (most is not None and room > most):
            raise ValueError(
                f"room={room}; it must be at least 2 "
                "tokens" + (f", and at most the model's {most} positions" if most else "")
            )
        self.room = room
        with torch.inference_mode(False), torch.no_grad():
            self._prefill = _Step(model, room)
            self._step = _compiled(self._prefill) if compile else self._prefill

    def __call__(self, input_ids: Tensor) -> Generator[Tensor]:
        """Tokens int64 [1, 1] that follow `input_ids` int64 [1, T], until the room is used up. What ends a
        text it does not know.

        Raises:
            ValueError: a prompt of another shape, or with no room for a token after it.
        """
        length = input_ids.shape[-1]
        if input_ids.shape != (1, length) or not 0 < length < self.room:
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)}; pass [1, T] with 1 <= T < "
                f"{self.room}, the decoder's room"
            )
        return self._decode(input_ids)

    def _decode(self, input_ids: Tensor) -> Generator[Tensor]:
        positions = torch.arange(self.room, device=input_ids.device)
        length = input_ids.shape[1]
        with torch.inference_mode():
            token = self._prefill(input_ids, positions[:length])
        yield token
        for at in range(length, self.room - 1):
            with torch.inference_mode():
                token = self._step(token, positions[at : at + 1])
            yield token


def _compiled(step: _Step) -> Callable[[Tensor, Tensor], Tensor]:
    device = step.model.device
    if device.type != "cpu":
        return torch.compile(step, fullgraph=True)
    # A step is hundreds of small calls. Of a token's 11.6 ms (SmolLM2-135M in int4) torch.compile took 4
    # around every call, for its guards and to unwrap 211 quantized weights; ahead of time the whole step is
    # one call of C++: 6.5 ms.
    model, attention = step.model, step.model.config._attn_implementation
    token, position = (
        torch.zeros(1, 1, dtype=torch.long, device=device),
        torch.zeros(1, dtype=torch.long, device=device),
    )
    # `eager`: plain products fuse; the CPU's fused attention takes 0.2 ms per layer for one bf16 query.
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, at what it does itself
        model.set_attn_implementation("eager")
        try:
            program = torch.export.export(step, (token, position), strict=False).run_decompositions({})
        finally:
            model.set_attn_implementation(attention)
        options = {"aot_inductor.package_constants_in_so": False}  # no second copy of the weights
        file = str(Path(folder, "step.pt2"))
        run = _torch.compile_ahead(program, file, options)
    every: dict[str, Any] = {**program.state_dict, **program.constants}
    weights = {name: every[name] for name in run.get_constant_fqns()}
    run.load_constants(weights, check_full_update=True, user_managed=True)
    return partial(_call, run, weights)


def _call(run: Callable, weights: dict[str, Tensor], token: Tensor, position: Tensor) -> Tensor:
    """`run` has but the addresses of `weights`: they stay here."""
    return run(token, position)
