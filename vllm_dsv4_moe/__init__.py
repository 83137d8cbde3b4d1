"""The vLLM plugin: vLLM's entry point calls `register` in every process that it starts."""
