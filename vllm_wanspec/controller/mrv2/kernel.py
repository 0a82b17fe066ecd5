"""The walk of `core.block` as a Triton kernel: one program for each row of a batch.

It needs torch and Triton, not vLLM, and reads memory that a thread of the host writes meanwhile. So it loads the header
once, and each word once, at an address that follows from the header, and thus after it; nothing waits for the writer.
Whatever the words say, loops end and indices stay inside: positions and places are masked, and the trips of a loop are
bounded by a constant. The layout of header and word is `core.block`'s; tests hold this walk against the one there, in
Triton's interpreter, which cannot do `&` with a scalar and a block of booleans: hence `tl.where`.
"""

import triton
import triton.language as tl


@triton.jit
def walk_kernel(
    headers,
    words,
    all_token_ids,
    all_token_ids_stride,
    total_len,
    last_sampled,
    idx_mapping,
    drafts,
    drafts_stride,
    told,
    BLOCK: tl.constexpr,
    UNDER_ROOT: tl.constexpr,
    FOLLOW: tl.constexpr,
    LIMIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    VOCAB: tl.constexpr,
    COUNT_DROPPED: tl.constexpr,
):
    """Write the drafts of the batch's rows, and tell them to the host.

    Args:
        headers: int64 [slots].
        words: int64 [slots, 2, BLOCK].
        all_token_ids: int32 [slots, all_token_ids_stride], the requests' tokens by position.
        all_token_ids_stride: Positions in a row of it.
        total_len: int32 [slots], how many of the tokens there are.
        last_sampled: int64 [slots] or [slots, 1], what fills places without a draft.
        idx_mapping: int64 [rows], the slot of each row; a negative one has no draft.
        drafts: int64 [slots, at least LIMIT], written.
        drafts_stride: Tokens in a row of it.
        told: int64 [rows, 1 + LIMIT], written: how many tokens were drafted, from bit 8 on how many of them prompt
            lookup made, from bit 16 on how many words were dropped where they are counted; then what `drafts` has.
        BLOCK: `core.block.BLOCK_NODES`.
        UNDER_ROOT: `core.block.UNDER_ROOT`.
        FOLLOW: `core.block.MAX_FOLLOWED`, a power of two.
        LIMIT: Most tokens to draft.
        COLUMNS: LIMIT, or the power of two above it.
        VOCAB: Ids are below this.
        COUNT_DROPPED: Whether to count the words of another generation than the header's.
    """
    row = tl.program_id(0).to(tl.int64)
    told_row = told + row * (LIMIT + 1)
    slot = tl.load(idx_mapping + row).to(tl.int64)
    if slot < 0:
        tl.store(told_row, tl.full((), 0, tl.int64))
        return

    header = tl.load(headers + slot, volatile=True)
    which = header & 1
    generation = (header >> 1) & 0xFFFF
    count = (header >> 17) & 0xFF
    root = (header >> 25) & 0x7FFFFFFF
    length = tl.load(total_len + slot).to(tl.int64)
    filler = tl.load(last_sampled + slot)
    walking = (count > 0) & (count <= BLOCK) & (root <= length) & (length - root <= FOLLOW)

    place = tl.arange(0, BLOCK)
    filled = place < tl.where(walking, count, 0)
    word = tl.load(words + (slot * 2 + which) * BLOCK + place, mask=filled, other=0, volatile=True)
    known = filled & ((word & 0xFFFF) == generation)
    parent = (word >> 16) & 0xFF
    token = (word >> 24) & 0xFFFFFF
    best = known & (((word >> 56) & 1) == 1) & (token < VOCAB)
    dropped = tl.full((), 0, tl.int64)
    if COUNT_DROPPED:
        dropped += tl.sum(tl.where(filled & ((word & 0xFFFF) != generation), 1, 0), axis=0)

    # Along what was verified since the root. The tokens are loaded at once: each is far away.
    since_root = tl.where(walking, length - root, 0)
    step = tl.arange(0, FOLLOW)
    verified = tl.load(
        all_token_ids + slot * all_token_ids_stride + root + step,
        mask=(step < since_root) & (root + step < all_token_ids_stride),
        other=-1,
    ).to(tl.int64)
    cursor = tl.full((), UNDER_ROOT, tl.int64)
    for position in range(since_root):
        wanted = tl.sum(tl.where(step == position, verified, 0), axis=0)
        child = tl.max(tl.where(known & (parent == cursor) & (token == wanted), place, -1), axis=0).to(tl.int64)
        walking = walking & (child >= 0)
        cursor = tl.where(walking, child, cursor)

    # Down the most probable children. The place, whether lookup made it, and the token of each are packed into one
    # value, so that one maximum over the block finds all three.
    packed = tl.where(best, (place.to(tl.int64) << 25) | (((word >> 57) & 1) << 24) | token, -1)
    column = tl.arange(0, COLUMNS)
    draft = tl.full((COLUMNS,), 0, tl.int64) + filler
    found = tl.full((), 0, tl.int64)
    looked_up = tl.full((), 0, tl.int64)
    for position in range(LIMIT):
        child = tl.max(tl.where(parent == cursor, packed, -1), axis=0)
        walking = walking & (child >= 0)
        cursor = tl.where(walking, child >> 25, cursor)
        draft = tl.where(column == tl.where(walking, position, -1), child & 0xFFFFFF, draft)
        found += tl.where(walking, 1, 0)
        looked_up += tl.where(walking, (child >> 24) & 1, 0)

    tl.store(drafts + slot * drafts_stride + column, draft, mask=column < LIMIT)
    tl.store(told_row + 1 + column, draft, mask=column < LIMIT)
    tl.store(told_row, found | (looked_up << 8) | (dropped << 16))
