"""Dsv4Router between vLLM's BaseRouter and the routing op, without a server."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from dsv4_kernels import reference
from dsv4_kernels.types import ImageBias

from tests.support import loading  # noqa: F401

EXPERTS, TOP_K, VOCAB = 8, 3, 20


def vllm_router(**changes):
    stock = {
        "top_k": TOP_K,
        "global_num_experts": EXPERTS,
        "eplb_state": None,
        "routing_method_type": "V4",
        "scoring_func": "sqrtsoftplus",
        "renormalize": True,
        "routed_scaling_factor": 1.5,
        "e_score_correction_bias": torch.linspace(0, 1, EXPERTS),
        "bias_vl": None,
        "image_sentinel_lo": 0,
    }
    return SimpleNamespace(**stock | changes)


def router(table=None, route=reference.router_topk, **changes):
    from vllm_dsv4_moe.router import Dsv4Router

    stock = vllm_router(**changes)
    return Dsv4Router(stock, table, route, num_experts=EXPERTS, hash_weights="scored")


def table() -> torch.Tensor:
    order = torch.rand(VOCAB, EXPERTS, generator=torch.Generator().manual_seed(0)).argsort(1)
    return order[:, :TOP_K].int().contiguous()


def logits(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, EXPERTS, generator=torch.Generator().manual_seed(1))


def select(chosen, num_tokens, input_ids=None, dtype=None, padding=None):
    x = torch.zeros(num_tokens, 4)
    with mock.patch("vllm_dsv4_moe.router.padding_mask", return_value=padding):
        return chosen.select_experts(x, logits(num_tokens), dtype, input_ids=input_ids)


@pytest.mark.parametrize("dtype", [None, torch.int32, torch.int64], ids=str)
def test_dense_layers_route_by_score_and_bias(dtype):
    weights, ids = select(router(), 5, dtype=dtype)
    expected = reference.router_topk(
        logits(5), TOP_K, bias=torch.linspace(0, 1, EXPERTS), scaling=1.5
    )
    assert torch.equal(weights, expected.weights) and torch.equal(ids, expected.ids.to(ids.dtype))
    assert ids.dtype == (dtype or torch.int32)


def test_hash_layers_route_by_token_id_and_not_by_bias():
    token_ids = torch.tensor([3, 0, 19, 3])
    weights, ids = select(router(table()), 4, token_ids)
    assert torch.equal(ids, table()[token_ids])
    torch.testing.assert_close(weights.sum(1), torch.full((4,), 1.5))


@pytest.mark.parametrize("given, words", [(None, "none ids"), (torch.arange(3), "3 ids")])
def test_hash_layers_without_an_id_for_each_token_say_so(given, words):
    with pytest.raises(ValueError, match=f"got 4 tokens and {words}: it needs one a token"):
        select(router(table()), 4, given)


@pytest.mark.parametrize("hashed", [False, True], ids=["dense", "hash"])
def test_padding_rows_get_no_expert(hashed):
    padding = torch.tensor([False, False, True, True])
    ids = select(router(table() if hashed else None), 4, torch.arange(4), padding=padding)[1]
    assert (ids[2:] == -1).all() and (ids[:2] >= 0).all()


def test_an_image_bias_that_the_model_attaches_later_is_used():
    route = mock.Mock(return_value=(torch.zeros(2, TOP_K), torch.zeros(2, TOP_K, dtype=torch.int)))
    late = router(route=route)
    select(late, 2)
    assert route.call_args.kwargs["image_bias"] is None
    late.bias_vl, late.image_sentinel_lo = torch.ones(EXPERTS), 7
    select(late, 2, torch.tensor([7, 1]))
    assert route.call_args.kwargs["image_bias"] == ImageBias(late.bias_vl, 7)
    with pytest.raises(ValueError, match="routes by token id"):
        select(late, 2)


def test_what_is_recorded_are_logical_ids():
    """vLLM's capture of routed experts sees the ids before EPLB's copies replace them."""
    chosen, seen = router(table()), []
    chosen.set_capture_fn(seen.append)
    select(chosen, 2, torch.tensor([4, 5]))
    assert torch.equal(seen[0], table()[[4, 5]])


def test_a_bias_for_image_tokens_that_was_not_loaded_is_refused():
    from vllm_dsv4_moe.runner import _mark_as_not_loaded

    chosen = router(table(), bias_vl=torch.zeros(EXPERTS), image_sentinel_lo=7)
    chosen.check_loaded("layers.0.ffn.gate")
    loaded = chosen.table.clone()
    _mark_as_not_loaded(chosen)
    chosen.table.copy_(loaded)
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.gate\.bias_vl is missing"):
        chosen.check_loaded("layers.0.ffn.gate")


WHY_NOT = {
    "softmax": ({"scoring_func": "softmax"}, "sqrt"),
    "not renormalised": ({"renormalize": False}, "renormalised"),
    "a shared expert among them": ({"num_fused_shared_experts": 1}, "fused"),
}


@pytest.mark.parametrize("changes, says", WHY_NOT.values(), ids=WHY_NOT)
def test_routers_of_another_kind_stay_vllms(changes, says):
    from vllm_dsv4_moe.router import unsupported_reason

    assert says in unsupported_reason(vllm_router(**changes))
    assert unsupported_reason(vllm_router()) is None
