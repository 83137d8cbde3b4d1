"""bench.serve's worker extension: which graph is a step's, and what a trace says of its kernels."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
from bench.serve_worker import (
    Kernel,
    ServeWorker,
    by_name,
    kernels_of,
    layer_windows,
    moe_layers,
    short_name,
)


class Key(NamedTuple):
    """Of vLLM's graphs."""

    num_tokens: int


@pytest.mark.parametrize("drafted", [0, 1, 3])
def test_a_steps_graph_holds_what_is_drafted_of_its_sequences(drafted):
    graphs = {Key(size): size for size in (128, 32, 8, 64, 1, 4)}
    manager = SimpleNamespace(graphs=graphs, decode_query_len=1 + drafted)
    worker = ServeWorker()
    worker.model_runner = SimpleNamespace(cudagraph_manager=manager)
    assert worker._bench_graph_of(32) == 32 * (1 + drafted)


def test_names_of_kernels():
    of = {
        "void at::native::elementwise<4, f<int>(int)>(int, Array<char*, 3>)": "elementwise",
        "_combine_kernel": "_combine_kernel",
        "void deep_gemm::sm90_fp8_gemm_1d2d_impl<(unsigned int)0, 4096u>(float*, int)": (
            "sm90_fp8_gemm_1d2d_impl"
        ),
    }
    assert {name: short_name(name) for name in of} == of


def test_kernels_are_summed_by_name_and_step():
    events = [
        {"cat": "kernel", "name": "b", "ts": 10, "dur": 2, "args": {"stream": 7}},
        {"cat": "cpu_op", "name": "x", "ts": 0, "dur": 50},
        {"cat": "kernel", "name": "a", "ts": 0, "dur": 5, "args": {"stream": 7}},
        {"cat": "kernel", "name": "b", "ts": 20, "dur": 4, "args": {"stream": 9}},
    ]
    kernels = kernels_of(events)
    assert [kernel.name for kernel in kernels] == ["a", "b", "b"]
    assert by_name(kernels, 2) == [
        {"name": "b", "us": 3.0, "launches": 1.0},
        {"name": "a", "us": 2.5, "launches": 0.5},
    ]


# A layer: gate and routed experts on stream 7, the shared expert on stream 9 until after combine.
LAYER = [
    Kernel(0, 5, 7, "mhc_pre_big_fuse_with_norm"),
    Kernel(6, 8, 7, "LLBf16Dotprod"),
    Kernel(6, 8, 9, "quant"),
    Kernel(9, 10, 7, "_router_kernel"),
    Kernel(9, 19, 9, "deep_gemm"),
    Kernel(19, 33, 7, "fc1"),
    Kernel(33, 42, 7, "fc2"),
    Kernel(42, 44, 7, "_combine_kernel"),
    Kernel(43, 50, 9, "deep_gemm"),
    Kernel(51, 52, 7, "vectorized CUDAFunctor_add"),
    Kernel(53, 59, 7, "mhc_fused"),
]


def test_a_layers_window_is_from_before_the_gate_to_the_sum():
    later = [k._replace(start=k.start + 100, end=k.end + 100) for k in LAYER]
    first, second = layer_windows(LAYER + later)
    assert (first.start, first.end, len(first.kernels)) == (5, 52, 9)
    assert (second.start, second.end, len(second.kernels)) == (105, 152, 9)


@pytest.mark.parametrize(
    "router",
    [
        "void vllm::moe::topkGatingSoftplusSqrt",  # vLLM 0.32
        "_dsv4_topk_kernel",  # 0.33
        "void vllm::moe::dsv4HashTopkSoftplusSqrt<float, 6>",
    ],
)
def test_a_layer_whose_gate_is_cublas_is_known_by_its_router(router):
    others = {"LLBf16Dotprod": "nvjet_tst", "_router_kernel": router}
    peer = [k._replace(name=others.get(k.name, k.name)) for k in LAYER]
    assert [window[:2] for window in layer_windows(peer)] == [(5, 52)]


def test_a_gate_without_a_sum_after_it_is_no_window():
    assert layer_windows(LAYER[:-2]) == []


def test_a_moe_layers_time_and_kernels():
    later = [k._replace(start=k.start + 100, end=k.end + 100) for k in LAYER]
    found = moe_layers(LAYER + later)
    assert found["moe_us"] == 47 and found["timeline"][0] == [1, 3, 7, "LLBf16Dotprod"]
    assert moe_layers(LAYER[:2]) == {}
