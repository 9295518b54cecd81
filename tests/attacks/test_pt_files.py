"""A `.pt` file may lie about a quantized weight: `torch.load(weights_only=True)` calls no constructor, only
`__setstate__`."""

import io
import pickle
import random
import zipfile

import pytest
import torch
import torch.nn.functional as F
from forked import survives
from torch import nn

from rtn_tensor import RTNQuantizedTensor, load
from rtn_tensor.formats import VERSION

N, K = 64, 96
HUGE = 1 << 62


def weight(**lie):
    """A tensor whose parts are what `lie` says, whatever its class says to that."""
    w = RTNQuantizedTensor.from_float(torch.randn(N, K).bfloat16(), 4, 32)
    vars(w).update(lie)
    return w


def saved(state) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def use(w):
    """Whatever reads or writes planes."""
    k = w.shape[-1]
    if w.dim() == 3:
        torch.bmm(torch.ones(w.shape[0], 40, w.shape[-2], dtype=w.dtype), w)
    elif k < 1 << 20:
        F.linear(torch.ones(3, k, dtype=w.dtype), w)
        F.linear(torch.ones(40, k, dtype=w.dtype), w)
        if not w.transposed:
            F.embedding(torch.tensor([0, 1]), w)
    w.dequantize()
    w[1:3].dequantize()
    w.mT.dequantize()
    w.copy_(torch.zeros(w.shape, dtype=w.dtype))
    w.clone().to(torch.float32)
    repr(w)
    return list(w.shape)


def load_and_use(file):
    file.seek(0)
    return use(torch.load(file, weights_only=True)["w"])


def numbers(*fits):
    some = (
        -HUGE,
        -128,
        -1,
        0,
        1,
        3,
        16,
        31,
        33,
        64,
        95,
        97,
        128,
        1 << 26,
        HUGE,
        1 << 70,
        4.0,
        "4",
        None,
        True,
        [4],
    )
    return [n for n in some if n not in fits]


