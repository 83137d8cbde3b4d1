"""Gate and router in one launch, for small batches: hidden states -> expert ids and weights.

    logits = x · Wgᵀ          bf16 products, fp32 sums, never rounded to bf16
    ids, weights              as router_topk makes them from the logits

The first programs of the grid are workers: each multiplies the tokens with EXPERTS rows of the gate
over K_SPLIT columns, writes the partial sums to scratch and counts itself as arrived. The last
programs route one token each: they wait until every worker has arrived, add the partial sums up in
the order of the splits, and select. Workers wait for nobody and come first in the grid, so they
always finish; the sum's order does not depend on who arrives when. The last router to have waited
sets the counters back, so a graph can replay the launch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import supports_pdl, wait_for_inputs
from dsv4_kernels.route.routing import (
    SLICED,
    check_routing,
    empty_routing,
    load_bias,
    router_scores,
    select_experts,
    selection_keys,
    shares,
    specialisation,
)
from dsv4_kernels.types import ImageBias, Routing

MAX_TOKENS = 64


class Config(NamedTuple):
    tokens: int  # rows of the product, 16 at least for the tensor cores
    experts: int  # per worker
    k_split: int  # columns per worker
    num_warps: int


class GateScratch(NamedTuple):
    """What the programs of one launch share. Launches that may overlap need one each."""

    partials: torch.Tensor  # (at least num_splits * num_tokens * num_experts,) float32
    counters: torch.Tensor  # (2,) int32, workers and routers that arrived: zero between launches


def choose_config(num_tokens: int) -> Config:
    """Up to 16 tokens, workers of one warp, so that a router's reductions stay inside a warp."""
    if num_tokens <= 16:
        return Config(tokens=16, experts=16, k_split=512, num_warps=1)
    return Config(triton.next_power_of_2(num_tokens), experts=32, k_split=512, num_warps=4)


def make_scratch(hidden: int, num_experts: int, device: torch.device) -> GateScratch:
    """Scratch for any batch of at most MAX_TOKENS."""
    sizes = [
        triton.cdiv(hidden, choose_config(num_tokens).k_split) * num_tokens * num_experts
        for num_tokens in range(1, MAX_TOKENS + 1)
    ]
    return GateScratch(
        torch.empty(max(sizes), dtype=torch.float32, device=device),
        torch.zeros(2, dtype=torch.int32, device=device),
    )


