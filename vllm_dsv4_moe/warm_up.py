"""At load, launch once every kernel that serving can launch, so that no request compiles one.

Which variant Triton compiles depends on the number of tokens, through thresholds in the ops'
choose_config. No two are closer together than a factor of two, so the powers of two reach every
variant, but for whether rows are placed, which the GEMMs' tiles decide. The tokens go to no expert:
the GEMMs, which prepare_layer has compiled, do nothing.
"""

from typing import TYPE_CHECKING

import torch
from dsv4_kernels.batched import batched_moe
from dsv4_kernels.moe import moe, workspace_bytes
from dsv4_kernels.packed_tokens import pack_tokens
from dsv4_kernels.route.gate_route import make_scratch
from dsv4_kernels.types import MoeLayer, Routing

if TYPE_CHECKING:
    from vllm_dsv4_moe.router import Dsv4Router


def token_counts(max_num_tokens: int) -> list[int]:
    """The powers of two up to max_num_tokens, and max_num_tokens."""
    powers = [2**i for i in range(max_num_tokens.bit_length())]
    return sorted({*powers, max_num_tokens})


def layer_token_counts(layer: MoeLayer) -> list[int]:
    """token_counts, and the first count whose rows are placed where one token's are gathered, or
    gathered where its are placed."""
    shape, places = layer.shape, layer.backend.places_rows
    counts = range(1, shape.max_num_tokens + 1)
    other = next((n for n in counts if places(shape, n) != places(shape, 1)), 1)
    return sorted({*token_counts(shape.max_num_tokens), other})


class WarmUp:
    """Remembers what was launched: layers of one shape and kind of routing need it once."""

    def __init__(self) -> None:
        self.done: set[tuple] = set()

    def __call__(
        self,
        layer: MoeLayer,
        router: "Dsv4Router | None",
        expert_map: torch.Tensor | None,
        ids_dtype: torch.dtype,
        packs: bool = False,
    ) -> None:
        """router is None where vLLM's own stays; ids_dtype is that of vLLM's dispatch; packs says
        whether tokens, unless they are few, are packed before the dispatch."""
        routes = None
        if router is not None:
            routes = (router.table is None, router.uses_token_ids, router.gate is None)
        of_layer = (layer.backend.name, layer.shape, layer.limit)
        key = (*of_layer, routes, expert_map is None, ids_dtype, packs)
        if key in self.done or layer.backend.fc1 is None:
            return
        self.done.add(key)
        shape, device = layer.shape, layer.weights.w13.device
        size: tuple[int, ...] = (shape.max_num_tokens, shape.hidden)
        if shape.batch_rows:
            size = (shape.num_local_experts, shape.batch_rows, shape.hidden)
        x = torch.zeros(size, dtype=torch.bfloat16, device=device)
        counts = torch.zeros(shape.num_local_experts, dtype=torch.int32, device=device)
        out = x if shape.batch_rows else torch.empty_like(x)
        workspace = torch.empty(
            workspace_bytes(layer.backend, shape), dtype=torch.uint8, device=device
        )
        for count in layer_token_counts(layer):
            if router is not None:
                launch_router(router, count, ids_dtype, device)
            if shape.batch_rows:
                batched_moe(x, counts, count, layer, workspace, out=out)
                continue
            routing = Routing(
                torch.zeros((count, shape.top_k), device=device),
                torch.full((count, shape.top_k), -1, dtype=ids_dtype, device=device),
            )
            moe(x[:count], routing, layer, workspace, expert_map=expert_map, out=out[:count])
            if packs:
                tokens = pack_tokens(x[:count], routing.ids, layer)
                moe(tokens, routing, layer, workspace, expert_map=expert_map, out=out[:count])
        torch.cuda.synchronize(device)


def launch_router(
    router: "Dsv4Router", num_tokens: int, ids_dtype: torch.dtype, device: torch.device
) -> None:
    """With and without a mask of padding, which vLLM makes for the batches of its CUDA graphs."""
    token_ids = None
    if router.uses_token_ids:
        token_ids = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    for padding in (None, torch.zeros(num_tokens, dtype=torch.bool, device=device)):
        rest = (token_ids, padding, ids_dtype)
        if router.gate is not None and router.gate.fits(num_tokens):
            num_experts, hidden = router.gate.weight.shape
            x = torch.zeros((num_tokens, hidden), dtype=torch.bfloat16, device=device)
            scratch = make_scratch(hidden, num_experts, device)
            router.gate_and_select(x, scratch, *rest)
        else:
            logits = torch.zeros((num_tokens, router.num_experts), device=device)
            router.select(logits, *rest)


WARM_UP = WarmUp()
