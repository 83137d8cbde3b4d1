"""The roofline's arithmetic: it says what it is, and no prediction goes below what peaks allow."""

import pytest
from bench import roofline_sm100 as roofline

PRO = roofline.PUBLISHED[0].shape


def test_it_says_that_it_is_a_prediction(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["roofline"])
    roofline.main()
    out = capsys.readouterr().out
    assert out.startswith("PREDICTION") and "not measured" in out
    for published in roofline.PUBLISHED:
        assert published.source in out and published.measured in out


@pytest.mark.parametrize("tokens", [1, 8, 64, 1000, 8192, 1 << 18])
@pytest.mark.parametrize("published", roofline.PUBLISHED, ids=lambda p: p.name)
def test_not_below_the_floor(published, tokens):
    total = sum(step.microseconds for step in roofline.predict(published.shape, tokens))
    assert total > roofline.floor(published.shape, tokens)


def test_what_binds_changes_from_bytes_to_operations():
    bounds = [[s.bound for s in roofline.predict(PRO, tokens)][2] for tokens in (8, 1 << 16)]
    assert bounds == ["memory", "MMA"]


def test_one_token_reads_six_experts():
    # 48 of 384 experts are here, so of 6 a token names 0.75.
    expert = 3 * 7168 * 3072 * 0.5625
    assert roofline.floor(PRO, 1) == pytest.approx(0.75 * expert / 8e12 * 1e6)
