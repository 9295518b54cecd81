import json

from expecttest import assert_expected_inline
from tiny_model import Experts, Model, all_weights
from torch import nn
from torchao.quantization import FqnToConfig

from rtn_tensor import quantize_, report, rtn_int4, rtn_int8


def test_report_table():
    model = nn.ModuleDict(
        {"layer": Model(tied=True), "conv": nn.Conv1d(4, 4, 3), "experts": Experts()}
    ).bfloat16()
    config = FqnToConfig(
        {"layer.head": rtn_int8(32), "layer.up": rtn_int4(128), "experts.gate_up_proj": rtn_int4(-1)}
    )
    result = quantize_(model, config)
    assert_expected_inline(
        str(result),
        """\
weight                      shape   bits  group  bytes before  bytes after  note
--------------------  -----------  -----  -----  ------------  -----------  -----------------------------------
layer.embed.weight        20 x 64  float                2,560        2,560  untied from layer.head.weight
layer.up.weight           96 x 64      4    128        12,288        3,264
layer.down.weight         64 x 96  float               12,288       12,288  not selected
layer.head.weight         20 x 64      8     32             0        1,360  untied from layer.embed.weight
conv.weight             4 x 4 x 3  float                   96           96  weight of a Conv1d: no kernel
experts.gate_up_proj  3 x 40 x 64      4     -1        15,360        4,080
experts.bias               3 x 40  float                  240          240  weight of an Experts: use not known
4 vectors                          float                  584          584  norms and biases
total                               9.02               43,416       24,472""",
    )
    assert str(report(model)) == str(result)
    # Rows of 64 int4 are 32 bytes, rows of 64 int8 64, of scales 2 each.
    after = {"layer.embed.weight": 20 * 64 * 2, "layer.up.weight": 96 * (32 + 2), "layer.up.bias": 96 * 2}
    after |= {"layer.norm.weight": 96 * 2, "layer.norm.bias": 96 * 2, "layer.down.weight": 64 * 96 * 2}
    after |= {"layer.head.weight": 20 * (64 + 4), "conv.weight": 4 * 4 * 3 * 2, "conv.bias": 4 * 2}
    after |= {"experts.gate_up_proj": 3 * 40 * (32 + 2), "experts.bias": 3 * 40 * 2}
    assert {row.name: row.bytes_after for row in result.rows} == after
    assert result.bytes_after == sum(after.values())
    parameters = 20 * 64 + 96 * 64 + 96 * 3 + 64 * 96 + 48 + 4 + 3 * 40 * 64 + 3 * 40
    assert result.bytes_before == 2 * parameters
    assert result.bits_per_weight == 8 * sum(after.values()) / parameters


def test_report_to_dict():
    model = Model(tied=True)
    as_dict = quantize_(model, rtn_int4(32), all_weights).to_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert_expected_inline(
        json.dumps(as_dict, indent=1),
        """\
{
 "bytes_before": 55424,
 "bytes_after": 9632,
 "bits_per_weight": 5.561200923787529,
 "weights": [
  {
   "name": "embed.weight",
   "shape": [
    20,
    64
   ],
   "bits": 4,
   "group_size": 32,
   "bytes_before": 5120,
   "bytes_after": 800,
   "note": ""
  },
  {
   "name": "up.weight",
   "shape": [
    96,
    64
   ],
   "bits": 4,
   "group_size": 32,
   "bytes_before": 24576,
   "bytes_after": 3840,
   "note": ""
  },
  {
   "name": "up.bias",
   "shape": [
    96
   ],
   "bits": null,
   "group_size": null,
   "bytes_before": 384,
   "bytes_after": 384,
   "note": "vector"
  },
  {
   "name": "norm.weight",
   "shape": [
    96
   ],
   "bits": null,
   "group_size": null,
   "bytes_before": 384,
   "bytes_after": 384,
   "note": "vector"
  },
  {
   "name": "norm.bias",
   "shape": [
    96
   ],
   "bits": null,
   "group_size": null,
   "bytes_before": 384,
   "bytes_after": 384,
   "note": "vector"
  },
  {
   "name": "down.weight",
   "shape": [
    64,
    96
   ],
   "bits": 4,
   "group_size": 32,
   "bytes_before": 24576,
   "bytes_after": 3840,
   "note": ""
  },
  {
   "name": "head.weight",
   "shape": [
    20,
    64
   ],
   "bits": 4,
   "group_size": 32,
   "bytes_before": 0,
   "bytes_after": 0,
   "note": "shared with embed.weight"
  }
 ]
}""",
    )


def test_report_counts_padding():
    """K = 100 takes 4 chunks of 16 bytes at int4."""
    model = nn.Linear(100, 5, bias=False)
    result = quantize_(model, rtn_int4(32))
    assert (result.bytes_before, result.bytes_after) == (5 * 100 * 4, 5 * (64 + 4 * 4))


def test_report_of_a_float_model():
    result = report(Model())
    assert {row.note for row in result.rows} == {"not selected", "vector"}
    assert result.bits_per_weight == 32


def test_report_of_nothing():
    assert report(nn.ReLU()).bits_per_weight == 0
    assert_expected_inline(
        str(report(nn.ReLU())),
        """\
weight  shape  bits  group  bytes before  bytes after  note
------  -----  ----  -----  ------------  -----------  ----
total          0.00                    0            0""",
    )
