"""A tiny V4 on a Hopper GPU through `vllm serve` in W4A8, beside the same in plain PyTorch."""

import math

import pytest
import torch

from tests.gpu.test_serve_gpu import MODEL, PROMPTS, Servers, ask_all, distance

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("servers")]

W4A8 = {"VLLM_DSV4_MOE_FORMATS": "nvfp4,mxfp4", "VLLM_DSV4_MOE_ACTIVATIONS": "fp8"}
REFERENCE = W4A8 | {"VLLM_DSV4_MOE_BACKEND": "reference"}
SERVERS: Servers = {
    "nvfp4": ([], W4A8),
    "mxfp4": ([], W4A8),
    "nvfp4_reference": (["--enforce-eager"], REFERENCE),
    "mxfp4_reference": (["--enforce-eager"], REFERENCE),
}
# Mean difference of log-probabilities, nats: half of what quantising activations to NVFP4 does.
# Sums that WGMMA keeps to 13 bits put some E4M3 codes of h on the other side.
SAME_NUMERICS = 0.08


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("W4A8 is Hopper's")
    yield from ask_all(SERVERS, tmp_path_factory.mktemp("serve_w4a8"))


@pytest.mark.parametrize("weight_format", ["nvfp4", "mxfp4"])
def test_every_layer_is_ours_and_agrees_with_the_reference(answers, weight_format, record_property):
    logprobs, tokens, log = answers(weight_format)
    kind = f"runs {weight_format.upper()} experts, on sm90: layers 0-{MODEL.layers - 1} (W4A8"
    assert kind in log and "vLLM keeps the experts" not in log
    assert all(math.isfinite(value) and value <= 0 for value in logprobs)
    assert [len(answer) for answer in tokens] == [16] * len(PROMPTS)
    difference = distance(logprobs, answers(f"{weight_format}_reference")[0])
    record_property("reference", difference)
    assert difference <= SAME_NUMERICS
