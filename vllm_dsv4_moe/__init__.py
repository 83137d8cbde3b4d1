"""The vLLM plugin: vLLM's entry point calls `register` in every process that it starts."""

SUPPORTED_VLLM = ("0.32", "0.33")


def register() -> None:
    """Give NVFP4 DeepSeek-V4 experts to this package. A second call does nothing.

    vLLM logs and forgets an error in *importing* a plugin, so everything is imported in here.
    RuntimeError for a vLLM that this package was not written for.
    """
    from vllm import __version__

    if not is_supported(__version__):
        raise RuntimeError(
            f"vllm-dsv4-moe supports vLLM {' and '.join(SUPPORTED_VLLM)}, and this is vLLM "
            f"{__version__}: install a supported vLLM, or set VLLM_PLUGINS to leave dsv4_moe out"
        )
    from vllm_dsv4_moe import quant_config, runner

    quant_config.install()
    runner.install()


def is_supported(vllm_version: str) -> bool:
    """Whether this package was written for that vLLM: the minor version decides."""
    return ".".join(vllm_version.split(".")[:2]) in SUPPORTED_VLLM
