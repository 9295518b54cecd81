"""`RTNConfig`, and the short names that make one."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torchao.core.config import AOBaseConfig

from rtn_tensor import _torchao
from rtn_tensor.formats import FORMATS, check_activations, check_format, or_default

_torchao.allow_configs_of(__name__)


@dataclass(frozen=True)
class RTNConfig(AOBaseConfig):
    """Calibration-free round-to-nearest weight-only quantization.

    Works wherever torchao takes a config: `rtn_tensor.quantize_`, `torchao.quantization.quantize_`, values of
    `FqnToConfig`, `config_to_dict` and `config_from_dict`. `RTNConfig(...)` gives an `RTNInt4WeightConfig` or
    an `RTNInt8WeightConfig`, whichever has its bits: transformers reads off the name of the class how large
    weights are. A subclass of your own stays what it is.

    Args:
        bits: 4 or 8.
        group_size: consecutive elements along in_features that share one scale: a multiple of 32, or -1 for
            one group per row. The last group of a row may be shorter. By default 64 at 4 bits, 128 at 8.
        scale_method: how a group's scale S is found from its weights w (b = bits). By default
            "search" at 4 bits, "absmax" at 8, where no other loses less.
            "absmax": S = 2 max|w| / (2^b - 1), the formula of arXiv 2505.15909.
            "signed": S = w_ext / -2^(b-1), w_ext the weight of largest magnitude with its sign, which is then
            exact; same storage, smaller error (about 7 % less RMS at 4 bits on Gaussian weights).
            "search": of 0.8, 0.85, ..., 1.05 times that S, the one with the least sum of |w| (w - w')^2 over
            the group: what large weights lose counts for more, as clipping them costs most. Same storage; it
            takes some ten times as long.
            "minmax": S = (max - min) / (2^b - 1), of the group's weights and 0, and a zero point, a byte per
            group: the integer that stands for 0, so that the levels lie where the weights do.
            "search8": as "search", with scales of 8 bits (those of float8_e4m3fn, times 2^-7): in groups of
            32 as many bits as groups of 64 with 16-bit scales, and less loss. For weights of at most 28.
            "given", "given_asymmetric": of weights that `load` took over from another library, with scales
            and, the second, its zero points. What is copied into one later gets them by the default above, or
            by "minmax".
        version: version of this config's meaning; leave it alone.
        activations: "int8", to have products round their activations to 8 bits first (W4A8, W8A8), 32 columns
            at a time with a scale of their own, and multiply integers: faster where there are several rows of
            them, and a little less exact. By default they stay as they are.

    Raises:
        ValueError: an argument outside the values above, or other bits than the class is for.
    """

    only_bits: ClassVar[int | None] = None  # of a class that is for one number of bits

    bits: int = 4
    group_size: int = FORMATS[4].group_size
    scale_method: str = FORMATS[4].scale_method
    version: int = 1
    activations: str | None = None

    def __new__(cls, bits: int = 4, *args: Any, **kwargs: Any) -> "RTNConfig":
        return object.__new__(CLASSES.get(bits, cls) if cls is RTNConfig and type(bits) is int else cls)

    def __post_init__(self) -> None:
        check_format(self.bits, self.group_size, self.scale_method)
        check_activations(self.activations)
        if self.only_bits not in (None, self.bits):
            raise ValueError(
                f"bits={self.bits}, and {type(self).__name__} is for {self.only_bits}; use "
                f"rtn(bits={self.bits}), or leave bits out"
            )


@dataclass(frozen=True)
class RTNInt4WeightConfig(RTNConfig):
    """An `RTNConfig` of 4 bits."""

    only_bits = 4


@dataclass(frozen=True)
class RTNInt8WeightConfig(RTNConfig):
    """An `RTNConfig` of 8 bits."""

    only_bits = 8
    bits: int = 8
    group_size: int = FORMATS[8].group_size
    scale_method: str = FORMATS[8].scale_method


CLASSES = {4: RTNInt4WeightConfig, 8: RTNInt8WeightConfig}


def rtn(
    bits: int = 4,
    group_size: int | None = None,
    scale_method: str | None = None,
    activations: str | None = None,
) -> RTNConfig:
    """Round-to-nearest with `bits` bits; see `RTNConfig` for the arguments. What is left out is as `rtn_int4`
    or `rtn_int8` has it."""
    return RTNConfig(bits, *or_default(bits, group_size, scale_method), activations=activations)


def rtn_int4(
    group_size: int = FORMATS[4].group_size,
    scale_method: str = FORMATS[4].scale_method,
    activations: str | None = None,
) -> RTNConfig:
    """4-bit round-to-nearest: 4 + 16 / group_size bits per weight with a 16-bit scale. By default groups of
    64 with searched scales."""
    return rtn(4, group_size, scale_method, activations)


def rtn_int8(
    group_size: int = FORMATS[8].group_size,
    scale_method: str = FORMATS[8].scale_method,
    activations: str | None = None,
) -> RTNConfig:
    """8-bit round-to-nearest: 8 + 16 / group_size bits per weight with a 16-bit scale. By default groups of
    128 with the scale method "absmax"."""
    return rtn(8, group_size, scale_method, activations)
