"""QLoRA of SmolLM2 among ranks; run by test_training, slowly."""

import torch
from ranks import Cases
from sharded_training import checkpointed, compare, shard, smollm2_qlora

case = Cases(2)


@case
def qlora(ranks, folder):
    """With checkpointing."""
    (alone, batches), (model, _) = smollm2_qlora(torch.float32), smollm2_qlora(torch.float32)
    shard(checkpointed(model, "not reentrant"))
    compare(model, alone, batches, ranks, 1e-4)
