"""A Triton backend named cpu that compiles nothing: its kernels run under TRITON_INTERPRET=1."""
