"""Loading reaches every compiled variant of the Triton kernels, so that no request compiles one."""

import dataclasses
from unittest import mock

import pytest
import torch
from dsv4_kernels.backends import SM90, SM100
from dsv4_kernels.packed_tokens import pack_tokens, unpack_tokens
from dsv4_kernels.route import gate_route, router_topk
from dsv4_kernels.rows import (
    combine,
    expert_layout,
    fp8_quantize,
    nvfp4_quantize,
    place_codes,
    place_rows,
)
from dsv4_kernels.sm90.heuristic import places_rows
from dsv4_kernels.types import (
    ActivationScales,
    ExpertLayout,
    ExpertWeights,
    Fp8Rows,
    MoeLayer,
    MoeShape,
)

from vllm_dsv4_moe.warm_up import WarmUp, launch_router, layer_token_counts, token_counts

MOST = 3000
OPS = {
    "expert_layout": (expert_layout, ("_count_kernel", "_layout_kernel")),
    "combine": (combine, ("_combine_kernel",)),
    "place_rows": (place_rows, ("_place_kernel",)),
    "place_codes": (place_codes, ("_place_codes_kernel",)),
    "fp8_quantize": (fp8_quantize, ("_quantize_kernel",)),
    "nvfp4_quantize": (nvfp4_quantize, ("_quantize_kernel", "_swizzle_kernel")),
    "router_topk": (router_topk, ("_router_kernel",)),
    "gate_route": (gate_route, ("_gate_route_kernel",)),
}


class Recorder:
    """Stands where a kernel is, and keeps what Triton would compile it for."""

    def __init__(self, kernel, variants: set) -> None:
        self.name, self.variants = kernel.fn.__name__, variants
        self.parameters = kernel.arg_names
        given = getattr(kernel, "kwargs", None) or vars(kernel)  # interpreted, or compiled
        self.any_alignment = given["do_not_specialize_on_alignment"] or ()

    def __getitem__(self, grid):
        return lambda *args, **options: self.variants.add(
            (
                self.name,
                tuple(map(self.kind, self.parameters, args)),
                tuple(sorted(options.items())),
            )
        )

    def kind(self, parameter: str, value) -> str:
        if not isinstance(value, torch.Tensor):
            return str(type(value))
        if parameter in self.any_alignment:
            return str(value.dtype)
        # Every tensor's storage starts at a multiple of 16.
        return f"{value.dtype} {value.storage_offset() * value.element_size() % 16 == 0}"


@pytest.fixture
def variants(monkeypatch) -> set:
    seen: set = set()
    for module, names in OPS.values():
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), seen))
    return seen


def call_ops(num_tokens: int, top_k: int, num_local: int, tile: int) -> None:
    """Each op at that size, on tensors that hold nothing: a recorder does not look."""
    hidden, experts = 64, min(512, 4 * num_local)
    ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device="meta")
    x = torch.empty((num_tokens, hidden), dtype=torch.bfloat16, device="meta")
    expert_map = torch.empty(experts, dtype=torch.int32, device="meta")
    layout = expert_layout.expert_layout(ids, num_local, expert_map, tile)
    rows = torch.empty((len(layout.row_to_slot), hidden), dtype=torch.bfloat16, device="meta")
    combine.combine(rows, layout.slot_to_row, out=x)
    place_rows.place_rows(x, layout.slot_to_row, out=rows)
    for scale in (torch.empty(1, device="meta"), None):
        placed = nvfp4_quantize.nvfp4_quantize(x, scale, layout, swizzled=True)
        shape = MoeShape(experts, num_local, top_k, hidden, 32, MOST, True)
        scales = ActivationScales(scale, None)
        layer = MoeLayer(SM100, shape, None, 10.0, scales, ids[0, :1].long(), None)
        tokens = unpack_tokens(pack_tokens(x, ids, layer), layer)
        place_codes.place_codes(tokens, layout.slot_to_row, out=placed)
    nvfp4_quantize.nvfp4_quantize(rows, None, live=layout.row_to_slot, swizzled=True)
    fp8_rows = Fp8Rows(rows.to(torch.float8_e4m3fn), rows[:, 0].float())
    fp8_quantize.fp8_quantize(x, layout.slot_to_row, out=fp8_rows)
    shape = shape._replace(quantize_activations=False, fp8=True)
    layer = MoeLayer(SM90, shape, None, 10.0, None, ids[0, :1].long(), None)
    tokens = unpack_tokens(pack_tokens(x, ids, layer), layer)
    place_rows.place_rows(tokens, layout.slot_to_row, out=fp8_rows)
    logits = torch.empty((num_tokens, experts), device="meta")
    router_topk.router_topk(logits, top_k, bias=logits[0])
    table = torch.empty((512, top_k), dtype=torch.int32, device="meta")
    token_ids = ids[:, 0].contiguous()
    router_topk.router_topk(logits, top_k, table=table, token_ids=token_ids)
    if num_tokens <= gate_route.MAX_TOKENS:
        weight = torch.empty((experts, hidden), dtype=torch.bfloat16, device="meta")
        gate_route.gate_route(x, weight, top_k, bias=logits[0])
        gate_route.gate_route(x, weight, top_k, table=table, token_ids=token_ids)


