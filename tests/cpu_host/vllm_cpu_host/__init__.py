"""What vLLM's CPU build lacks for DeepSeek-V4; see README.md."""
