"""Router: logits and bias, or a table of expert ids by token id -> expert ids and weights.

    score = sqrt(softplus(logits))                        fp32, exact far below zero
    dense: ids = top_k(score + bias)                      bias selects only; ties to the lower id
    hash:  ids = table[token_id]
    image tokens: ids = top_k(score + image bias)         on dense and hash layers
    weights = score[ids] / sum(score[ids]) * scaling      over the slots that have an expert

(DeepSeek-V4 report, section 2.1.) A warp routes one or more tokens: it holds their scores in
registers and takes the largest top_k times; the selected logits are read again, for the weights,
so that hash layers read no others. Ids equal the reference's, weights are within a few ulp, down to
logits of -174. Below, scores are subnormal, which a GPU's exp2 makes 0: they tie, where the
reference tells them apart down to -206, and a token with no other scores weighs its slots equally.
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


class Config(NamedTuple):
    tokens: int  # per program
    num_warps: int


def choose_config(num_tokens: int, num_experts: int, selects: bool) -> Config:
    """One token per warp until the GPU is full of them; selects is False for hash alone.

    On an H200, 8192 tokens of 256 and 384 experts: 1 token per warp 10.5 and 11.3 us, 2 tokens 8.9
    and 11.8, 4 tokens 9.8 and 10.7, four warps of 1 token 8.4 and 10.9; 2048 tokens: 1 token 4.3
    and 3.9, 2 tokens 3.6 and 5.0, four warps 3.3 and 4.0. Hash 4 tokens 2.9, 16 tokens 1.8.
    """
    if not selects:
        return Config(tokens=4 if num_tokens <= 1024 else 16, num_warps=1)
    if num_experts <= 256:
        return Config(tokens=1, num_warps=1) if num_tokens <= 1024 else Config(4, num_warps=4)
    return Config(tokens=1 if num_tokens <= 4096 else 4, num_warps=1)


@triton.jit(
    do_not_specialize=["num_tokens", "vocab", "first_image_id"],
    do_not_specialize_on_alignment=SLICED,
)
def _router_kernel(
    logits_ptr,
    bias_ptr,
    table_ptr,
    token_ids_ptr,
    image_bias_ptr,
    padding_ptr,
    weights_ptr,
    ids_ptr,
    num_tokens,
    vocab,
    first_image_id,
    scaling,
    NUM_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_IMAGE_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    NUM_IMAGE_IDS: tl.constexpr,
    UNIFORM: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    in_batch = tokens < num_tokens
    rows = tokens.to(tl.int64) * NUM_EXPERTS
    slots = tl.arange(0, K_BLOCK)[None, :]
    if HAS_BIAS:
        bias = load_bias(bias_ptr, NUM_EXPERTS, WIDTH, CHUNKS)
    if HAS_IMAGE_BIAS:
        image_bias = load_bias(image_bias_ptr, NUM_EXPERTS, WIDTH, CHUNKS)
    wait_for_inputs(launch_pdl)

    # Phase 1: ids by the table.
    ids = tl.full([TOKENS, K_BLOCK], -1, tl.int32)
    is_image = tl.zeros([TOKENS, 1], tl.int1)
    if HAS_TABLE or HAS_IMAGE_BIAS:
        token_ids = tl.load(token_ids_ptr + tokens, mask=in_batch, other=-1).to(tl.int64)
    if HAS_TABLE:
        known = (token_ids >= 0) & (token_ids < vocab) & (slots < TOP_K)
        hashed = tl.load(table_ptr + token_ids * TOP_K + slots, mask=known, other=-1)
        ids = tl.where((hashed >= 0) & (hashed < NUM_EXPERTS), hashed, -1).to(tl.int32)
    if HAS_IMAGE_BIAS:
        is_image = (token_ids >= first_image_id) & (token_ids < first_image_id + NUM_IMAGE_IDS)

    # Phase 2: ids by the scores, on dense layers and for image tokens.
    selects = True
    if HAS_TABLE:
        selects = tl.max(tl.max(is_image.to(tl.int32), axis=1), axis=0) > 0
    if HAS_IMAGE_BIAS or not HAS_TABLE:
        if selects:
            keys = ()
            for chunk in tl.static_range(CHUNKS):
                experts = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
                in_range = experts < NUM_EXPERTS
                logits = tl.load(logits_ptr + rows + experts, mask=in_batch & in_range, other=0.0)
                logits = logits.to(tl.float32)
                scores = router_scores(logits)
                selection = scores
                if HAS_BIAS:
                    selection = scores + bias[chunk]
                if HAS_IMAGE_BIAS:
                    selection = tl.where(is_image, scores + image_bias[chunk], selection)
                keys = keys + (selection_keys(logits, selection, in_range),)
            top = select_experts(keys, TOP_K, K_BLOCK, TOKENS, WIDTH, CHUNKS)
            if HAS_TABLE:
                ids = tl.where(is_image, top, ids)
            else:
                ids = top

    # Phase 3: weights of the selected.
    if HAS_PADDING:
        padding = tl.load(padding_ptr + tokens, mask=in_batch, other=0)
        ids = tl.where(padding != 0, -1, ids)
    live = (ids >= 0) & in_batch
    if UNIFORM and not HAS_IMAGE_BIAS:
        selected_scores = tl.zeros([TOKENS, K_BLOCK], tl.float32)
    else:
        selected = tl.load(logits_ptr + rows + ids, mask=live, other=0.0)
        selected_scores = router_scores(selected.to(tl.float32))
        if UNIFORM:
            selected_scores = tl.where(is_image, selected_scores, 0.0)
    in_row = in_batch & (slots < TOP_K)
    out = tokens.to(tl.int64) * TOP_K + slots
    tl.store(weights_ptr + out, shares(selected_scores, live, scaling), mask=in_row)
    tl.store(ids_ptr + out, ids, mask=in_row)


def router_topk(
    logits: torch.Tensor,
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
) -> Routing:
    """Expert ids and weights of every token: what `reference.router_topk` says, on the GPU.

    logits (num_tokens, num_experts <= 512) float, contiguous; top_k <= 16; bias (num_experts,)
    float; table (vocab, top_k) int32 or int64 with token_ids (num_tokens,) int32 or int64; padding
    (num_tokens,) bool; out (num_tokens, top_k) float32 weights and int32 or int64 ids, made here
    if None.
    """
    num_tokens, num_experts = logits.shape
    if out is None:
        out = empty_routing(num_tokens, top_k, ids_dtype, logits.device)
    check_routing(
        *(num_tokens, num_experts, top_k, bias, table, token_ids, image_bias, padding),
        *(hash_weights, out),
    )
    assert logits.is_contiguous(), logits.stride()
    if num_tokens == 0:
        return out
    selects = table is None or image_bias is not None
    config = choose_config(num_tokens, num_experts, selects)
    _router_kernel[(triton.cdiv(num_tokens, config.tokens),)](
        logits,
        bias,
        table,
        token_ids,
        image_bias.bias if image_bias else None,
        padding,
        out.weights,
        out.ids,
        num_tokens,
        len(table) if table is not None else 0,
        image_bias.first_token_id if image_bias else 0,
        scaling,
        **specialisation(num_experts, top_k, bias, table, image_bias, padding, hash_weights),
        TOKENS=config.tokens,
        launch_pdl=supports_pdl(logits),
        num_warps=config.num_warps,
    )
    return out