@pytest.mark.parametrize("top_k", [1, 6, 8])
@pytest.mark.parametrize("num_local", [32, 48, 256])
def test_powers_of_two_reach_every_variant(variants, top_k, num_local):
    for num_tokens in token_counts(MOST):
        call_ops(num_tokens, top_k, num_local, tile=8)
    reached = set(variants)
    assert len({name for name, *_ in reached}) == 9
    for num_tokens in range(1, MOST + 1, 13):
        call_ops(num_tokens, top_k, num_local, tile=8)
    assert variants == reached


@pytest.mark.parametrize("route", ["router_topk", "gate_route"])
def test_a_micro_batch_may_start_at_any_token(variants, route):
    tokens = torch.empty((64, 32), dtype=torch.bfloat16, device="meta")
    table = torch.empty((512, 6), dtype=torch.int32, device="meta")
    token_ids = torch.empty(64, dtype=torch.int32, device="meta")
    padding = torch.empty(64, dtype=torch.bool, device="meta")
    for start in (0, 3, 16):
        given = {"token_ids": token_ids[start:], "padding": padding[start:], "table": table}
        if route == "router_topk":
            router_topk.router_topk(tokens[start:], 6, **given)
        else:
            gate_route.gate_route(tokens[start:], tokens, 6, **given)
    assert len(variants) == 1


class Gate:
    weight = torch.empty((32, 64), dtype=torch.bfloat16)

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= 16


@pytest.mark.parametrize("num_tokens, op", [(16, "gate_and_select"), (17, "select")])
def test_the_router_is_launched_as_a_batch_of_that_size_is(num_tokens, op):
    router = mock.Mock(gate=Gate(), uses_token_ids=False, num_experts=32)
    launch_router(router, num_tokens, torch.int32, torch.device("cpu"))
    calls = [call for call in router.mock_calls if call[0] in ("gate_and_select", "select")]
    assert [(name, len(args[0]), args[-2] is None) for name, args, _ in calls] == [
        (op, num_tokens, True),
        (op, num_tokens, False),
    ]


def test_token_counts_are_powers_of_two_and_the_most():
    assert token_counts(1) == [1]
    assert token_counts(96) == [1, 2, 4, 8, 16, 32, 64, 96]


def layer_of(
    backend, quantize: bool, batch_rows: int = 0, fp8: bool = False, placed_from: int = 100
) -> tuple[MoeLayer, list]:
    """A layer whose GEMMs only say at how many tokens they were called."""
    shape = MoeShape(16, 8, 2, 64, 32, 40, quantize, batch_rows=batch_rows, fp8=fp8)
    calls: list = []

    def gemm(x, *args, out, num_tokens=None, **_):
        layout = next(a for a in args if isinstance(a, ExpertLayout))
        calls.append(num_tokens or len(layout.slot_to_row))

    weights = ExpertWeights(*(torch.zeros(8, 64, 32) for _ in range(6)))
    scales = ActivationScales(torch.ones(1), torch.ones(8)) if quantize else None
    backend = dataclasses.replace(
        backend,
        fc1=gemm,
        fc2=gemm,
        places_rows=lambda shape, num_tokens: num_tokens >= placed_from,
        tile=lambda shape, num_tokens: 8,
    )
    return MoeLayer(backend, shape, weights, 10.0, scales, torch.zeros(1), torch.zeros(1)), calls


