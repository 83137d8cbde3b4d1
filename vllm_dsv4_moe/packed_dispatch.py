"""vLLM's all-gather of tokens between ranks, of tokens quantised before it."""

import torch
from dsv4_kernels.packed_tokens import pack_tokens, packs, row_bytes
from dsv4_kernels.types import MoeLayer
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEPrepareAndFinalize
from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import (
    MoEPrepareAndFinalizeNaiveDPEPModular,
)

logger = init_logger("vllm.dsv4_moe")


class PackedDispatch(MoEPrepareAndFinalizeNaiveDPEPModular):
    """Each rank packs its own tokens; the experts class gets the packed tokens of all ranks.

    vLLM gathers rows of any dtype where experts ask it not to quantise, as ours do. Its own
    quantiser takes no scale a token and gives other bits.
    """

    def __init__(self, plain: MoEPrepareAndFinalizeNaiveDPEPModular, layer: MoeLayer) -> None:
        super().__init__(plain.is_sequence_parallel, plain.num_dispatchers())
        self.layer = layer

    def prepare(self, a1: torch.Tensor, topk_weights, topk_ids: torch.Tensor, *args, **kwargs):
        packed = pack_tokens(a1, topk_ids, self.layer)
        return super().prepare(packed, topk_weights, topk_ids, *args, **kwargs)


def packed_where_gathered(
    prepare_finalize: FusedMoEPrepareAndFinalize, layer: MoeLayer
) -> FusedMoEPrepareAndFinalize:
    """prepare_finalize, or PackedDispatch in its place where tokens are gathered and quantised."""
    is_gather = type(prepare_finalize) is MoEPrepareAndFinalizeNaiveDPEPModular
    if not (is_gather and packs(layer.shape)):
        return prepare_finalize
    logger.info_once(
        "dsv4-moe: tokens are quantised before they travel between ranks: %d bytes each, for %d",
        row_bytes(layer), 2 * layer.shape.hidden,
    )  # fmt: skip
    return PackedDispatch(prepare_finalize, layer)