def bytes_(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


def ones(*shape, dtype=torch.bfloat16):
    return torch.ones(shape, dtype=dtype)


LIES = [
    *[{"bits": n} for n in (2, *numbers(4))],
    *[{"group_size": n} for n in numbers(32)],
    *[{"in_features": n} for n in numbers(95)],  # so near that its planes are as large
    *[{"scale_method": "minmax"}, {"zero": 8}, {"zero": torch.zeros(64, 3, dtype=torch.int8)}],
    *[{"version": n} for n in (0, -1, VERSION + 1, 1 << 40, "1", None, True, 1.0)],
    *[{"activations": given, "version": 3} for given in ("int4", 8, b"int8", ["int8"], True)],
    {"activations": "int8"},  # and version 1, which has none
    *[{"scale_method": m} for m in ("", "median", 4, None, ["absmax"])],
    *[{"transposed": t} for t in (1, "no", None, [True])],
    *[{"qdata": bytes_(*shape)} for shape in ((N, 47), (N, 0), (0, 48), (N - 1, 48), (48,), (), (1, N, 48))],
    *[{"qdata": bytes_(N, 48, dtype=dtype)} for dtype in (torch.float32, torch.int8, torch.bool)],
    *[{"qdata": q} for q in (None, "qdata", 4, [1], bytes_(N, 48).to_sparse(), bytes_(N, 48).to("meta"))],
    *[{"scale": ones(*shape)} for shape in ((N, 2), (N, 4), (N, 0), (N - 1, 3), (0, 3), (3,), (), (1, N, 3))],
    *[{"scale": ones(N, 3, dtype=dtype)} for dtype in (torch.float64, torch.int32, torch.float32)],
    *[{"scale": s} for s in (None, "scale", 1.0, ones(N, 3).to_sparse(), ones(N, 3).to("meta"))],
    {"in_features": 1 << 26, "qdata": bytes_(N, 16), "scale": ones(N, 1), "group_size": 128},
    {"qdata": bytes_(N, 48).expand(1 << 40, N, 48), "scale": ones(N, 3).expand(1 << 40, N, 3)},
]


@pytest.mark.parametrize(
    "lie", LIES, ids=lambda lie: " ".join(f"{key}={str(value)[:20]}" for key, value in lie.items())
)
def test_a_lie_is_an_error(lie):
    outcome = survives(load_and_use, saved({"w": weight(**lie)}), allowed=(ValueError, TypeError))
    assert outcome.error, outcome.value


@pytest.mark.parametrize(
    "name", ["qdata", "scale", "bits", "group_size", "scale_method", "in_features", "transposed"]
)
def test_a_missing_part_is_named(name):
    w = weight()
    vars(w).pop(name)
    outcome = survives(load_and_use, saved({"w": w}))
    assert (
        outcome.message
        == f"the state of an RTNQuantizedTensor lacks {name}; the file is damaged, or of another library"
    )


def test_a_file_without_a_version_is_of_the_first():
    w = weight()
    vars(w).pop("version")
    assert survives(load_and_use, saved({"w": w})).value == [N, K]


def test_a_file_of_the_future_says_so():
    outcome = survives(load_and_use, saved({"w": weight(version=VERSION + 1)}))
    due = (
        f"version {VERSION + 1} of the format, and this rtn-tensor reads up to {VERSION}; upgrade rtn-tensor"
    )
    assert due in outcome.message


def test_what_was_saved_is_read():
    w = weight()
    w.note = "kept"
    for saved_weight in (
        w,
        w[3:40],
        w[:, 32:],
        w.t(),
        nn.Parameter(w, requires_grad=False),
        w.t().contiguous(),
    ):
        loaded = torch.load(saved({"w": saved_weight}), weights_only=True)["w"]
        assert torch.equal(loaded, saved_weight)
        assert (type(loaded), loaded.shape, loaded.dtype) == (
            type(saved_weight),
            saved_weight.shape,
            saved_weight.dtype,
        )
    assert torch.load(saved({"w": w}), weights_only=True)["w"].note == "kept"
    assert torch.load(saved({"w": w}), weights_only=True, map_location="meta")["w"].is_meta


# ------------------------------------------------------------- what a pickle can do beside


class Program:
    """Pickles as a call of `fn(*args)`, and a state for what that gives."""

    def __init__(self, fn, args, state=None):
        self.reduced = (fn, args) if state is None else (fn, args, state)

    def __reduce__(self):
        return self.reduced


def test_the_wrapper_may_not_be_larger_than_its_planes():
    w = weight()
    lies = [
        ((1 << 20, K), torch.bfloat16),
        ((N, 1 << 20), torch.bfloat16),
        ((N, K), torch.float32),
        ((N,), torch.bfloat16),
    ]
    for shape, dtype in lies:
        wrapper = (
            RTNQuantizedTensor,
            dtype,
            shape,
            (K, 1)[: len(shape)],
            0,
            torch.strided,
            torch.device("cpu"),
            False,
        )
        lie = Program(
            torch._tensor._rebuild_from_type_v2,
            (torch._utils._rebuild_wrapper_subclass, RTNQuantizedTensor, wrapper, dict(vars(w))),
        )
        outcome = survives(load_and_use, saved({"w": lie}))
        assert "the file is damaged" in outcome.message


def test_a_call_of_the_class_is_checked():
    good = (torch.zeros(N, 48, dtype=torch.uint8), torch.ones(N, 3).bfloat16(), 4, 32, "absmax", K)
    assert survives(load_and_use, saved({"w": Program(RTNQuantizedTensor, good)})).value == [N, K]
    for i, lie in ((2, 8), (3, 64), (3, 0), (5, 1 << 26), (4, "median")):
        arguments = (*good[:i], lie, *good[i + 1 :])
        assert survives(load_and_use, saved({"w": Program(RTNQuantizedTensor, arguments)})).error


def test_planes_that_shrink_after_the_check():
    """A pickle may set a tensor to other memory once the weight over it was made."""

    def shrink(attribute):
        w = weight()
        plane = getattr(w, attribute)
        plane.set_(plane.untyped_storage(), 0, (N, 1), (1, 1))
        return use(w)

    for attribute in ("qdata", "scale"):
        assert survives(shrink, attribute, allowed=(RuntimeError, ValueError)).error


def test_memory_that_was_given_back():
    """As FSDP does with the weights of layers that do not run."""

    def free(attribute):
        w = weight()
        getattr(w, attribute).untyped_storage().resize_(0)
        return use(w)

    for attribute in ("qdata", "scale"):
        assert survives(free, attribute, allowed=(RuntimeError, ValueError)).error


# ------------------------------------------------------------------------------- at random

NAMES = [
    *RTNQuantizedTensor.tensor_data_names,
    *RTNQuantizedTensor.tensor_attribute_names,
    "_flat",
    "_padded_rows",
]
INTEGERS = [-HUGE, -128, -1, 0, 1, 2, 4, 8, 16, 31, 32, 33, 64, 96, 128, 1 << 16, 1 << 26, 1 << 40, HUGE]
VALUES = [*INTEGERS, 1.5, "4", None, True, False, b"x", (), {}]


def altered(seed: int) -> bytes:
    """A file of two weights that is wrong in some places: attributes, planes, or bytes of its pickle."""
    rng = random.Random(seed)
    state = {
        "w": weight(),
        "v": RTNQuantizedTensor.from_float(torch.randn(3, 8, 160), 8, rng.choice([32, 64, -1])).mT,
    }
    for w in state.values():
        for _ in range(rng.choice([0, 1, 1, 2])):
            name = rng.choice(NAMES)
            plane = vars(w).get(name)
            if isinstance(plane, torch.Tensor):
                shape = [max(0, n + rng.choice([-n, -1, 0, 0, 1, 16])) for n in plane.shape]
                dtype = rng.choice([plane.dtype, plane.dtype, torch.float32, torch.int16])
                new = torch.zeros(shape[rng.choice([0, 0, 0, 1]) :], dtype=dtype)
                strided = [new.mT, new[..., ::2]] if new.dim() > 1 else [new]
                vars(w)[name] = rng.choice([new, *strided, new[None].expand(3, *new.shape)])
            else:
                vars(w)[name] = rng.choice(VALUES)
    data = saved(state).getvalue()
    if rng.random() < 0.6:
        return data
    out = io.BytesIO()
    # Checksums are right again.
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = bytearray(old.read(entry))
            if entry.filename.endswith("data.pkl") or (content and rng.random() < 0.1):
                for _ in range(rng.choice([1, 1, 3, 8])):
                    at = rng.randrange(len(content))
                    content[at] = rng.choice([rng.randrange(256), content[at] ^ 1 << rng.randrange(8)])
            new.writestr(entry, bytes(content[: rng.choice([len(content)] * 9 + [len(content) // 2])]))
    return out.getvalue()


def everything(seed, folder):
    data = altered(seed)
    file = folder / f"{seed}.pt"
    file.write_bytes(data)
    ends = []
    for read in (lambda: torch.load(io.BytesIO(data), weights_only=True), lambda: _loaded(file)):
        try:
            for w in read().values():
                if isinstance(w, RTNQuantizedTensor):
                    use(w)
            ends.append("read")
        except (Exception, pickle.UnpicklingError) as error:
            # Any, as the words are torch's; none may end the process.
            ends.append(type(error).__name__)
    file.unlink()
    return ends


def _loaded(file):
    model = nn.Linear(K, N, bias=False).bfloat16()
    model.v = nn.Parameter(torch.zeros(3, 160, 8))
    return dict(load(file, model=model, rename={"^w$": "weight"}).named_parameters())


def some(seeds, folder):
    return [everything(seed, folder) for seed in seeds]


@pytest.mark.parametrize(("first", "count"), [(0, 100), pytest.param(100, 1000, marks=pytest.mark.slow)])
def test_random_files(first, count, tmp_path):
    ends = []
    for start in range(first, first + count, 25):
        # One process for several seeds, as it has to start threads; which of them it was, the seed's file
        # tells that is left.
        outcome = survives(some, range(start, start + 25), tmp_path, seconds=120)
        ends += outcome.value
    kinds = {kind for pair in ends for kind in pair}
    assert {"read", "ValueError"} <= kinds  # some alterations do no harm, and some are found
