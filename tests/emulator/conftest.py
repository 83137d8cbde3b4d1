"""Kernels of sm90 that launch in the emulator."""

import pytest
from dsv4_kernels.sm90 import gemm as sm90

from tests.emulator.sm90_emulation import Emulation


@pytest.fixture
def emulation(monkeypatch) -> Emulation:
    """Makes sm90's host functions launch in the emulator."""
    emulation = Emulation()
    monkeypatch.setattr(sm90, "launch", emulation.launch)
    return emulation
