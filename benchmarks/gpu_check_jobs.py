"""All that is checked on the device, in the order in which it is."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from benchmarks import gpu_peers as peers
from benchmarks.gpu_check import DTYPES, DX_SHAPES, GROUP_SIZES, PRODUCTS, SHAPES, planes, products
from benchmarks.gpu_check_experts import routed
from benchmarks.gpu_check_graphs import compiled, graphs
from benchmarks.gpu_peers import MODELS, Experts
from benchmarks.gpu_workers import Job
from rtn_tensor.formats import FORMATS

# Of MoE layers: the shape, numbers of tokens, and what is between the products.
ROUTED = ((Experts(5, 160, 96, 2), (1, 7, 40), "silu"), (Experts(9, 256, 160, 3), (2, 150), "gpt_oss"))


def job(name: str, function: Callable[..., None], **arguments: Any) -> Job:
    return Job(
        "correctness", name, f"{function.__module__}:{function.__name__}", arguments, least=5, most=150
    )


def jobs(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], moe_tokens: Sequence[int]) -> list[Job]:
    """First what is timed later, so that it is in Triton's cache by then, and what takes longest; then all
    formats and odd shapes."""
    found = [
        job(f"torch.compile, {mode}", compiled, mode=mode)
        for mode in ("max-autotune", "reduce-overhead", "default")
    ]
    found.append(job("CUDA graphs", graphs))
    for (n, k), bits in product(shapes, (4, 8)):
        timed = [(m, n, k) for m in tokens]
        found.append(
            job(
                f"linear int{bits} {n}x{k}",
                products,
                op="linear",
                dtype="bfloat16",
                bits=bits,
                group_size=128,
                shapes=timed,
            )
        )
    for (name, shape), bits in product(MODELS.items(), (4, 8)):
        found.append(
            job(
                f"{name} int{bits}",
                routed,
                dtype="bfloat16",
                bits=bits,
                group_size=128,
                shape=shape,
                tokens=moe_tokens,
            )
        )
    for n, k in shapes:
        for bits, group_size in ((4, 32), (8, -1)):
            timed = [(m, n, k) for m in tokens if m in peers.SOME]
            name = f"linear int{bits} g{group_size} {n}x{k}"
            found.append(
                job(
                    name,
                    products,
                    op="linear",
                    dtype="bfloat16",
                    bits=bits,
                    group_size=group_size,
                    shapes=timed,
                )
            )
    for dtype, group_size, bits in product(DTYPES, GROUP_SIZES, FORMATS):
        form: dict[str, Any] = {"dtype": dtype, "bits": bits, "group_size": group_size}
        name = f"int{bits} g{group_size} {dtype}"
        found += [
            job(f"{op} {name}", products, op=op, shapes=DX_SHAPES if op.endswith("dx") else SHAPES, **form)
            for op in PRODUCTS
        ]
        found.append(job(f"planes {name}", planes, shapes=((5, 1000), (64, 100), (4096, 4096)), **form))
        found += [
            job(f"experts {name}", routed, shape=shape, tokens=some, activation=how, **form)
            for shape, some, how in ROUTED
        ]
    return found
