"""Where version 0.1.0 had a class that pickles of transformers models name: `torch.load` finds it here."""

from rtn_tensor.integrations.transformers.description import RTNHfQuantizer as RTNHfQuantizer
