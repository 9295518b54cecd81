import copy
import dataclasses
import json
import pickle

import pytest
from expecttest import assert_expected_inline
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import quantize_ as torchao_quantize_

from rtn_tensor import RTNConfig, RTNQuantizedTensor, quantize_, rtn, rtn_int4, rtn_int8
from rtn_tensor.config import CLASSES, RTNInt4WeightConfig, RTNInt8WeightConfig
from rtn_tensor.formats import FORMATS


def test_defaults():
    assert RTNConfig() == RTNConfig(bits=4, group_size=64, scale_method="search", version=1)
    assert rtn() == rtn_int4() == RTNConfig()
    assert rtn(8) == rtn_int8() == RTNConfig(bits=8)
    assert rtn_int8() == RTNConfig(8, 128, "absmax")
    assert rtn(4, 32) == RTNConfig(4, 32, "search")
    assert rtn(8, 64, "signed") == rtn_int8(64, "signed") == RTNConfig(8, 64, "signed")
    assert rtn_int4(-1, "signed") == RTNConfig(4, -1, "signed")


def test_is_a_value():
    config = rtn_int4(64)
    assert len({config, rtn_int4(64), rtn_int4(32), rtn_int8(64), rtn_int4(64, "signed")}) == 4
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config
        assert hash(again) == hash(config)
        assert type(again) is type(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 8
    assert_expected_inline(
        repr(config),
        """RTNInt4WeightConfig(bits=4, group_size=64, scale_method='search', version=1, activations=None)""",
    )
    assert eval(repr(config)) == config


def test_its_class_has_its_bits():
    """transformers reads them off the class's name, torchao finds what quantizes a module by the exact
    class."""
    assert set(CLASSES) == set(FORMATS)
    for bits, kind in CLASSES.items():
        assert kind.__name__ == f"RTNInt{bits}WeightConfig"
        configs = [rtn(bits), RTNConfig(bits), kind(), kind(bits)]
        for other in set(CLASSES.values()) - {kind}:
            message = rf"bits={bits}, and {other.__name__} is for .; use rtn\(bits={bits}\)"
            with pytest.raises(ValueError, match=message):
                other(bits)
            with pytest.raises(ValueError, match=message):
                dataclasses.replace(other(), bits=bits)
        assert {type(config) for config in configs} == {kind}
        assert set(configs) == {rtn(bits)}
        linear = nn.Linear(64, 8)
        torchao_quantize_(linear, rtn(bits, 32))
        assert isinstance(linear.weight, RTNQuantizedTensor)
        assert linear.weight.bits == bits
    assert issubclass(RTNInt4WeightConfig, RTNConfig)
    assert issubclass(RTNInt8WeightConfig, RTNConfig)
    assert rtn_int4() != rtn_int8()


@dataclasses.dataclass(frozen=True)
class Own(RTNConfig):
    note: str = ""


def test_a_subclass_stays_one():
    config = Own(8, 32, note="mine")
    for again in (
        config,
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config, bits=4),
    ):
        assert type(again) is Own
        assert again.note == "mine"
    linear = nn.Linear(64, 8)
    quantize_(linear, config)
    assert linear.weight.bits == 8
    for wrong in ([4], None, "4", 4.5):
        with pytest.raises((TypeError, ValueError), match="bits"):
            RTNConfig(wrong)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 96, 128, 4096])
@pytest.mark.parametrize("scale_method", ["absmax", "signed", "search", "minmax"])
def test_survives_torchao_dict_and_json(bits, group_size, scale_method):
    config = RTNConfig(bits, group_size, scale_method)
    as_dict = config_to_dict(config)
    assert config_from_dict(json.loads(json.dumps(as_dict))) == config


def test_dict_is_pinned():
    """Checkpoints hold this dict: a changed key is a file that no longer loads."""
    assert_expected_inline(
        json.dumps(config_to_dict(rtn_int8(32, "signed"))),
        """{"_type": "RTNInt8WeightConfig", "_version": 1, "_data": {"bits": 8, "group_size": 32, "scale_method": "signed", "activations": null}}""",
    )


@pytest.mark.parametrize("name", ["RTNConfig", "RTNInt8WeightConfig"])
def test_old_dicts_are_read(name):
    """Those written before the classes had bits say RTNConfig."""
    data = {"_type": name, "_version": 1, "_data": {"bits": 8, "group_size": 32, "scale_method": "signed"}}
    assert config_from_dict(data) == rtn_int8(32, "signed")
    with pytest.raises(ValueError, match="bits=8, and RTNInt4WeightConfig is for 4"):
        config_from_dict(data | {"_type": "RTNInt4WeightConfig"})


@pytest.mark.parametrize("bits", [0, 3, 5, 16, True, 4.0, "4", None])
def test_bits_are_checked(bits):
    with pytest.raises(ValueError, match=r"^bits=.* is not supported; use 4 or 8$"):
        RTNConfig(bits=bits)


@pytest.mark.parametrize("group_size", [0, -2, -32, 1, 31, 33, 48, True, 64.0, "64", None])
def test_group_size_is_checked(group_size):
    with pytest.raises(ValueError, match=r"^group_size=.* is not supported; use a multiple of 32"):
        RTNConfig(group_size=group_size)


@pytest.mark.parametrize("scale_method", ["", "mse", "Absmax", None, 4])
def test_scale_method_is_checked(scale_method):
    with pytest.raises(
        ValueError,
        match=r"^scale_method=.* is not supported; use one of 'absmax', 'signed', 'search', 'minmax', "
        r"'search8'$",
    ):
        RTNConfig(scale_method=scale_method)


def test_messages():
    with pytest.raises(ValueError, match="bits") as error:
        rtn(bits=True)
    assert_expected_inline(str(error.value), """bits=True is not supported; use 4 or 8""")
    with pytest.raises(ValueError, match="group_size") as error:
        rtn_int4(100)
    assert_expected_inline(
        str(error.value),
        """group_size=100 is not supported; use a multiple of 32 (32, 64 and 128 are usual), or -1 for one group per row""",
    )
    with pytest.raises(ValueError, match="scale_method") as error:
        rtn_int8(scale_method="hqq")
    assert_expected_inline(
        str(error.value),
        """scale_method='hqq' is not supported; use one of 'absmax', 'signed', 'search', 'minmax', 'search8'""",
    )
    with pytest.raises(ValueError, match="bits") as error:
        dataclasses.replace(rtn_int4(), bits=3)
    assert_expected_inline(str(error.value), """bits=3 is not supported; use 4 or 8""")
