"""`dsv4-moe calibrate`: it records what the GEMMs read, over all ranks, and writes a file."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench import activation_error
from dsv4_kernels import activation_scale, moe, reference
from dsv4_kernels.backends import REFERENCE
from dsv4_kernels.types import ActivationAmax, Routing

from vllm_dsv4_moe.commands.calibrate import LayerAmax, layer_scales, merge, read_prompts
from vllm_dsv4_moe.commands.cli import main
from vllm_dsv4_moe.commands.tiny import write_tiny_checkpoint
from vllm_dsv4_moe.commands.tiny_config import TinyConfig

NUM_EXPERTS, TOP_K, LIMIT = 8, 3, 10.0


@pytest.fixture(scope="module")
def weights():
    return activation_error.make_weights(torch.Generator().manual_seed(0))


def make_tokens(weights, num_tokens=20):
    generator = torch.Generator().manual_seed(1)
    x = (3 * torch.randn(num_tokens, weights.hidden, generator=generator)).bfloat16()
    # Expert 5 gets no token.
    order = torch.rand(num_tokens, NUM_EXPERTS - 1, generator=generator).argsort(1)[:, :TOP_K]
    ids = torch.tensor([0, 1, 2, 3, 4, 6, 7])[order]
    return x, Routing(torch.rand(num_tokens, TOP_K, generator=generator), ids)


def record(weights, x, routing, experts):
    """What the rank that owns these experts records, as its worker sends it."""
    expert_map = torch.full((NUM_EXPERTS,), -1, dtype=torch.int32)
    expert_map[experts] = torch.arange(len(experts), dtype=torch.int32)
    amax = ActivationAmax(torch.zeros(1), torch.zeros(len(experts)))
    local = type(weights)(*(tensor[experts] for tensor in weights))
    reference.moe(x, routing, local, expert_map=expert_map, limit=LIMIT, amax=amax)
    return [
        {
            "layer": 4,
            "num_experts": NUM_EXPERTS,
            "fc1": float(amax.fc1),
            "experts": experts,
            "fc2": amax.fc2.tolist(),
        }
    ]


def test_recorded_is_what_the_formula_gives(weights):
    x, routing = make_tokens(weights)
    (found,) = record(weights, x, routing, list(range(NUM_EXPERTS)))
    assert found["fc1"] == float(x.abs().max())
    inter = weights.intermediate
    for expert in range(NUM_EXPERTS):
        token, slot = (routing.ids == expert).nonzero(as_tuple=True)
        if len(token) == 0:
            assert expert == 5 and found["fc2"][expert] == 0
            continue
        parts = weights.w13[expert], weights.w13_block_scales[expert]
        gate_up = x[token].double() @ reference.nvfp4_dequantize(*parts, 1.0).double().T
        gate_up *= weights.w13_global_scales[expert].repeat_interleave(inter)
        gate, up = gate_up.split(inter, dim=1)
        gate = gate.clamp(max=LIMIT)
        h = gate / (1 + torch.exp(-gate)) * up.clamp(-LIMIT, LIMIT)
        h = h * routing.weights[token, slot].double()[:, None]
        assert found["fc2"][expert] == pytest.approx(float(h.abs().max()), rel=1e-4)


@pytest.mark.parametrize(
    "placement",
    [
        pytest.param([[0, 1, 2, 3], [4, 5, 6, 7]], id="linear"),
        pytest.param([[0, 2, 4, 6], [1, 3, 5, 7]], id="round-robin"),
        pytest.param([[7, 0], [3, 2], [5, 4], [1, 6]], id="moved"),
    ],
)
def test_ranks_merge_to_the_single_rank(weights, placement):
    x, routing = make_tokens(weights)
    whole = merge([record(weights, x, routing, list(range(NUM_EXPERTS)))])
    assert merge([record(weights, x, routing, experts) for experts in placement]) == whole


def test_an_expert_on_two_ranks_has_the_larger_magnitude():
    ranks = [
        [{"layer": 0, "num_experts": 3, "fc1": 1.0, "experts": [0, 1, 2], "fc2": [1.0, 2.0, 0.0]}],
        [{"layer": 0, "num_experts": 3, "fc1": 5.0, "experts": [2, 1, 2], "fc2": [3.0, 1.0, 4.0]}],
    ]
    assert merge(ranks) == {0: LayerAmax(5.0, [1.0, 2.0, 4.0])}


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_magnitudes_that_are_not_finite_are_refused(value):
    recorded = {"layer": 7, "num_experts": 1, "fc1": 1.0, "experts": [0], "fc2": [value]}
    with pytest.raises(ValueError, match="layer 7 has activations that are not finite"):
        merge([[recorded]])


@pytest.mark.parametrize("headroom", [1, 4])
def test_scales_hold_the_magnitudes_with_headroom(headroom):
    scales = layer_scales(LayerAmax(13.0, [7.0, 0.0, 0.5]), headroom)
    for scale, amax in ((scales.fc1, 13.0), (scales.fc2[0], 7.0), (scales.fc2[2], 0.5)):
        assert headroom * amax <= scale * 2688 < 2 * headroom * amax
        assert math.frexp(scale)[0] == 0.5
    assert scales.fc2[1] == scales.fc2[0]


def test_only_the_reference_backend_records(weights):
    shape = moe.MoeShape(8, 8, TOP_K, weights.hidden, weights.intermediate, 16, False)
    layer = moe.prepare_layer(REFERENCE, shape, weights, limit=LIMIT, activation_scales=None)
    recording = moe.recording_layer(layer)
    x, routing = make_tokens(weights, 4)
    moe.moe(x, routing, recording, torch.empty(0, dtype=torch.uint8), out=torch.empty_like(x))
    assert recording.amax.fc1 == x.abs().max() and layer.amax is None
    other = replace(layer, backend=replace(REFERENCE, name="sm90"))
    with pytest.raises(ValueError, match="sm90 backend does not record"):
        moe.recording_layer(other)


def test_prompts_of_a_text_file_and_of_jsonl(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\n two, with spaces\n")
    assert read_prompts(text) == ["one", " two, with spaces"]
    messages = [{"role": "user", "content": "hi"}]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(f'{{"prompt": "one"}}\n{json.dumps({"messages": messages})}\n')
    assert read_prompts(lines) == ["one", messages]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("p.txt", "\n", "has no prompt", id="empty"),
        pytest.param("p.jsonl", '{"prompt": "a"}\nb', "p.jsonl:2 is not JSON", id="not-json"),
        pytest.param("p.jsonl", '{"text": "a"}', "p.jsonl:1 has neither", id="other-key"),
        pytest.param("p.jsonl", '{"prompt": 3}', "p.jsonl:1 has neither", id="not-text"),
    ],
)
def test_bad_prompts_end_in_one_sentence(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_text(content)
    assert main(["calibrate", "model", str(tmp_path / name), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--headroom", "3"], "use a power of two", id="headroom"),
        pytest.param(["--max-tokens", "0"], "must be at least 1", id="max-tokens"),
    ],
)
def test_bad_options_end_in_one_sentence(tmp_path, capsys, options, words):
    assert main(["calibrate", "model", "prompts", str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err


def test_a_model_without_scales_is_refused(tmp_path, capsys, monkeypatch):
    """Whatever the environment says of formats, MXFP4 layers are not recorded."""
    given = {}

    def engine(**options):
        given.update(options)
        return SimpleNamespace(collective_rpc=lambda method: [0])

    monkeypatch.setattr("vllm.LLM", engine)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick brown fox")
    assert main(["calibrate", "model", str(prompts), str(tmp_path / "out")]) == 2
    assert "model has no layer with NVFP4 experts" in capsys.readouterr().err
    assert given["additional_config"]["dsv4_moe"]["formats"] == "nvfp4"


@pytest.mark.parametrize("model", ["deepseek-ai/DeepSeek-V4.1-Flash", "FOLDER"])
def test_mxfp4_experts_are_refused_before_anything_is_loaded(model, tmp_path, capsys, monkeypatch):
    """It would take minutes, and on a CPU vLLM has nothing that runs them."""
    monkeypatch.setattr("vllm.LLM", None)
    if model == "FOLDER":
        sizes = TinyConfig(layers=2, hidden=128, intermediate=64, experts=8, expert_format="mxfp4")
        model = str(write_tiny_checkpoint(tmp_path / "model", sizes))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick brown fox")
    assert main(["calibrate", model, str(prompts), str(tmp_path / "out")]) == 2
    assert f"{model} has no layer with NVFP4 experts" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_through_vllm_writes_the_file_that_policy_file_reads(tmp_path):
    config = TinyConfig(layers=3, hidden=128, intermediate=64, experts=8)
    model = write_tiny_checkpoint(tmp_path / "model", config)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "scales.json"
    chat = {"messages": [{"role": "user", "content": "Which expert are you?"}]}
    prompts.write_text(json.dumps({"prompt": "The quick brown fox"}) + "\n" + json.dumps(chat))
    arguments = [str(model), str(prompts), str(out), "--max-model-len", "1024", "--json"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "vllm_dsv4_moe.commands.cli",
            "calibrate",
            *arguments,
            "--max-tokens",
            "4",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["layers"] == 3 and summary["tokens"] > 40
    assert not any(summary["experts_unseen"].values())
    for layer in range(3):
        scales = activation_scale.from_file(out, layer, 8, [5, 1])
        assert scales.fc1.shape == (1,) and scales.fc2.shape == (2,)
        # RMSNorm bounds what the layer reads: its largest value is a few units, with headroom 4.
        assert 4 / 2688 < float(scales.fc1) < 4 * 128**0.5 * 2 * 2 / 2688
    assert json.loads(out.read_text())["source"]["headroom"] == 4
