"""The gate inside the router, through vLLM's own runner and model; the kernel is interpreted."""

import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from dsv4_kernels import reference
from dsv4_kernels.route.gate_route import MAX_TOKENS, gate_route

from tests.support import loading
from tests.support.serve_probe import fused_and_kept, interpreted_gate_op
from vllm_dsv4_moe.commands.tiny import TinyConfig

CONFIG = TinyConfig(layers=2, hash_layers=1, hidden=64, intermediate=32, experts=12, heads=4)


@pytest.fixture(scope="module")
def layers(vllm_config):
    """The model's MoE layers, with weights of the gate whose sums are exact in any order."""
    method = "vllm_dsv4_moe.moe_method.Dsv4Method.gate_op"
    with (
        mock.patch(method, interpreted_gate_op),
        mock.patch("vllm_dsv4_moe.runner.fused_gate", fused_and_kept),
    ):
        model = loading.load_model(vllm_config)
    layers = [layer.ffn for layer in model.model.layers]
    for layer in layers:
        layer.gate.weight.data.copy_(integers(CONFIG.experts, CONFIG.hidden) / 64)
    return layers


def integers(*size: int) -> torch.Tensor:
    return torch.randint(-3, 4, size, generator=torch.Generator().manual_seed(len(size)))


def batch(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states whose logits are exact in bf16's 8 bits, and token ids."""
    x = integers(num_tokens, CONFIG.hidden).bfloat16()
    x[:, 8:] = 0
    return x, torch.arange(num_tokens, dtype=torch.int32) + 5


def expected(layer, x, token_ids):
    router = layer.experts.router
    return reference.router_topk(
        x.float() @ layer.gate.weight.float().T, CONFIG.top_k, bias=router.bias,
        table=router.table, token_ids=token_ids, scaling=router.scaling,
    )  # fmt: skip


@pytest.mark.parametrize("num_tokens", [1, 17, MAX_TOKENS, MAX_TOKENS + 1])
@pytest.mark.parametrize("kind", ["hash", "dense"])
def test_hidden_states_are_routed_as_the_gates_logits_are(layers, kind, num_tokens):
    layer = layers[0 if kind == "hash" else 1]
    router = layer.experts.router
    x, token_ids = batch(num_tokens)
    with mock.patch.object(router.gate, "op", wraps=gate_route) as op:
        ours = router.select_experts(x, x, torch.int64, input_ids=token_ids)
    assert op.called == (num_tokens <= MAX_TOKENS)
    wanted = expected(layer, x, token_ids)
    assert torch.equal(ours[1], wanted.ids.long())
    torch.testing.assert_close(ours[0], wanted.weights, rtol=2e-6, atol=0)


@pytest.mark.parametrize("num_tokens", [3, MAX_TOKENS + 1])
def test_the_runner_gives_what_it_gives_with_vllms_gate(layers, vllm_config, num_tokens):
    """The model's layer as a whole: runner, shared expert, experts."""
    from vllm.forward_context import set_forward_context

    (x, token_ids), layer = batch(num_tokens), layers[1]
    runner, router = layer.experts, layer.experts.router
    assert runner.gate is None and router.gate.linear is layer.gate
    with set_forward_context(None, vllm_config, num_tokens=num_tokens):
        ours = layer(x.clone(), token_ids)
        with mock.patch.object(runner, "gate", layer.gate), mock.patch.object(router, "gate", None):
            theirs = layer(x.clone(), token_ids)
    assert torch.equal(ours, theirs) and ours.float().norm() > 0


def test_the_gates_weight_is_loaded_once_under_its_own_name(layers):
    names = [name for name, _ in layers[1].named_parameters(remove_duplicate=False)]
    assert [name for name in names if name.endswith("gate.weight")] == ["gate.weight"]


def test_padding_rows_get_no_expert(layers):
    x, token_ids = batch(4)
    padding = torch.tensor([False, True, False, True])
    with mock.patch("vllm_dsv4_moe.router.padding_mask", return_value=padding):
        weights, ids = layers[1].experts.router.select_experts(x, x, input_ids=token_ids)
    assert (ids[padding] == -1).all() and (weights[padding] == 0).all()
    assert (ids[~padding] >= 0).all()


def test_eplbs_copies_replace_the_ids_after_they_are_recorded(layers):
    router, seen = layers[1].experts.router, []
    x, token_ids = batch(4)
    state = mock.Mock(num_unpadded_tokens_tensors=[None])
    mapping = "vllm.model_executor.layers.fused_moe.router.base_router"
    router.set_capture_fn(seen.append)
    with (
        mock.patch.object(router, "eplb_state", state),
        mock.patch(
            f"{mapping}.eplb_map_to_physical_and_record",
            side_effect=lambda topk_ids, **_: topk_ids + 100,
        ),
    ):
        ids = router.select_experts(x, x, input_ids=token_ids)[1]
    router.set_capture_fn(None)
    assert torch.equal(seen[0], expected(layers[1], x, token_ids).ids)
    assert torch.equal(ids, seen[0] + 100)


def test_micro_batches_have_a_scratch_each_from_the_first_call_on(layers, vllm_config):
    """The profiling run's batch is large; a capture later must find every lane's scratch there."""
    from vllm.v1.worker import ubatching

    from vllm_dsv4_moe import gate

    gate._lane_scratch.cache_clear()
    fused = layers[1].experts.router.gate
    x, token_ids = batch(MAX_TOKENS + 1)
    with mock.patch.object(fused, "num_lanes", 2):
        with mock.patch.object(gate, "make_scratch", wraps=gate.make_scratch) as make:
            layers[1].experts.router.select_experts(x, x, input_ids=token_ids)
            assert make.call_count == 2
            first = fused.scratch()
            with mock.patch.dict(ubatching._THREAD_ID_TO_CONTEXT, {threading.get_ident(): 1}):
                second = fused.scratch()
            assert make.call_count == 2
    assert first.counters.data_ptr() != second.counters.data_ptr()
    assert first.partials.data_ptr() != second.partials.data_ptr()


def linear(**changes):
    from vllm.model_executor.layers.fused_moe import GateLinear

    stock = {
        "is_unquantized": True,
        "bias": None,
        "weight": torch.zeros(12, 64, dtype=torch.bfloat16),
        "out_dtype": torch.float32,
        "allow_ll_bf16_gemm": True,
    }
    return mock.Mock(spec=GateLinear, **stock | changes)


WHY_NOT = {
    "another module": ({}, {}, torch.nn.Linear(4, 4), "it is a Linear"),
    "quantised": ({"is_unquantized": False}, {}, None, "quantised"),
    "with a bias": ({"bias": torch.zeros(12)}, {}, None, "a bias inside"),
    "fp32 weights": ({"weight": torch.zeros(12, 64)}, {}, None, "float32 (12, 64)"),
    "bf16 logits": ({"out_dtype": torch.bfloat16}, {}, None, "logits are torch.bfloat16"),
    "LoRA": ({}, {"is_lora_enabled": True}, None, "LoRA may change it"),
    "context parallel": ({}, {"pcp_size": 2}, None, "gathers logits"),
}


@pytest.mark.parametrize("gate, config, module, says", WHY_NOT.values(), ids=WHY_NOT)
def test_gates_of_another_kind_stay_vllms(gate, config, module, says):
    from vllm_dsv4_moe.gate import fused_gate, logger, unsupported_reason

    stock = {"num_logical_experts": 12, "hidden_dim": 64, "is_lora_enabled": False, "pcp_size": 1}
    moe_config = SimpleNamespace(**stock | config)
    assert says in unsupported_reason(module or linear(**gate), moe_config)
    assert unsupported_reason(linear(), SimpleNamespace(**stock)) is None
    with mock.patch.object(logger, "info_once") as say:
        assert fused_gate(module or linear(**gate), moe_config, gate_route, False) is None
    assert says in say.call_args.args[0] % say.call_args.args[1:]


@pytest.mark.parametrize(
    "is_hash, vllms_is_fast, fewest",
    [(False, True, 17), (True, True, 4), (False, False, 1), (True, False, 1)],
)
def test_small_batches_go_to_vllms_gate_where_that_is_faster(
    vllm_config, is_hash, vllms_is_fast, fewest
):
    from vllm.config import set_current_vllm_config

    from vllm_dsv4_moe.gate import FusedGate

    with set_current_vllm_config(vllm_config):
        gate = FusedGate(linear(allow_ll_bf16_gemm=vllms_is_fast), gate_route, is_hash)
    assert [n for n in range(MAX_TOKENS + 9) if gate.fits(n)] == [*range(fewest, MAX_TOKENS + 1)]


@pytest.mark.parametrize(
    "backend, gate, ours",
    [("sm90", "auto", True), ("sm100", "auto", True), ("sm90", "vllm", False)]
    + [("reference", "auto", False)],
)
def test_which_layers_take_the_gate(backend, gate, ours):
    from vllm_dsv4_moe.moe_method import Dsv4Method

    method = mock.Mock(settings=SimpleNamespace(gate=gate))
    method.backend.name = backend
    assert (Dsv4Method.gate_op(method) is gate_route) == ours
    assert ours or Dsv4Method.gate_op(method) is None
