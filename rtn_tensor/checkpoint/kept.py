"""Which weights of another library's checkpoint keep their integers and scales."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from rtn_tensor.checkpoint.fill import Piece
from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import GIVEN
from rtn_tensor.quantize.selection import owns, used_otherwise
from rtn_tensor.quantize.targets import Target, why_unfit


def kept_targets(
    model: nn.Module,
    pieces: Sequence[Piece],
    places: Sequence[tuple[str, nn.Module, str, Tensor]],
    fqns: Mapping[int, list[str]],
) -> list[Target]:
    """The weights of `model`, which lie at `places`, all of whose pieces have one format that is kept without
    loss. `fqns` are the names of each tensor, by its id."""
    held: dict[int, list[Piece]] = defaultdict(list)
    by_name = {fqn: (module, name, t) for fqn, module, name, t in places}
    for piece in pieces:
        held[id(by_name[piece.target][2])].append(piece)
    otherwise = used_otherwise(model)
    targets = []
    for key, parts in held.items():
        rows = [part.source.rows for part in parts]
        formats = {row.kept if row is not None else None for row in rows}
        kept = formats.pop()
        if formats or kept is None:
            continue
        found = []
        for fqn in fqns[key]:
            module, name, t = by_name[fqn]
            config = RTNConfig(kept.bits, kept.group_size, GIVEN)
            target = Target(module, name, fqn, config, by_name=True)
            turned = any(row is not None and row.transposed != target.transposed for row in rows)
            fits = owns(module, name) and module not in otherwise and why_unfit(target) is None
            if fits and not turned and t.dtype == kept.scale_dtype:
                found.append(target)
        if len(found) == len(fqns[key]):  # else one that is shared would become two
            targets += found
    return targets
