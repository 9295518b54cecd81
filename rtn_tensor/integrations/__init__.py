"""Other libraries that this one works with, a module or package each. The core imports none; it tells them by
`on_quantized`."""

from collections.abc import Callable

from torch import nn

LISTENERS: list[Callable[[nn.Module], None]] = []


def on_quantized(model: nn.Module) -> None:
    """Has every integration look at `model`, whose weights were quantized, or dequantized."""
    for listener in LISTENERS:
        listener(model)
