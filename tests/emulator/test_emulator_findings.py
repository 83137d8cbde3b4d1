"""Every kind of mistake that the PTX emulator reports, each in a few lines of PTX.

Each case has its correct twin: the same lines with the missing one in place run without a report.
"""

import numpy as np
import pytest

from tests.emulator.finding_cases import MEMORY_CASES, SETUP, Case
from tests.emulator.finding_cases_matrix import MATRIX_CASES
from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.snippet import run_snippet

MODES = [("eager", 0), ("lazy", 0), ("random", 0), ("random", 1), ("starved", 0)]
CASES = MEMORY_CASES | MATRIX_CASES


def _run(case: Case, body: str, mode: str, seed: int) -> None:
    data = np.zeros(1024, np.uint32)
    run_snippet(
        SETUP + body,
        {"data": data},
        warps=case.warps,
        ctas=case.ctas,
        produced=("data",) if case.dependent else (),
        shared_bytes=8192,
        mode=mode,
        seed=seed,
    )


@pytest.mark.parametrize(("mode", "seed"), MODES, ids=[f"{m}-{s}" for m, s in MODES])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_mistake_is_reported(case, mode, seed):
    with pytest.raises(Finding, match=case.message) as found:
        _run(case, case.wrong, mode, seed)
    assert found.value.kind == case.kind


@pytest.mark.parametrize(("mode", "seed"), MODES, ids=[f"{m}-{s}" for m, s in MODES])
@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.right], ids=[n for n, c in CASES.items() if c.right]
)
def test_the_correct_form_is_not_reported(case, mode, seed):
    _run(case, case.right, mode, seed)


def test_every_kind_has_a_case():
    assert {case.kind for case in CASES.values()} == set(Finding.KINDS)


def test_a_report_says_where():
    with pytest.raises(Finding, match=r"at line \d+: st\.global\.b32") as found:
        run_snippet("st.global.b32 [data+64], lane;", {"data": np.zeros(4, np.uint32)})
    assert "warp 0 of CTA (0, 0, 0), mode eager, seed 0" in str(found.value)
