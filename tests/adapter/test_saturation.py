"""The log of NVFP4 blocks that did not fit."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tests.support import loading  # noqa: F401


@pytest.fixture
def saturation():
    from vllm_dsv4_moe import saturation

    return saturation


def config(sleeps: bool = False):
    from vllm.config import CUDAGraphMode

    return SimpleNamespace(
        model_config=SimpleNamespace(enable_sleep_mode=sleeps, enforce_eager=False),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE),
    )


def watched(saturation, **counts: int):
    log = saturation.SaturationLog()
    log.counters = {name: torch.tensor([count]) for name, count in counts.items()}
    return log


def test_each_block_is_reported_once(saturation):
    log = watched(saturation, one=5, two=0)
    assert log.look() == {"one": 5}
    assert log.look() == {}
    log.counters["two"] += 3
    log.counters["one"] += 1
    assert log.look() == {"one": 1, "two": 3}


def test_the_sentence_says_how_many_where_and_what_to_do(saturation):
    words = saturation.describe({"layers.3": 2, "layers.7": 40})
    assert words.startswith("42 NVFP4 blocks of activations did not fit their scale, in 2 layers")
    assert "(most, 40, in layers.7)" in words
    assert "headroom" in words and "token" in words


@pytest.mark.parametrize(
    "interval, sleeps, watches",
    [(1.0, False, True), (0.0, False, False), (1.0, True, False)],
    ids=["on", "interval 0", "sleep mode"],
)
def test_when_it_watches(saturation, interval, sleeps, watches):
    log = saturation.SaturationLog()
    with (
        mock.patch.object(saturation, "get_current_vllm_config", lambda: config(sleeps)),
        mock.patch.object(saturation.threading, "Thread") as thread,
    ):
        for name in ("one", "two"):
            log.add(name, torch.zeros(1, dtype=torch.int64), interval)
    assert len(log.counters) == 2 * watches
    assert thread.call_count == watches  # one thread for all layers
    assert not log.captures  # counters on the CPU


def test_it_waits_for_cuda_graphs_to_be_captured(saturation):
    counter = mock.Mock(is_cuda=True)
    log = saturation.SaturationLog()
    with (
        mock.patch.object(saturation, "get_current_vllm_config", config),
        mock.patch.object(saturation.threading, "Thread"),
    ):
        log.add("one", counter, 1.0)
    assert log.captures
    assert not saturation.graphs_are_captured()  # no workspace manager, let alone a locked one


def test_an_error_is_said_once_and_looking_goes_on(saturation):
    log = watched(saturation, one=5)
    errors = [RuntimeError("out of memory"), RuntimeError("again"), None]

    def cat(tensors, real=torch.cat):
        error = errors.pop(0)
        if error is not None:
            raise error
        return real(tensors)

    with (
        mock.patch.object(saturation.torch, "cat", cat),
        mock.patch.object(saturation.logger, "warning") as say,
        mock.patch.object(saturation.time, "sleep", side_effect=[None] * 3 + [KeyboardInterrupt]),
        pytest.raises(KeyboardInterrupt),
    ):
        log._watch(1.0)
    said = [call.args[0] % call.args[1:] for call in say.mock_calls]
    assert len(said) == 2
    assert said[0] == "dsv4-moe: saturated blocks could not be counted: out of memory"
    assert said[1].startswith("dsv4-moe: 5 NVFP4 blocks of activations did not fit")


def test_all_looks_share_one_stream(saturation):
    counter = mock.Mock(is_cuda=True, device="cuda:1")
    log = watched(saturation)
    log.counters = {"one": counter}
    with (
        mock.patch.object(saturation.torch.cuda, "Stream") as stream,
        mock.patch.object(saturation.torch.cuda, "stream") as entered,
        mock.patch.object(saturation.torch, "cat", return_value=torch.tensor([7])),
    ):
        assert [log.look(), log.look()] == [{"one": 7}, {}]
    stream.assert_called_once_with("cuda:1")
    assert entered.mock_calls[0] == mock.call(stream.return_value)
    assert entered.call_count == 2
