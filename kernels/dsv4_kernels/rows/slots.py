"""Which rows a token has, in device code of the ops that go through a token's slots."""

import triton
import triton.language as tl


@triton.jit
def rows_of_token(slot_to_row_ptr, token, TOP_K: tl.constexpr):
    """(the row of each slot, -1 where the expert is not local; the largest of them), int64."""
    rows = ()
    last = tl.full([], -1, tl.int64)
    for slot in tl.static_range(TOP_K):
        row = tl.load(slot_to_row_ptr + token * TOP_K + slot).to(tl.int64)
        rows = rows + (row,)
        last = tl.maximum(last, row)
    return rows, last