@triton.jit
def _sum_partials(row_ptr, stride, experts, mask, SPLITS: tl.constexpr):
    """Logits of one token at `experts`: its partial sums in the order of the splits."""
    logits = tl.zeros(experts.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        logits += tl.load(row_ptr + split * stride + experts, mask=mask, other=0.0)
    return logits


@triton.jit
def _multiply(
    x_ptr,
    gate_ptr,
    partials_ptr,
    worker,
    num_tokens,
    HIDDEN: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    K_SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    """A worker's partial sums. The gate's rows are weights: they are read before the wait."""
    split = worker % SPLITS
    tokens = tl.arange(0, TOKENS)[:, None]
    columns = split * K_SPLIT + tl.arange(0, K_SPLIT)[None, :]
    experts = worker // SPLITS * EXPERTS + tl.arange(0, EXPERTS)
    in_gate = (experts[:, None] < NUM_EXPERTS) & (columns < HIDDEN)
    gate = tl.load(gate_ptr + experts[:, None] * HIDDEN + columns, mask=in_gate, other=0.0)
    wait_for_inputs(launch_pdl)
    in_batch = (tokens < num_tokens) & (columns < HIDDEN)
    x = tl.load(x_ptr + tokens * HIDDEN + columns, mask=in_batch, other=0.0)
    if INTERPRETED:
        x, gate = x.to(tl.float32), gate.to(tl.float32)
    sums = tl.dot(x, tl.trans(gate))
    place = (split * num_tokens + tokens) * NUM_EXPERTS + experts[None, :]
    in_range = (tokens < num_tokens) & (experts[None, :] < NUM_EXPERTS)
    tl.store(partials_ptr + place, sums, mask=in_range)


@triton.jit(
    do_not_specialize=["num_tokens", "vocab", "first_image_id"],
    do_not_specialize_on_alignment=SLICED,
)
def _gate_route_kernel(
    x_ptr,
    gate_ptr,
    bias_ptr,
    table_ptr,
    token_ids_ptr,
    image_bias_ptr,
    padding_ptr,
    partials_ptr,  # (SPLITS, num_tokens, NUM_EXPERTS)
    counters_ptr,
    weights_ptr,
    ids_ptr,
    num_tokens,
    vocab,
    first_image_id,
    scaling,
    HIDDEN: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    K_SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_IMAGE_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    NUM_IMAGE_IDS: tl.constexpr,
    UNIFORM: tl.constexpr,
    INTERPRETED: tl.constexpr,  # Triton's interpreter multiplies the bits of bf16
    launch_pdl: tl.constexpr,
):
    num_workers = SPLITS * ((NUM_EXPERTS + EXPERTS - 1) // EXPERTS)
    program = tl.program_id(0)
    if program < num_workers:
        _multiply(
            x_ptr, gate_ptr, partials_ptr, program, num_tokens,
            HIDDEN, NUM_EXPERTS, TOKENS, EXPERTS, K_SPLIT, SPLITS, INTERPRETED, launch_pdl,
        )  # fmt: skip
        tl.debug_barrier()
        tl.atomic_add(counters_ptr, 1, sem="release", scope="gpu")
    else:
        token = program - num_workers
        slots = tl.arange(0, K_BLOCK)[None, :]
        if HAS_BIAS:
            bias = load_bias(bias_ptr, NUM_EXPERTS, WIDTH, CHUNKS)
        if HAS_IMAGE_BIAS:
            image_bias = load_bias(image_bias_ptr, NUM_EXPERTS, WIDTH, CHUNKS)
        wait_for_inputs(launch_pdl)

        # Phase 1: what the token's id says.
        ids = tl.full([1, K_BLOCK], -1, tl.int32)
        is_image = False
        if HAS_TABLE or HAS_IMAGE_BIAS:
            token_id = tl.load(token_ids_ptr + token).to(tl.int64)
        if HAS_TABLE:
            limit = tl.where((token_id >= 0) & (token_id < vocab), TOP_K, 0)
            hashed = tl.load(table_ptr + token_id * TOP_K + slots, mask=slots < limit, other=-1)
            ids = tl.where((hashed >= 0) & (hashed < NUM_EXPERTS), hashed, -1).to(tl.int32)
        if HAS_IMAGE_BIAS:
            is_image = (token_id >= first_image_id) & (token_id < first_image_id + NUM_IMAGE_IDS)

        # Phase 2: wait for every worker. The last router to see them all resets the counters.
        arrived = tl.atomic_add(counters_ptr, 0, sem="acquire", scope="gpu")
        while arrived < num_workers:
            arrived = tl.atomic_add(counters_ptr, 0, sem="acquire", scope="gpu")
        seen = num_tokens - 1
        if num_tokens > 1:
            seen = tl.atomic_add(counters_ptr + 1, 1, sem="relaxed", scope="gpu")
        if seen == num_tokens - 1:
            tl.store(counters_ptr, 0)
            tl.store(counters_ptr + 1, 0)

        # Phase 3: select and weigh.
        row_ptr = partials_ptr + token * NUM_EXPERTS
        stride = num_tokens * NUM_EXPERTS
        if HAS_IMAGE_BIAS or not HAS_TABLE:
            if is_image or not HAS_TABLE:
                keys = ()
                for chunk in tl.static_range(CHUNKS):
                    experts = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
                    in_range = experts < NUM_EXPERTS
                    logits = _sum_partials(row_ptr, stride, experts, in_range, SPLITS)
                    scores = router_scores(logits)
                    selection = scores
                    if HAS_BIAS:
                        selection = scores + bias[chunk]
                    if HAS_IMAGE_BIAS:
                        selection = tl.where(is_image, scores + image_bias[chunk], selection)
                    keys = keys + (selection_keys(logits, selection, in_range),)
                ids = select_experts(keys, TOP_K, K_BLOCK, 1, WIDTH, CHUNKS)
        if HAS_PADDING:
            ids = tl.where(tl.load(padding_ptr + token) != 0, -1, ids)
        live = ids >= 0
        selected = router_scores(_sum_partials(row_ptr, stride, ids, live, SPLITS))
        if UNIFORM:
            selected = tl.where(live & is_image, selected, 0.0)
        out = token * TOP_K + slots
        tl.store(weights_ptr + out, shares(selected, live, scaling), mask=slots < TOP_K)
        tl.store(ids_ptr + out, ids, mask=slots < TOP_K)


def gate_route(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    top_k: int,
    *,
    bias: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    image_bias: ImageBias | None = None,
    padding: torch.Tensor | None = None,
    scaling: float = 1.0,
    hash_weights: str = "scored",
    ids_dtype: torch.dtype = torch.int32,
    out: Routing | None = None,
    scratch: GateScratch | None = None,
) -> Routing:
    """`reference.router_topk` of hidden_states @ gate_weight.T, in one launch.

    hidden_states (num_tokens <= 64, hidden) bf16; gate_weight (num_experts, hidden) bf16; the rest
    as router_topk has it. scratch is `make_scratch`'s, made here if None. Ids equal the oracle's
    where selections differ by more than the rounding of the sums.
    """
    num_tokens, hidden = hidden_states.shape
    num_experts = len(gate_weight)
    device = hidden_states.device
    if out is None:
        out = empty_routing(num_tokens, top_k, ids_dtype, device)
    check_routing(
        *(num_tokens, num_experts, top_k, bias, table, token_ids, image_bias, padding),
        *(hash_weights, out),
    )
    assert num_tokens <= MAX_TOKENS, f"{num_tokens} tokens, at most {MAX_TOKENS}"
    assert gate_weight.shape == (num_experts, hidden), gate_weight.shape
    assert hidden_states.dtype == gate_weight.dtype == torch.bfloat16, gate_weight.dtype
    assert hidden_states.is_contiguous() and gate_weight.is_contiguous()
    if num_tokens == 0:
        return out
    config = choose_config(num_tokens)
    splits = triton.cdiv(hidden, config.k_split)
    if scratch is None:
        scratch = make_scratch(hidden, num_experts, device)
    needed = splits * num_tokens * num_experts
    assert scratch.partials.numel() >= needed, (scratch.partials.numel(), needed)
    workers = splits * triton.cdiv(num_experts, config.experts)
    _gate_route_kernel[(workers + num_tokens,)](
        hidden_states,
        gate_weight,
        bias,
        table,
        token_ids,
        image_bias.bias if image_bias else None,
        padding,
        *scratch,
        *out,
        num_tokens,
        len(table) if table is not None else 0,
        image_bias.first_token_id if image_bias else 0,
        scaling,
        HIDDEN=hidden,
        **specialisation(num_experts, top_k, bias, table, image_bias, padding, hash_weights),
        TOKENS=config.tokens,
        EXPERTS=config.experts,
        K_SPLIT=config.k_split,
        SPLITS=splits,
        INTERPRETED=device.type == "cpu",
        launch_pdl=supports_pdl(hidden_states),
        num_warps=config.num_warps,
    )
    return out
