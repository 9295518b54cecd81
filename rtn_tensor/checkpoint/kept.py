"""Which weights of another library's checkpoint keep their integers and scales."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rtn_tensor.checkpoint.fill import Piece
from rtn_tensor.config import RTNConfig
from rtn_tensor.formats import GIVEN, GIVEN_ASYMMETRIC
from rtn_tensor.quantize.kinds import owns, used_otherwise
from rtn_tensor.quantize.targets import Target, why_unfit


def kept_targets(
    model: nn.Module,
    pieces: Sequence[Piece],
    places: Sequence[tuple[str, nn.Module, str, Tensor]],
    fqns: Mapping[int, list[str]],
) -> tuple[list[Target], dict[str, torch.dtype]]:
    """The weights of `model`, which lie at `places`, all of whose pieces have one format that is kept without
    loss; and the dtypes of their scales, by name. `fqns` are the names of each tensor, by its id."""
    held: dict[int, list[Piece]] = defaultdict(list)
    by_name = {fqn: (module, name, t) for fqn, module, name, t in places}
    for piece in pieces:
        held[id(by_name[piece.target][2])].append(piece)
    otherwise = used_otherwise(model)
    targets, scale_dtypes = [], {}
    for key, parts in held.items():
        rows = [part.source.rows for part in parts]
        of_parts = [row.kept for row in rows if row is not None and row.kept is not None]
        formats = {kept._replace(asymmetric=False) for kept in of_parts}
        if len(of_parts) < len(rows) or len(formats) > 1:
            continue
        kept = formats.pop()
        method = GIVEN_ASYMMETRIC if any(part.asymmetric for part in of_parts) else GIVEN
        found = []
        for fqn in fqns[key]:
            module, name, _ = by_name[fqn]
            config = RTNConfig(kept.bits, kept.group_size, method)
            target = Target(module, name, fqn, config, by_name=True)
            turned = any(row is not None and row.transposed != target.transposed for row in rows)
            fits = owns(module, name) and module not in otherwise and why_unfit(target) is None
            if fits and not turned:
                found.append(target)
        if len(found) == len(fqns[key]):  # else one that is shared would become two
            targets += found
            scale_dtypes |= dict.fromkeys(fqns[key], kept.scale_dtype)
    return targets, scale_dtypes
