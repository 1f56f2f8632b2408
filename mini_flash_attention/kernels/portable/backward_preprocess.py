"""Before and after the kernels of a backward pass: LSE and delta; dQ out of an fp32 copy."""

import triton
import triton.language as tl

from ...plan.backward import BackwardTensors, Work
from ...plan.layout import strides
from ...problem import Problem
from ..launch import SIZES, Launch
from .backward_loads import config, head_of, head_strides, load_block, store_block, tensor


@triton.jit(do_not_specialize=SIZES)
def preprocess_kernel(
    out, dout, lse, dlse, lse_log2, delta, dq_accum, turns,
    stride_o_b, stride_o_t, stride_o_h, stride_do_b, stride_do_t, stride_do_h,
    stride_lse_b, stride_lse_h, stride_dlse_b, stride_dlse_h, stride_dlse_t,
    nheads, num_m_blocks, seqlen_q, lse_factor,
    C: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O), less the gradient of the LSE; and the LSE times a factor.

    Both are 0 in a row that sees no key or belongs to no sequence, whatever its dO holds. dq_accum:
    None, or an fp32 copy of dQ to clear; turns: None, or a counter for each row, likewise.
    """
    out = tensor(out, stride_o_b, stride_o_t, stride_o_h, C.DIVISIBLE_BY_8 & 1)
    dout = tensor(dout, stride_do_b, stride_do_t, stride_do_h, C.DIVISIBLE_BY_8 & 2)
    start = tl.program_id(0) % num_m_blocks * C.BLOCK_M
    batch_head = tl.program_id(0) // num_m_blocks
    b, head = (batch_head // nheads).to(tl.int64), (batch_head % nheads).to(tl.int64)
    i = start + tl.arange(0, C.BLOCK_M)
    real = i < seqlen_q
    o = load_block(
        head_of(out, b, 0, head), out.stride_t, start, seqlen_q, C.BLOCK_M, C.HEAD_DIM_V, C
    )
    do = load_block(
        head_of(dout, b, 0, head), dout.stride_t, start, seqlen_q, C.BLOCK_M, C.HEAD_DIM_V, C
    )
    d = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if dlse is not None:
        at = dlse + b * stride_dlse_b + head * stride_dlse_h + i.to(tl.int64) * stride_dlse_t
        d -= tl.load(at, mask=real, other=0.0)
    top = tl.load(lse + b * stride_lse_b + head * stride_lse_h + i, mask=real, other=0.0)
    empty = top == float("-inf")
    at = batch_head.to(tl.int64) * seqlen_q + i
    tl.store(lse_log2 + at, tl.where(empty, 0.0, top * lse_factor), mask=real)
    tl.store(delta + at, tl.where(empty, 0.0, d), mask=real)
    if turns is not None:
        tl.store(turns + at, 0, mask=real)
    if dq_accum is not None:
        columns = tl.arange(0, C.D)
        rows = dq_accum + at[:, None] * C.D + columns[None, :]
        tl.store(rows, tl.zeros([C.BLOCK_M, C.D], tl.float32), mask=real[:, None])


@triton.jit(do_not_specialize=SIZES)
def postprocess_kernel(
    dq_accum, dq, stride_dq_b, stride_dq_t, stride_dq_h, nheads, num_m_blocks, seqlen_q,
    softmax_scale,
    C: tl.constexpr,
):  # fmt: skip
    """dQ in its own dtype from the fp32 copy, times the softmax scale.

    The copy's columns are in the order in which a Hopper consumer stores them (`hand_over` in
    `hopper/backward_roles.py`).
    """
    dq = tensor(dq, stride_dq_b, stride_dq_t, stride_dq_h, C.DIVISIBLE_BY_8 & 1)
    start = tl.program_id(0) % num_m_blocks * C.BLOCK_M
    batch_head = tl.program_id(0) // num_m_blocks
    b, head = batch_head // nheads, batch_head % nheads
    i = start + tl.arange(0, C.BLOCK_M)
    rows = dq_accum + (batch_head.to(tl.int64) * seqlen_q + i)[:, None] * C.D
    x = tl.load(rows + tl.arange(0, C.D)[None, :], mask=(i < seqlen_q)[:, None], other=0.0)
    x = tl.reshape(x * softmax_scale, [C.BLOCK_M, C.D // 32, 4, 2, 2, 2])
    x = tl.reshape(tl.permute(x, (0, 1, 3, 4, 2, 5)), [C.BLOCK_M, C.D])
    at = head_of(dq, b, 0, head)
    store_block(at, dq.stride_t, start, x, seqlen_q, seqlen_q, C.HEAD_DIM)


def preprocess(
    p: Problem, given: BackwardTensors, work: Work, lse_factor: float, cleared: tuple[str, ...] = ()
) -> Launch:
    """The launch of `preprocess_kernel`. cleared: "dq_accum", "turns"."""
    out, dout, dlse = given.out, given.dout, given.dlse
    dlse_strides = (0, 0, 0) if dlse is None else (*head_strides(dlse), dlse.stride(-1))
    constants = (
        *strides(out), *strides(dout), *head_strides(given.lse), *dlse_strides,
        p.q.shape[-2], work.num_blocks, p.q.shape[-3], lse_factor,
        config(p, work.tiles, "", out, dout),
    )  # fmt: skip
    zeros = (name if name in cleared else "nothing" for name in ("dq_accum", "turns"))
    pointers = ("out", "dout", "lse", "dlse", "lse_log2", "delta", *zeros)
    return Launch(preprocess_kernel, work.programs, pointers, constants, *work.tiles[2:])


def postprocess(p: Problem, given: BackwardTensors, work: Work) -> Launch:
    """The launch of `postprocess_kernel`."""
    constants = (
        *strides(given.dq), p.q.shape[-2], work.num_blocks, p.q.shape[-3],
        p.options.softmax_scale, config(p, work.tiles, "", given.dq),
    )  # fmt: skip
    pointers = ("dq_accum", "dq")
    return Launch(postprocess_kernel, work.programs, pointers, constants, *work.tiles[2:])
