"""How bench.layer and bench.mxfp4 take contenders by turns, without a GPU."""

import pytest
import torch
from bench import layer

WANT = torch.ones(2, 4)
INPUTS = {1: ["a", "b"], 8: ["c"]}


@pytest.fixture
def turns(monkeypatch):
    """What each turn's first call returned; the n-th turn takes 10 n us a call."""
    taken: list[float] = []

    def time_us(calls, replays, meanwhile):
        meanwhile()
        taken.append(calls[0]()[0, 0].item())
        return 10.0 * len(taken)

    monkeypatch.setattr(layer, "time_us", time_us)
    monkeypatch.setattr(layer, "query_gpu", lambda *what: ["1980", "690.5"])
    return taken


def contender(value: float, fails_at: str = ""):
    def make():
        def make_call(inputs):
            def call():
                if inputs == fails_at:
                    raise RuntimeError("no kernel")
                return value * WANT

            return call

        return make_call

    return make


def measured(makers) -> list[dict]:
    expected = {tokens: [(each, WANT) for each in sets] for tokens, sets in INPUTS.items()}
    return list(layer.measure(makers, INPUTS, expected, dict.fromkeys(makers, 0.01)))


def test_contenders_take_turns_forth_and_back(turns):
    rows = measured({"one": contender(1.0), "two": contender(1.001)})
    assert turns == pytest.approx([1, 1.001, 1.001, 1] * 2)
    assert [(row["backend"], row["tokens"], row["us"]) for row in rows] == [
        ("one", 1, 25.0),
        ("two", 1, 25.0),
        ("one", 8, 65.0),
        ("two", 8, 65.0),
    ]
    assert rows[0]["sm_mhz"] == 1980 and rows[0]["watts"] == 690.5 and "turns" not in rows[0]
    assert [row["error"] for row in rows] == pytest.approx([0, 1e-3] * 2, abs=1e-5)


def test_a_wrong_output_is_not_timed(turns):
    rows = measured({"one": contender(1.0), "wrong": contender(1.1)})
    assert set(turns) == {1.0}
    assert [row.keys() for row in rows if row["backend"] == "wrong"] == [
        {"backend", "tokens", "error"}
    ] * 2


def test_the_error_is_of_all_calls_together():
    """A call with few rows, or one that is all zeros, counts by its norm."""
    outs = {"a": 1.5, "b": 0.0, "c": 20.0}
    expected = [("a", WANT), ("b", 0 * WANT), ("c", 20 * WANT)]
    error = layer.error_of(lambda inputs: lambda: outs[inputs] * WANT, expected)
    assert error == pytest.approx(0.5 / (1 + 20**2) ** 0.5)


def test_an_output_that_is_no_number_is_not_timed(turns):
    (row, _) = measured({"nan": contender(float("nan"))})
    assert "us" not in row and not turns


def test_a_failure_is_a_row_and_costs_no_other(turns):
    def cannot():
        raise ValueError("no such backend")

    makers = {"none": cannot, "at 8": contender(1.0, fails_at="c"), "one": contender(1.0)}
    rows = measured(makers)
    failures = {(row["backend"], row["tokens"]): row.get("failure") for row in rows}
    assert failures == {
        ("none", 0): "ValueError('no such backend')",
        ("at 8", 1): None,
        ("one", 1): None,
        ("at 8", 8): "RuntimeError('no kernel')",
        ("one", 8): None,
    }
    assert all("us" in row for row in rows if row.get("failure") is None)


def test_a_gpu_without_a_power_meter_has_times_all_the_same(turns, monkeypatch):
    monkeypatch.setattr(layer, "query_gpu", lambda *what: ["1980", "[N/A]"])
    assert all("us" in row and "watts" not in row for row in measured({"one": contender(1.0)}))