@pytest.mark.parametrize("batch_rows", [0, 24])
@pytest.mark.parametrize("backend, quantize", [(SM90, False), (SM100, True)], ids=["sm90", "sm100"])
def test_layers_of_one_shape_are_run_once_at_each_size(
    monkeypatch, backend, quantize, batch_rows, variants
):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    layer, calls = layer_of(backend, quantize, batch_rows)
    expert_map = torch.zeros(16, dtype=torch.int32)
    warm_up = WarmUp()
    for _ in range(3):
        warm_up(layer, None, expert_map, torch.int32)
    assert calls == [count for count in (1, 2, 4, 8, 16, 32, 40) for _ in ("fc1", "fc2")]
    warm_up(layer, None, expert_map, torch.int64)
    assert len(calls) == 28


@pytest.mark.parametrize(
    "backend, placed_by",
    [(SM100, "_place_codes_kernel"), (SM90, "_place_kernel")],
    ids=["w4a4", "w4a8"],
)
def test_where_tokens_are_packed_so_are_the_warm_ups(monkeypatch, variants, backend, placed_by):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    fp8 = backend is SM90
    layer, calls = layer_of(backend, quantize=not fp8, fp8=fp8, placed_from=1)
    expert_map, warm_up = torch.zeros(16, dtype=torch.int32), WarmUp()
    warm_up(layer, None, expert_map, torch.int32)
    launched = set(variants)
    assert placed_by not in {name for name, *_ in launched}
    variants.clear()
    warm_up(layer, None, expert_map, torch.int32, packs=True)
    assert len(calls) == 14 + 28
    # Few tokens travel as they are.
    assert launched < set(variants) and placed_by in {name for name, *_ in variants}


def test_rows_are_placed_and_gathered(monkeypatch, variants):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    layer, calls = layer_of(SM90, quantize=False, placed_from=37)
    WarmUp()(layer, None, torch.zeros(16, dtype=torch.int32), torch.int32)
    assert calls[::2] == [1, 2, 4, 8, 16, 32, 37, 40]
    assert "_place_kernel" in {name for name, *_ in variants}


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    "sizes",
    [
        (256, 64, 6, 4096, 2048),
        (384, 24, 6, 7168, 3072),
        (384, 48, 6, 5120, 2304),
        (8, 8, 8, 1024, 512),
    ],
    ids=["flash", "pro", "flash-4.1", "tiny"],
)
def test_rows_are_placed_as_while_serving(sizes, fp8):
    """By the tiles of released models, which place the rows of several ranges of counts."""
    shape = MoeShape(*sizes, 16384, False, weight_format="mxfp4", fp8=fp8)
    layer = mock.Mock(backend=SM90, shape=shape)

    def way(num_tokens: int):
        columns = shape.hidden // 2 if fp8 else shape.hidden
        return places_rows(shape, num_tokens) and place_rows.choose_config(columns, num_tokens)

    served = {way(num_tokens) for num_tokens in range(1, shape.max_num_tokens + 1)}
    assert {way(num_tokens) for num_tokens in layer_token_counts(layer)} == served
    assert len(served) > 1


def test_layers_whose_routers_launch_other_kernels_are_run_each(monkeypatch, variants):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    layer, _ = layer_of(SM90, quantize=False)
    expert_map = torch.zeros(16, dtype=torch.int32)
    warm_up = WarmUp()
    dense = {"table": None, "uses_token_ids": False, "gate": None, "num_experts": 16}
    for changes in ({}, {"uses_token_ids": True}, {"gate": Gate()}):
        first, second = (mock.Mock(**dense | changes) for _ in range(2))
        warm_up(layer, first, expert_map, torch.int32)
        warm_up(layer, second, expert_map, torch.int32)
        assert first.select.called and not second.select.called, changes
