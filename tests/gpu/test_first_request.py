"""Once a layer is loaded, no call of any size compiles a kernel or allocates: counted on a GPU.

That loading reaches every variant is argued without a GPU in test_warm_up.py.
"""

import pytest
import torch
from bench.inputs import LIMIT, random_weights
from dsv4_kernels import backends
from dsv4_kernels.moe import moe, prepare_layer, workspace_bytes
from dsv4_kernels.route.gate_route import MAX_TOKENS, gate_route, make_scratch
from dsv4_kernels.route.router_topk import router_topk
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.types import MoeShape, Routing

from vllm_dsv4_moe.warm_up import WarmUp

pytestmark = pytest.mark.gpu
SHAPE = MoeShape(16, 5, 4, 512, 384, 200, False)


class Gate:
    def __init__(self) -> None:
        self.weight = torch.zeros((SHAPE.num_experts, SHAPE.hidden), device="cuda").bfloat16()

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= MAX_TOKENS


class Router:
    """What the adapter's router launches, without vLLM around it."""

    num_experts = SHAPE.num_experts

    def __init__(self, is_hash: bool, gate: Gate | None) -> None:
        self.bias = None if is_hash else torch.zeros(SHAPE.num_experts, device="cuda")
        table = torch.arange(100 * SHAPE.top_k, dtype=torch.int32, device="cuda")
        self.table = (table % SHAPE.num_experts).view(100, -1) if is_hash else None
        self.uses_token_ids, self.gate = is_hash, gate

    def options(self, token_ids, padding, ids_dtype) -> dict:
        given = {"bias": self.bias, "table": self.table, "token_ids": token_ids}
        return given | {"padding": padding, "ids_dtype": ids_dtype}

    def select(self, logits, *rest) -> Routing:
        return router_topk(logits, SHAPE.top_k, **self.options(*rest))

    def gate_and_select(self, x, scratch, *rest) -> Routing:
        return gate_route(x, self.gate.weight, SHAPE.top_k, scratch=scratch, **self.options(*rest))


@pytest.fixture
def compiled(monkeypatch) -> list:
    """Names of what Triton and CuTe DSL compile, or load from a cache, from here on."""
    from triton import knobs

    names: list = []
    hook = lambda **facts: names.append(facts["fn"].name)  # noqa: E731
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", hook)
    compile_now = sm90.compiled
    spy = lambda kernel: names.append(repr(kernel.gemm)) or compile_now(kernel)  # noqa: E731
    monkeypatch.setattr(sm90, "compiled", spy)
    return names


@pytest.mark.parametrize("gated", [False, True], ids=["logits", "gate"])
@pytest.mark.parametrize("is_hash", [False, True], ids=["dense", "hash"])
def test_calls_of_any_size_compile_and_allocate_nothing(compiled, is_hash, gated):
    layer = prepare_layer(
        backends.SM90, SHAPE, random_weights(SHAPE, "cuda"), limit=LIMIT, activation_scales=None
    )
    router = Router(is_hash, Gate() if gated else None)
    mapping = torch.full((SHAPE.num_experts,), -1, dtype=torch.int32, device="cuda")
    mapping[: SHAPE.num_local_experts] = torch.arange(SHAPE.num_local_experts)
    WarmUp()(layer, router, mapping, torch.int32)
    workspace = torch.empty(workspace_bytes(layer.backend, SHAPE), dtype=torch.uint8, device="cuda")
    scratch = make_scratch(SHAPE.hidden, SHAPE.num_experts, torch.device("cuda"))
    size = (SHAPE.max_num_tokens, SHAPE.hidden)
    x = torch.randn(size, device="cuda").bfloat16()
    logits = torch.randn((SHAPE.max_num_tokens, SHAPE.num_experts), device="cuda")
    token_ids = torch.arange(SHAPE.max_num_tokens, dtype=torch.int32, device="cuda") % 100
    out = torch.empty_like(x)
    loaded = len(compiled)
    for num_tokens in range(1, SHAPE.max_num_tokens + 1):
        ids = token_ids[:num_tokens] if is_hash else None
        for padding in (None, torch.zeros(num_tokens, dtype=torch.bool, device="cuda")):
            rest = (ids, padding, torch.int32)
            if gated and router.gate.fits(num_tokens):
                routing = router.gate_and_select(x[:num_tokens], scratch, *rest)
            else:
                routing = router.select(logits[:num_tokens], *rest)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        moe(x[:num_tokens], routing, layer, workspace, expert_map=mapping, out=out[:num_tokens])
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        assert allocated == 0, num_tokens
    assert compiled[loaded:] == []
    torch.cuda.synchronize()


def test_what_is_not_warmed_up_is_counted(compiled):
    """The counters count: a size of table that nothing has used."""
    logits = torch.zeros((3, 33), device="cuda")
    router_topk(logits, 7)
    assert "_router_kernel" in compiled
    sm90.compile_gemm(sm90.gemms(SHAPE._replace(hidden=256), 3)[0])
    assert any(name.startswith("Gemm(op='fc1'") for name in compiled)
