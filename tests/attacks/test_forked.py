"""The runner of the attacks sees a crash, a hang, the end of a process, errors of other kinds, and memory no
file may ask for."""

import ctypes
import faulthandler
import json
import os
import time

import pytest
import torch
from forked import survives


def fail(error):
    raise error


def crash():
    faulthandler.disable()  # this crash is meant, and needs no report
    ctypes.string_at(0)


def test_what_survives():
    assert survives(lambda a, b: a + b, 1, 2).value == 3
    outcome = survives(fail, ValueError("why"))
    assert (outcome.error, outcome.message) == ("ValueError", "why")
    assert survives(fail, KeyError("name"), allowed=(KeyError,)).error == "KeyError"
    assert survives(lambda: torch.ones(3).sum().item()).value == 3


@pytest.mark.parametrize(
    ("attack", "what"),
    [
        (crash, "died of SIGSEGV"),
        (lambda: os._exit(3), "ended the process with status 3"),
        (lambda: os._exit(0), "ended the process with status 0"),
        (lambda: time.sleep(60), "did not end within"),
        (lambda: json.loads("{"), "JSONDecodeError"),
        (lambda: {}["name"], "KeyError: 'name'"),
        (lambda: torch.empty(1 << 40, dtype=torch.uint8), "can't allocate memory"),
    ],
)
def test_what_does_not(attack, what):
    with pytest.raises(AssertionError, match=what):
        survives(attack, seconds=1)
