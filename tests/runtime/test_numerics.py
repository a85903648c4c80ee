"""The switch of precision: what it refuses, and what it warns of."""

import logging

import pytest
import torch

from forgedit import Editor
from forgedit.engine.numerics import NUMERICS, check_numerics, warn_where_slow

CPU = torch.device("cpu")


def warned(caplog, monkeypatch, numerics, capability, device=CPU):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "forgedit"):
        warn_where_slow(numerics, device)
    return caplog.text


def test_emulated_half_precision_is_said_and_nothing_else(caplog, monkeypatch):
    for numerics, dtype in NUMERICS.items():
        text = warned(caplog, monkeypatch, numerics, "AVX2")
        assert bool(text) == (dtype != torch.float32)
        if text:
            assert repr(numerics) in text and "slower than 'exact'" in text and "AVX2" in text
            assert str(dtype).removeprefix("torch.") in text
        assert not warned(caplog, monkeypatch, numerics, "AVX512")
        assert not warned(caplog, monkeypatch, numerics, "AVX2", torch.device("cuda", 0))


def test_an_editor_says_it_once(folder, caplog, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with caplog.at_level(logging.WARNING, "forgedit"):
        Editor.from_pretrained(folder, numerics="fast")
    assert caplog.text.count("slower than 'exact'") == 1


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown numerics 'quick'; expected one of: reference, exact, fast, "):
        check_numerics("quick")
