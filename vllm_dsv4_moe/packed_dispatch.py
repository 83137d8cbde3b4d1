"""vLLM's all-gather of tokens between ranks, with each rank's tokens quantised before it."""

import torch
from dsv4_kernels.packed_tokens import pack_tokens, packs, row_bytes
from dsv4_kernels.types import MoeLayer
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEPrepareAndFinalize
from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import (
    MoEPrepareAndFinalizeNaiveDPEPModular,
)

logger = init_logger("vllm.dsv4_moe")

# Of all ranks. Fewer travel as they are: one token of each of two H200s is 5 us later if packed, 32
# of each are 2 us sooner (bench.expert_parallel).
FEWEST_TOKENS = 64


class PackedDispatch(MoEPrepareAndFinalizeNaiveDPEPModular):
    """Each rank packs its own tokens, and the experts class gets the packed tokens of all ranks.
    Where all ranks together have fewer than FEWEST_TOKENS, tokens stay in bf16.

    vLLM gathers rows of any dtype where experts ask it not to quantise, as ours do. Its own
    quantiser has no scale per token and gives other bits.
    """

    def __init__(self, plain: MoEPrepareAndFinalizeNaiveDPEPModular, layer: MoeLayer) -> None:
        super().__init__(plain.is_sequence_parallel, plain.num_dispatchers())
        self.layer = layer

    def prepare(self, a1: torch.Tensor, topk_weights, topk_ids: torch.Tensor, *args, **kwargs):
        if tokens_of_all_ranks(len(a1), self.num_dispatchers()) >= FEWEST_TOKENS:
            a1 = pack_tokens(a1, topk_ids, self.layer)
        return super().prepare(a1, topk_weights, topk_ids, *args, **kwargs)


def tokens_of_all_ranks(own: int, num_ranks: int) -> int:
    """The same sum on every rank: vLLM's forward context has each data-parallel rank's number."""
    metadata = get_forward_context().dp_metadata if is_forward_context_available() else None
    sizes = metadata.get_chunk_sizes_across_dp_rank() if metadata is not None else None
    return own * num_ranks if sizes is None else sum(sizes)


def packed_where_gathered(
    prepare_finalize: FusedMoEPrepareAndFinalize, layer: MoeLayer
) -> FusedMoEPrepareAndFinalize:
    """prepare_finalize, or PackedDispatch in its place where tokens are gathered and quantised."""
    is_gather = type(prepare_finalize) is MoEPrepareAndFinalizeNaiveDPEPModular
    if not (is_gather and packs(layer.shape)):
        return prepare_finalize
    logger.info_once(
        "dsv4-moe: tokens are quantised before they travel between ranks: %d bytes each, for %d; "
        "fewer than %d in all travel as they are",
        row_bytes(layer),
        2 * layer.shape.hidden,
        FEWEST_TOKENS,
    )
    return PackedDispatch(prepare_finalize, layer)
