"""Planes of packed numbers, as other libraries pack them, and how they are taken from a checkpoint."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rtn_tensor.checkpoint.rows import Kept, Rows
from rtn_tensor.checkpoint.sources import Source
from rtn_tensor.formats import FORMATS, GIVEN, GIVEN_ASYMMETRIC, MAX_GROUP_SIZE, pack
from rtn_tensor.tensor import RTNQuantizedTensor

# What the 16 numbers of fp4 (e2m1) stand for.
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def ending(found: Mapping[str, Source], *ends: str) -> Iterator[tuple[str, Source]]:
    """What of `found` has a name that ends so: the name without the end, and the tensor."""
    for name, source in list(found.items()):
        for end in ends:
            if name.endswith(end):
                yield name.removesuffix(end), source
                break


def beside(found: Mapping[str, Source], source: Source, name: str) -> Source:
    """The tensor `name`, without which `source` means nothing.

    Raises:
        ValueError: it is not there.
    """
    if name not in found:
        raise source.error(
            f"has no {name} beside it, which is needed to read it; download the checkpoint again"
        )
    return found[name]


def put(found: dict[str, Source], parts: Iterable[Source | None], weight: Source) -> None:
    """Puts a weight in the place of its planes.

    Raises:
        ValueError: it is there as a plain tensor, too.
    """
    for part in parts:
        if part is not None:
            del found[part.name]
    if weight.name in found:
        raise found[weight.name].error(
            "is there twice, as planes of another library's, too; remove one of the two"
        )
    found[weight.name] = weight


def check_plane(source: Source, shape: Iterable[int], *dtypes: torch.dtype) -> None:
    """Raises ValueError unless a plane is as the others beside it say."""
    if source.shape != (shape := tuple(shape)) or source.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise source.error(
            f"is {str(source.dtype).removeprefix('torch.')} {list(source.shape)}; beside the other planes of "
            f"its weight it must be {names} {list(shape)}. Download the checkpoint again"
        )


def computed(
    source: Source,
    name: str,
    shape: tuple[int, ...],
    compute: Callable[[tuple[int, ...], int, int], Tensor],
    kept: Kept | None = None,
    transposed: bool = False,
) -> Source:
    """The weight `name`, `[..., N, K]` or where `transposed` `[..., K, N]`, that is computed of `source` and
    what lies beside it."""
    rows = Rows.of(shape, compute, kept)
    rows = rows.mT if transposed else rows
    return Source(source.file, name, rows.shape, rows.dtype, rows.whole, lambda: rows, rows=rows)


def fields(words: Tensor, bits: int) -> Tensor:
    """The numbers of 4 or 8 bits in int32 words `[..., W]`, the first in the lowest bits: `[..., W * 32 /
    bits]` uint8."""
    got = words.contiguous().view(torch.uint8)
    return got if bits == 8 else nibbles(got)


def nibbles(data: Tensor) -> Tensor:
    """The two numbers in each byte of `[..., B]` uint8, the low bits first: `[..., 2 B]`."""
    return torch.stack([data & 15, data >> 4], -1).flatten(-2)


def signed(u: Tensor, bits: int) -> Tensor:
    """int8 numbers around 0 of uint8 ones that are stored with 2^(bits - 1) added."""
    return (u ^ 128).view(torch.int8) if bits == 8 else u.view(torch.int8) + FORMATS[bits].qmin


def quantized_rows(q: Tensor, scale: Tensor, kept: Kept, zero: Tensor | None = None) -> RTNQuantizedTensor:
    """Rows of integers `[n, K]`, their scales and zeros `[n, G]`, in this library's form."""
    planes = pack(q, kept.bits), scale.contiguous()
    about = kept.bits, kept.group_size, GIVEN_ASYMMETRIC if kept.asymmetric else GIVEN, q.shape[-1]
    zero = zero.to(torch.int8).contiguous() if kept.asymmetric and zero is not None else None
    return RTNQuantizedTensor(*planes, *about, zero=zero)


def kept_format(
    bits: int, group_size: int, count: int, scale: Source, asymmetric: bool, largest_zero: int = 0
) -> Kept | None:
    """How a weight with `count` groups in a row, whose columns are in order, is kept; None where it cannot
    be: its groups end inside a chunk, or a zero is no int8."""
    if (count != 1 and group_size % 32) or largest_zero > 127:
        return None
    return Kept(bits, -1 if count == 1 else group_size, scale.dtype, asymmetric)


def _in_order(k: int, group_size: int) -> Tensor:
    return torch.arange(k) // (max(k, 1) if group_size == -1 else group_size)


