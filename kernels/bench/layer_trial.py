"""One layer of random NVFP4 weights, and tokens for it: to verify kernels on, and to time them.

Times are of a whole call (layout to combine), captured in a CUDA graph that makes as many calls,
each with tokens and experts of its own, as fill the L2 cache twice: weights come from memory, as
in a model whose layers follow one another.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from bench.graph_timer import time_us
from dsv4_kernels.backends import REFERENCE, SM90
from dsv4_kernels.moe import MoeLayer, moe, prepare_layer, workspace_bytes
from dsv4_kernels.types import ExpertWeights, MoeShape, Routing

LIMIT = 10.0
# Of a token's error over its output: what rounding h and top_k rows to bf16 (2^-9) leaves.
TOLERANCE = 2.0**-8
Tokens = tuple[torch.Tensor, Routing]


def random_weights(shape: MoeShape, device: str) -> ExpertWeights:
    """Of a seed; gate and up differ in their global scales."""
    generator = torch.Generator(device).manual_seed(0)
    local, hidden, inter = shape.num_local_experts, shape.hidden, shape.intermediate

    def codes(rows: int, k: int) -> torch.Tensor:
        size = (local, rows, k // 2)
        return torch.randint(0, 256, size, dtype=torch.uint8, device=device, generator=generator)

    def scales(rows: int, k: int) -> torch.Tensor:
        size = (local, rows, k // 16)
        uniform = torch.rand(size, device=device, generator=generator)
        return (uniform * 200 + 24).to(torch.float8_e4m3fn)

    def factors(*size: int) -> torch.Tensor:
        return 1e-4 * (0.5 + torch.rand(size, device=device, generator=generator))

    return ExpertWeights(
        codes(2 * inter, hidden),
        scales(2 * inter, hidden),
        factors(local, 2),
        codes(hidden, inter),
        scales(hidden, inter),
        factors(local),
    )


def random_tokens(
    shape: MoeShape, num_tokens: int, seed: int, device: str, skewed: bool = False
) -> Tokens:
    """x and its routing. Skewed, experts have from no row to most, so that tiles of all sizes
    occur; otherwise each expert is as likely as another."""
    generator = torch.Generator(device).manual_seed(seed * 100_003 + num_tokens)
    size = (num_tokens, shape.num_experts)
    scores = torch.rand(size, device=device, generator=generator)
    if skewed:
        local = torch.linspace(1, 0, shape.num_local_experts, device=device)
        scores[:, : shape.num_local_experts] += local
    ids = scores.topk(shape.top_k, dim=1).indices.int()
    weights = torch.rand(ids.shape, device=device, generator=generator)
    size = (num_tokens, shape.hidden)
    x = torch.randn(size, device=device, dtype=torch.bfloat16, generator=generator)
    return x, Routing(weights, ids)


def expert_map(shape: MoeShape, device: str) -> torch.Tensor | None:
    """The first experts are local; None where all are."""
    if shape.num_local_experts == shape.num_experts:
        return None
    ids = torch.arange(shape.num_experts, dtype=torch.int32, device=device)
    return torch.where(ids < shape.num_local_experts, ids, -1)


def cold_tokens(shape: MoeShape, num_tokens: int) -> list[Tokens]:
    """As many as together touch twice the L2 cache's bytes of weights; two at least."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    expert_bytes = 3 * shape.hidden * shape.intermediate * 9 // 16
    found: list[Tokens] = []
    touched = 0
    while len(found) < 2 or (touched < 2 * cache and len(found) < 64):
        found.append(random_tokens(shape, num_tokens, len(found), "cuda"))
        ids = found[-1][1].ids
        touched += ids[ids < shape.num_local_experts].unique().numel() * expert_bytes
    return found


class LayerTrial:
    """The layer on the sm90 backend, what it must compute, and how long a call takes.

    device "cuda", or "cpu" where the kernels run in an emulator and nothing is timed.
    """

    def __init__(self, shape: MoeShape, token_counts: Sequence[int], device: str = "cuda") -> None:
        self.shape = shape._replace(max_num_tokens=max(token_counts))
        self.device = device
        self.mapping = expert_map(shape, device)
        self.cases = {
            count: [random_tokens(shape, count, 0, device, skewed) for skewed in (False, True)]
            for count in token_counts
        }
        weights = random_weights(shape, device)
        self._expect(weights)
        # What is compiled is the caller's affair.
        backend = replace(SM90, compile=None)
        self.layer = self._prepare(backend, weights)
        size = workspace_bytes(backend, self.shape)
        self.workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
        self.out = torch.empty(
            (self.shape.max_num_tokens, shape.hidden), dtype=torch.bfloat16, device=device
        )

    def _prepare(self, backend, weights: ExpertWeights) -> MoeLayer:
        return prepare_layer(backend, self.shape, weights, limit=LIMIT, activation_scales=None)

    def _expect(self, weights: ExpertWeights) -> None:
        """The oracle's output of every case, in one pass over the weights."""
        cases = [tokens for both in self.cases.values() for tokens in both]
        x = torch.cat([x for x, _ in cases])
        routing = Routing(*(torch.cat(part) for part in zip(*(r for _, r in cases), strict=True)))
        shape = self.shape._replace(max_num_tokens=len(x))
        layer = replace(self._prepare(REFERENCE, weights), shape=shape)
        nothing = torch.empty(0, dtype=torch.uint8, device=self.device)
        out = torch.empty_like(x)
        moe(x, routing, layer, nothing, expert_map=self.mapping, out=out)
        self.expected = out.split([len(x) for x, _ in cases])

    def call(self, tokens: Tokens) -> torch.Tensor:
        x, routing = tokens
        out = self.out[: len(x)]
        return moe(x, routing, self.layer, self.workspace, expert_map=self.mapping, out=out)

    def why_wrong(self, num_tokens: int) -> str | None:
        """What is wrong with the output at a number of tokens, or None."""
        place = 2 * list(self.cases).index(num_tokens)
        for name, tokens, expected in zip(
            ("even", "skewed"),
            self.cases[num_tokens],
            self.expected[place : place + 2],
            strict=True,
        ):
            self.out.fill_(torch.nan)
            self.workspace.fill_(0xFF)
            out = self.call(tokens).clone()
            if not out.isfinite().all():
                return f"{name} routing: not a number in the output"
            error = (out.float() - expected.float()).norm(dim=1)
            bound = TOLERANCE * expected.float().norm(dim=1)
            if bool((error > bound).any()):
                worst = float((error / bound.clamp(min=1e-30)).max())
                return f"{name} routing: off by {worst:.1f} x what rounding allows"
            if not torch.equal(self.call(tokens), out):
                return f"{name} routing: two runs differ"
        return None

    def time_us(self, num_tokens: int) -> float:
        """Of a call, with experts' weights out of the L2 cache."""
        sets = cold_tokens(self.shape, num_tokens)
        return time_us([partial(self.call, tokens) for tokens in sets], replays=15)
