"""A tiny checkpoint, and vLLM's configuration of it, by the CONFIG of the module that asks."""

import pytest


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory):
    from vllm_dsv4_moe.commands.tiny import write_tiny_checkpoint

    folder = tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])
    return write_tiny_checkpoint(folder / "tiny", request.module.CONFIG)


@pytest.fixture(scope="module")
def vllm_config(checkpoint):
    from tests.support import loading

    return loading.engine_config(checkpoint)