def sorted_groups(index: Source | None, k: int, group_size: int, count: int) -> Tensor | None:
    """The group of each column `[K]` as a plane has it; None where columns are in their own order.

    Raises:
        ValueError: the plane has another shape, or names a group that is not among the `count`.
    """
    if index is None:
        return None
    check_plane(index, (k,), torch.int32, torch.int64)
    group_of = index.view().long()
    if k and not 0 <= int(group_of.min()) <= int(group_of.max()) < count:
        raise index.error(
            f"names the groups {int(group_of.min())} to {int(group_of.max())}, and there are {count}; "
            "download the checkpoint again"
        )
    return None if torch.equal(group_of, _in_order(k, group_size)) else group_of


def floats(
    q: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, group_of: Tensor | None = None
) -> Tensor:
    """S (q - zero) in fp32: integers `[n, K]`, scales and zeros `[n, G]`, `group_of` as `sorted_groups`."""
    if group_of is None:
        group_of = _in_order(q.shape[-1], group_size)
    w = q.float()
    if zero is not None:
        w -= zero.float()[:, group_of]
    return w * scale.float()[:, group_of]


def rows_of(
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    kept: Kept | None,
    group_size: int,
    group_of: Tensor | None = None,
) -> Tensor:
    """Some rows of a weight: in this library's form where it is kept, else `floats`."""
    if kept is None:
        return floats(q, scale, zero, group_size, group_of)
    return quantized_rows(q, scale, kept, zero)


def option(how: Mapping[str, Any], key: str, allowed: Iterable[Any], where: str, default: Any = None) -> Any:
    """The value of an option.

    Raises:
        ValueError: it is none of those that are read.
    """
    value, allowed = how.get(key, default), list(allowed)
    if not any(value == other and type(value) is type(other) for other in allowed):
        names = ", ".join(map(repr, allowed))
        raise ValueError(f"{where}: {key} is {str(value)[:100]!r}; load reads {names}. Give the float model")
    return value


def check_group_size(value: Any, where: str) -> int:
    """A group size as a config has it, -1 for a whole row.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or (value != -1 and not 0 < value <= MAX_GROUP_SIZE):
        raise ValueError(f"{where}: group_size is {str(value)[:100]}; it must be a number, or -1")
    return value


# Options that say how the weights were found, by whom, or how an engine may run them, and nothing of the
# planes: of AutoGPTQ, GPTQModel and AutoAWQ, and of auto-round, which writes its own into others' configs.
ABOUT_THE_SEARCH = """
    act_bits act_data_type act_dynamic act_group_aware act_group_size act_sym amp autoround_version
    backend batch_dim batch_size block_name_to_quantize cache_block_outputs cache_examples_on_gpu
    calibration compression damp_auto_increment damp_percent dataset disable_exllama do_fuse
    enable_alg_ext enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input
    enable_torch_compile exllama_config fuse_max_seq_len gradient_accumulate_steps hyb_act is_mixed
    iters low_gpu_mem_usage lr max_input_length meta minmax_lr model_dtype model_file_base_name
    model_name_or_path model_seqlen module_name_preceding_first_block modules_in_block_to_quantize
    modules_to_fuse modules_to_not_convert momentum mse not_use_best_mse nsamples offload_to_disk
    offload_to_disk_path pad_token_id parallel_packing provider quant_block_list quant_lm_head quantizer
    sampler scale_dtype seqlen static_attention_granularity static_groups static_kv_granularity
    super_bits super_group_size supported_types to_quant_block_names tokenizer train_bs true_sequential
    use_cuda_fp16 use_exllama weight_config
""".split()


def quantizes_activations(how: Mapping[str, Any]) -> bool:
    """Whether a config of compressed-tensors, or of auto-round, says that activations are quantized, too."""
    groups, bits = how.get("config_groups"), how.get("act_bits")
    found = groups.values() if isinstance(groups, dict) else ()
    inputs = any(isinstance(group, dict) and bool(group.get("input_activations")) for group in found)
    return inputs or (isinstance(bits, int) and bits < 16)


def warn_of_activations(how: Mapping[str, Any], where: str) -> None:
    if quantizes_activations(how):
        warnings.warn(f"{where}: the activations were quantized, too, and load does not", stacklevel=7)


def check_options(how: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raises ValueError where a config says something by an option that nobody here knows the meaning of."""
    if unknown := sorted(key for key in set(how) - set(known) if how[key] not in (None, {}, [])):
        raise ValueError(
            f"{where} has the option {unknown[0][:100]!r} ({str(how[unknown[0]])[:100]}), which load does "
            "not know; give the float model, or remove the option where it says nothing of the weights"
        )
