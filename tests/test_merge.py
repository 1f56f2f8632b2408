"""States of attention put together: what saw no key is not read."""

import pytest
import torch
from torch.autograd import gradcheck

import mini_flash_attention as mfa
from mini_flash_attention.reference import attention

NONE = float("-inf")


def halves(tokens=(40, 17), causal=False):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16, generator=g) for n in (5, sum(tokens), sum(tokens)))
    parts = []
    for k_part, v_part in zip(k.split(tokens, 1), v.split(tokens, 1), strict=True):
        out, lse, _ = mfa.flash_attn_func(q, k_part, v_part, return_attn_probs=True)
        parts.append((out, lse))
    ref, ref_lse = attention(q[0], k[0], v[0])
    return parts, ref[None], ref_lse[None]


def test_two_halves():
    ((out_a, lse_a), (out_b, lse_b)), ref, ref_lse = halves()
    out, lse = mfa.merge_attention_states(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out.double(), ref, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("held", [float("nan"), float("inf"), NONE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_saw_no_key_is_not_read(held, dtype):
    out = torch.randn(2, 3, 4, 8).to(dtype)
    lse = torch.randn(2, 4, 3)
    unread, nothing = torch.full_like(out, held), torch.full_like(lse, NONE)
    for order in ((out, lse, unread, nothing), (unread, nothing, out, lse)):
        merged, merged_lse = mfa.merge_attention_states(*order)
        assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
    merged, merged_lse = mfa.merge_attention_states(unread, nothing, unread, nothing)
    assert not merged.any() and (merged_lse == NONE).all()


def test_some_rows_saw_no_key():
    """Packed: rows of all four kinds beside one another."""
    out_a, out_b = torch.randn(2, 4, 2, 8)
    lse_a, lse_b = torch.randn(2, 2, 4)
    lse_a[:, 1], lse_b[:, 2] = NONE, NONE
    lse_a[:, 3], lse_b[:, 3] = NONE, NONE
    out_a[1], out_b[2], out_a[3], out_b[3] = (float("nan"),) * 4
    out, lse = mfa.merge_attention_states(out_a, lse_a, out_b, lse_b)
    assert torch.equal(out[1], out_b[1]) and torch.equal(out[2], out_a[2])
    assert not out[3].any() and (lse[:, 3] == NONE).all()
    weight = torch.sigmoid(lse_a[:, 0] - lse_b[:, 0])[:, None]
    torch.testing.assert_close(out[0], weight * out_a[0] + (1 - weight) * out_b[0])


def test_nan_of_what_saw_keys_is_kept():
    out, lse = torch.randn(1, 2, 1, 8), torch.zeros(1, 1, 2)
    bad = torch.full_like(out, float("nan"))
    assert mfa.merge_attention_states(out, lse, bad, lse)[0].isnan().all()


def test_gradients_are_finite_beside_nan():
    out_a, out_b = torch.randn(2, 4, 2, 8)
    lse_a, lse_b = torch.randn(2, 2, 4)
    lse_a[:, 1:], lse_b[:, 2:] = NONE, NONE
    out_a[1:], out_b[2:] = float("nan"), float("inf")
    given = [x.requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]
    out, lse = mfa.merge_attention_states(*given)
    (out.sum() + lse[:, :2].sum()).backward()
    for x in given:
        assert x.grad.isfinite().all()
    assert not out_a.grad[1:].any() and not out_b.grad[2:].any()


def test_gradients():
    shapes = (1, 3, 2, 4), (1, 2, 3), (1, 3, 2, 4), (1, 2, 3)
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def merged(*x):
        out, lse = mfa.merge_attention_states(*x)
        return out, lse

    assert gradcheck(merged, given, eps=1e-2, atol=1e-2, rtol=1e-2)
