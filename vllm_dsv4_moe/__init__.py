"""The vLLM plugin: vLLM's entry point calls `register` in every process that it starts."""

SUPPORTED_VLLM = ("0.32", "0.33")
METHOD_NAME = "deepseek_v4_fp8"  # the quantisation method that vLLM resolves DeepSeek-V4 to
# The warning that this process or the one that started it has logged.
WARNED = "DSV4_MOE_WARNED"


def register() -> None:
    """Give DeepSeek-V4's FP4 experts to this package. A second call does nothing.

    Raises nothing: where the plugin cannot work, one warning says why, and vLLM keeps every layer.
    """
    import logging
    import os

    reason = install()
    if reason is None:
        return
    warning = (
        f"vllm-dsv4-moe leaves every layer to vLLM: {reason}. It supports vLLM "
        f"{' and '.join(SUPPORTED_VLLM)}; set VLLM_PLUGINS to leave dsv4_moe out"
    )
    if os.environ.get(WARNED) != warning:
        os.environ[WARNED] = warning
        logging.getLogger("vllm.dsv4_moe").warning("%s", warning)


def install() -> str | None:
    """Replace vLLM's router and experts; or say why that cannot be, and replace nothing.

    vLLM logs and forgets an error in *importing* a plugin, so everything is imported in here.
    """
    try:
        from vllm import __version__

        if not is_supported(__version__):
            reason = f"this is vLLM {__version__}"
        else:
            from vllm_dsv4_moe import quant_config, runner

            runner.install()
            quant_config.install()
            return None
    except Exception as error:  # whatever a patched vLLM does
        reason = f"{type(error).__name__}: {error}"
    try:
        from vllm_dsv4_moe import unsupported_vllm

        unsupported_vllm.install()
    except Exception:
        # The reason is the one worth reading: options of ours are then not refused.
        pass
    return reason


def is_supported(vllm_version: str) -> bool:
    """Whether this package was written for that vLLM: the minor version decides."""
    return ".".join(vllm_version.split(".")[:2]) in SUPPORTED_VLLM
