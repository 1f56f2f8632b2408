"""Tests import their helpers by name from this folder."""

import sys
from pathlib import Path

import pytest
import torch

from mini_flash_attention import dispatch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so a result that was not written shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def fill(*args, original=original, **kwargs):
            x = original(*args, **kwargs)
            with torch.no_grad():  # Inductor makes leaves that require gradients
                return x.fill_(float("nan")) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, fill)
    monkeypatch.setattr(dispatch, "MAX_KEPT", 1)  # parts are fresh too
    monkeypatch.setattr(dispatch, "_rooms", {})
