"""The emulator's e4m3 WGMMA against an H200, bit for bit: `tests/data/wgmma_e4m3.npz`.

It holds operands and sums: per probe `<name> x<WGMMAs of a group>|` with a (64, 32) and b (n, 32)
E4M3 as uint8, c (64, n), where there is one, and d (64, n) float32 as uint32.
"""

import numpy as np
import pytest
import torch

from tests.emulator.instruction_probes import answers
from tests.emulator.matrix_snippets import run_wgmma
from tests.emulator.ptx_emulator import tensor_core
from tests.emulator.ptx_emulator.numerics import E4M3
from tests.gpu.hopper_recordings import DATA


def probes() -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(DATA / "wgmma_e4m3.npz") as recording:
        for key in recording.files:
            name, _, part = key.partition("|")
            if part:
                found.setdefault(name, {})[part] = recording[key]
    return found


PROBES = probes()


def sums(name: str, on_gpu: bool) -> np.ndarray:
    """(64, n) uint32."""
    probe = PROBES[name]
    a, b = E4M3[probe["a"]], E4M3[probe["b"]]
    c = probe["c"].view(np.float32) if "c" in probe else None
    repeats = int(name.rpartition("x")[2])

    def run() -> None:
        run_wgmma(a, b, c, kind="e4m3", registers=True, repeats=repeats)

    fragments = answers(run, on_gpu).view(np.uint32).reshape(4, 8, 4, -1, 2, 2)
    # (warp, row, lane of a quad, eight of n, row half, column)
    return fragments.transpose(0, 4, 1, 3, 2, 5).reshape(64, -1)


@pytest.mark.parametrize("name", PROBES)
def test_sums_of_e4m3_are_the_gpu_s(name):
    np.testing.assert_array_equal(sums(name, False), PROBES[name]["d"])


@pytest.mark.parametrize("bits", [12, 14, 25])
def test_the_recording_tells_how_wide_hopper_adds_e4m3(monkeypatch, bits):
    monkeypatch.setitem(tensor_core.FRACTION_BITS, "e4m3", bits)
    name = "random--6-8-C x1"
    assert (sums(name, False) == PROBES[name]["d"]).mean() < 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROBES)
def test_the_gpu_at_hand_adds_e4m3_as_recorded(name):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the probes are sm_90a's, and this GPU is another")
    np.testing.assert_array_equal(sums(name, True), PROBES[name]["d"])
