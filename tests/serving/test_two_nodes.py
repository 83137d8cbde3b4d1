"""configs/pro-2x8xh200.yaml's topology on this machine: two servers with an engine each, which find
one another on the loopback address, as two nodes do on theirs."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from tests.serving import test_serve
from tests.serving.test_serve import (
    CONFIG,
    LONG,
    PARALLEL_TOLERANCE,
    SHORT,
    Recording,
    layer_errors,
    logprobs,
    probe_environment,
    probed,
    server_arguments,
)
from tests.support.deployments import DEPLOYMENTS
from tests.support.plain_moe import PlainMoe
from vllm_dsv4_moe.commands.serving import free_port, start, stop
from vllm_dsv4_moe.commands.tiny import write_tiny_checkpoint

pytestmark = [*test_serve.pytestmark, pytest.mark.weekly]
(FILE,) = (path for path in DEPLOYMENTS if path.stem == "pro-2x8xh200")
SETTINGS = {"activation_scale": "token"}
# vLLM compiles a helper of distributed engines, for which gcc alone will not do.
ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1"}


def options() -> list[str]:
    """Those of the file that divide the model, for two engines."""
    values = {
        "data-parallel-size": 2,
        "data-parallel-size-local": 1,
        "data-parallel-rpc-port": free_port(),
    }
    written = {name for name in yaml.safe_load(FILE.read_text()) if "parallel" in name}
    assert written == {*values, "enable-expert-parallel"}
    given = [f"--{name}={value}" for name, value in values.items()]
    return [*given, "--enable-expert-parallel", "--data-parallel-address=127.0.0.1"]


def test_two_nodes_give_what_plain_torch_gives(tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", CONFIG)
    shared = options()
    second = start(
        checkpoint,
        free_port(),
        tmp_path / "second.log",
        server_arguments(SETTINGS, *shared, "--headless", "--data-parallel-start-rank=1"),
        ENVIRONMENT | probe_environment(tmp_path, "record") | {"VLLM_CPU_OMP_THREADS_BIND": "1"},
    )
    try:
        environment = ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": "0"}
        with probed(checkpoint, tmp_path, "record", SETTINGS, *shared, **environment) as server:
            with Recording(tmp_path) as recording, ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda tokens: logprobs(server, tokens), (LONG, SHORT)))
    finally:
        stop(second)
    assert len({call["process"] for call in recording.calls}) == 2
    assert {call["local_experts"] for call in recording.calls} == {CONFIG.experts // 2}
    layers = [PlainMoe(checkpoint, number, "token", "token") for number in range(CONFIG.layers)]
    assert max(layer_errors(recording.calls, layers)) <= PARALLEL_TOLERANCE
