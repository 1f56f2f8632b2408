"""Random calls of the three functions, and what the definition says they must give.

A case is built from a seed and a few words, so a failure is reproduced by one line. Every slot
that no sequence uses holds NaN, and every output lies between margins of NaN.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

import mini_flash_attention as mfa
from mini_flash_attention import reference, triton_on_cpu

MARGIN = 512


@dataclass
class Case:
    """A call, ready to be made as often as wanted, and its oracle."""

    function: str
    arguments: dict[str, Any]
    rows: list[tuple[Any, Any, torch.Tensor, torch.Tensor, torch.Tensor]]
    """(index into out, index into lse, q, k, v) of each sequence."""
    meaning: dict[str, Any] = field(default_factory=dict)
    """softmax_scale, causal, window_size and the rest as the reference takes them."""

    def run(self, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = self.arguments | changes
        if self.function == "flash_attn_with_kvcache":
            return mfa.flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
        out, lse, _ = getattr(mfa, self.function)(**arguments, return_attn_probs=True)
        return out, lse

    def oracle(self, b: int, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the definition gives for sequence b."""
        meaning = self.meaning | more
        slopes = meaning.get("alibi_slopes")
        if slopes is not None and slopes.dim() == 2:
            meaning["alibi_slopes"] = slopes[b]
        if meaning.get("score_mod") is not None:
            meaning |= {"batch": b}
            score_mod, aux = meaning["score_mod"], meaning.pop("score_mod_args", ())
            extra = [aux] if aux else []
            meaning["score_mod"] = lambda *given: triton_on_cpu.call(score_mod, *given, *extra)
        return reference.attention(*self.rows[b][2:], **meaning)

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Within the numerical promise of the contract, everywhere; 0 and -inf where no key is."""
        untouched = torch.ones_like(out, dtype=torch.bool)
        for b, (at, lse_at, q, _, v) in enumerate(self.rows):
            untouched[at] = False
            ref, ref_lse = self.oracle(b)
            plain, _ = self.oracle(b, dtype=q.dtype)
            error = _largest(out[at].double() - ref)
            promise = 2 * _largest(plain.double() - ref) + 2 * rounding(ref, q.dtype)
            if q.dtype is torch.float32:  # no GPU dtype: one row's luck should not decide
                promise += 8 * torch.finfo(q.dtype).eps * _largest(v)
            assert error <= promise, f"error {error:.3g} over {promise:.3g}"
            there = ref_lse > float("-inf")
            assert not lse[lse_at].isnan().any()
            assert torch.equal(lse[lse_at] > float("-inf"), there)
            lse_error = _largest(lse[lse_at].double()[there] - ref_lse[there])
            assert lse_error <= 1e-5 * max(1.0, _largest(ref_lse[there]))
        assert not out[untouched].any(), "rows of no sequence are not 0"
        if self.arguments["q"].dim() == 3:
            assert (lse[:, untouched[:, 0, 0]] == float("-inf")).all(), "nor is their LSE -inf"


def rounding(ref: torch.Tensor, dtype: torch.dtype) -> float:
    """What rounding to dtype costs at the reference's magnitude."""
    rounded = ref.to(dtype)
    return _largest(rounded + 0.3 - 0.3 - rounded)


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def margined(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor of NaN inside a larger one of NaN; `margins_intact` looks at the rest."""
    numel = torch.Size(shape).numel()
    whole = torch.full((numel + 2 * MARGIN,), float("nan"), dtype=dtype, device=device)
    return whole[MARGIN : MARGIN + numel].view(shape)


def margins_intact(x: torch.Tensor) -> bool:
    """Nothing but x itself was written in the memory around it."""
    storage = x.untyped_storage()
    whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(
        storage, 0, (storage.nbytes() // x.element_size(),), (1,)
    )
    end = x.storage_offset() + x.numel()
    return bool(whole[: x.storage_offset()].isnan().all() and whole[end:].isnan().all())


def between_margins(case: Case, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, LSE) of the call, of which nothing was written around the output."""
    q = case.arguments["q"]
    head_dim = case.rows[0][4].shape[-1] if case.rows else q.shape[-1]
    out = margined((*q.shape[:-1], head_dim), q.dtype, str(q.device))
    result, lse = case.run(out=out, **changes)
    assert result is out and margins_intact(out)
    return out, lse


def ints(*numbers: Any, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def dense(
    seed: int, batch: int, seqlen_q: int, seqlen_k: int, nheads: int, nheads_k: int,
    head_dim: int, dtype: torch.dtype, device: str, head_dim_v: int = 0, **meaning: Any,
) -> Case:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    q = randn(g, batch, seqlen_q, nheads, head_dim, dtype=dtype, device=device)
    dims = (head_dim, head_dim_v or head_dim)
    k, v = (randn(g, batch, seqlen_k, nheads_k, d, dtype=dtype, device=device) for d in dims)
    rows = [(b, b, q[b], k[b], v[b]) for b in range(batch)]
    return Case("flash_attn_func", {"q": q, "k": k, "v": v} | meaning, rows, meaning)


def _packed(
    g: torch.Generator, lengths: list[int], padding: int, nheads: int, head_dim: int,
    dtype: torch.dtype, device: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Tokens of all sequences, NaN in the padding rows after them; cu_seqlens."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    tokens = randn(g, sum(lengths) + padding, nheads, head_dim, dtype=dtype, device=device)
    tokens[sum(lengths) :] = float("nan")
    return tokens, cu_seqlens.int().to(device)


def _paged(
    g: torch.Generator, lengths: list[int], page_size: int, nheads_k: int, head_dim: int,
    dtype: torch.dtype, device: str, room: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Caches whose pages lie in random order, NaN in every unused slot; table with junk at ends."""
    needed = [-(-(n + room) // page_size) for n in lengths]
    columns = max([1, *needed]) + 1
    num_blocks = sum(needed) + 2
    caches = torch.full((2, num_blocks, page_size, nheads_k, head_dim), float("nan")).to(dtype)
    table = torch.randint(-(2**31), 2**31 - 1, (len(lengths), columns), generator=g)
    order = torch.randperm(num_blocks, generator=g).tolist()
    for b, n in enumerate(lengths):
        mine = torch.tensor([order.pop() for _ in range(needed[b])], dtype=torch.long)
        table[b, : len(mine)] = mine
        j = torch.arange(n)
        tokens = torch.randn(2, n, nheads_k, head_dim, generator=g).to(dtype)
        caches[:, mine[j // page_size], j % page_size] = tokens
    caches = caches.to(device)
    return caches[0], caches[1], table.int().to(device)


def varlen(
    seed: int, lengths_q: list[int], lengths_k: list[int], page_size: int, nheads: int,
    nheads_k: int, head_dim: int, dtype: torch.dtype, device: str, padding: int = 3,
    head_dim_v: int = 0, used_q: bool = False, **meaning: Any,
) -> Case:  # fmt: skip
    """used_q: the last queries of some sequences are not in use, and hold NaN."""
    g = torch.Generator().manual_seed(seed)
    q, cu_q = _packed(g, lengths_q, padding, nheads, head_dim, dtype, device)
    starts = cu_q.tolist()
    arguments: dict[str, Any] = {"q": q, "cu_seqlens_q": cu_q} | meaning
    arguments |= {"max_seqlen_q": max(lengths_q, default=0)}
    arguments |= {"max_seqlen_k": max(lengths_k, default=0)}
    cu_k = torch.tensor([0, *lengths_k]).cumsum(0).int()
    if page_size:
        k, v, table = _paged(g, lengths_k, page_size, nheads_k, head_dim, dtype, device)
        v = v[..., : head_dim_v or head_dim]
        arguments |= {"block_table": table}
        keys = [
            tuple(reference.pages(x, table[b], n) for x in (k, v)) for b, n in enumerate(lengths_k)
        ]
    else:
        k, _ = _packed(g, lengths_k, padding, nheads_k, head_dim, dtype, device)
        v, _ = _packed(g, lengths_k, padding, nheads_k, head_dim_v or head_dim, dtype, device)
        keys = [tuple(x[cu_k[b] : cu_k[b + 1]] for x in (k, v)) for b in range(len(lengths_k))]
    arguments |= {"k": k, "v": v, "cu_seqlens_k": cu_k.to(device)}
    if used_q:
        lengths_q = [int(torch.randint(n + 1, (), generator=g)) for n in lengths_q]
        arguments["seqused_q"] = torch.tensor(lengths_q).int().to(device)
    rows = []
    for b, (k_b, v_b) in enumerate(keys):
        mine = slice(starts[b], starts[b] + lengths_q[b])
        q[mine.stop : starts[b + 1]] = float("nan")
        rows.append((mine, (slice(None), mine), q[mine], k_b, v_b))
    return Case("flash_attn_varlen_func", arguments, rows, meaning)


def kvcache(
    seed: int, seqlen_q: int | list[int], lengths: list[int], appended: int, page_size: int,
    nheads: int, nheads_k: int, head_dim: int, dtype: torch.dtype, device: str, num_splits: int = 0,
    head_dim_v: int = 0, rotary: str = "", leftpad: bool = False, rows: bool = False,
    **meaning: Any,
) -> Case:  # fmt: skip
    """`lengths` are what the cache holds before `appended` tokens are added.

    A list for seqlen_q packs the queries, and what is appended, if anything, is as long. rotary:
    "pairs" or "halves". leftpad: some keys at the front are not in use. rows: sequences use rows of
    a larger cache, or of a larger block table.
    """
    g = torch.Generator().manual_seed(seed)
    batch, packed = len(lengths), isinstance(seqlen_q, list)
    dims = (head_dim, head_dim_v or head_dim)
    lengths_q = seqlen_q if packed else [seqlen_q] * batch
    new = lengths_q if packed and appended else [appended] * batch
    used = torch.tensor(lengths).int().to(device)
    arguments: dict[str, Any] = {"cache_seqlens": used, "num_splits": num_splits}
    if packed:
        q, cu_q = _packed(g, lengths_q, 2, nheads, head_dim, dtype, device)
        arguments |= {"cu_seqlens_q": cu_q, "max_seqlen_q": max(lengths_q, default=0)}
        starts = cu_q.tolist()
        places = [slice(starts[b], starts[b + 1]) for b in range(batch)]
    else:
        q = randn(g, batch, seqlen_q, nheads, head_dim, dtype=dtype, device=device)
        places = list(range(batch))
    arguments["q"] = q
    pads = [0] * batch
    if leftpad:
        pads = [int(torch.randint(n + 1, (), generator=g)) for n in lengths]
        arguments["cache_leftpad"] = torch.tensor(pads).int().to(device)
    in_cache = list(range(batch))
    if rows:
        in_cache = torch.randperm(batch + 2, generator=g)[:batch].tolist()
        arguments["cache_batch_idx"] = torch.tensor(in_cache).int().to(device)
    if page_size:
        size = (page_size, nheads_k, max(dims), dtype, device)
        k, v, table = _paged(g, lengths, *size, room=max(new, default=0))
        k, v = k[..., : dims[0]], v[..., : dims[1]]
        arguments |= {"block_table": table}
        if rows:
            larger = torch.full((batch + 2, table.shape[1]), -7, dtype=torch.int32, device=device)
            larger[in_cache] = table
            arguments |= {"block_table": larger}
        old = [[reference.pages(x, table[b], n) for x in (k, v)] for b, n in enumerate(lengths)]
    else:
        capacity = max((n + m for n, m in zip(lengths, new, strict=True)), default=0) + 5
        shape = (batch + 2 * rows, capacity, nheads_k)
        k, v = (margined((*shape, d), dtype, device) for d in dims)
        for b, n in zip(in_cache, lengths, strict=True):
            k[b, :n], v[b, :n] = (
                randn(g, n, nheads_k, d, dtype=dtype, device=device) for d in dims
            )
        old = [[x[b, :n].clone() for x in (k, v)] for b, n in zip(in_cache, lengths, strict=True)]
    for b, pad in enumerate(pads):  # nobody may read what stands before the first key
        for x in (k, v):
            _forget(x, arguments, b, pad, page_size)
    arguments |= {"k_cache": k, "v_cache": v}
    queries = [q[place] for place in places]
    if appended:
        tokens = (q.shape[0],) if packed else (batch, appended)
        more = [randn(g, *tokens, nheads_k, d, dtype=dtype, device=device) for d in dims]
        arguments |= {"k": more[0], "v": more[1]}
        mine = [[x[place] for x in more] for place in places]
        if rotary:
            angles = torch.rand(max(lengths) + 40, head_dim // 4, generator=g) * 6
            cos, sin = (f(angles).to(dtype).to(device) for f in (torch.cos, torch.sin))
            arguments |= {"rotary_cos": cos, "rotary_sin": sin}
            arguments["rotary_interleaved"] = rotary == "pairs"
            moving = bool(meaning.get("causal")) or meaning.get("window_size", (-1, -1)) != (-1, -1)
            for b, n in enumerate(lengths):
                mine[b][0] = rotated(mine[b][0], cos, sin, n, True, rotary)
                queries[b] = rotated(queries[b], cos, sin, n, moving, rotary)
        old = [[torch.cat(x) for x in zip(old[b], mine[b], strict=True)] for b in range(batch)]
    found = []
    for b, place in enumerate(places):
        pad = pads[b]
        lse_at = (slice(None), place) if packed else place
        found.append((place, lse_at, queries[b], *(x[pad:] for x in old[b])))
    return Case("flash_attn_with_kvcache", arguments | meaning, found, meaning)


def _forget(x: torch.Tensor, arguments: dict[str, Any], b: int, pad: int, page_size: int) -> None:
    """NaN in the first `pad` slots of sequence b's cache."""
    j = torch.arange(pad)
    rows = arguments.get("cache_batch_idx")
    row = b if rows is None else int(rows[b])
    if page_size:
        x[arguments["block_table"][row].cpu()[j // page_size].long(), j % page_size] = float("nan")
    else:
        x[row, :pad] = float("nan")


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int, moving: bool, rotary: str
) -> torch.Tensor:
    """Rotation by definition, as complex numbers; x (tokens, heads, head_dim)."""
    at = (start + torch.arange(len(x), device=x.device) * moving).clamp(max=len(cos) - 1)
    turn = torch.complex(cos[at].double(), sin[at].double())[:, None]
    n = turn.shape[-1]
    one, two = (x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2])
    if rotary == "halves":
        one, two = x[..., :n], x[..., n : 2 * n]
    z = torch.complex(one.double(), two.double()) * turn
    parts = (z.real, z.imag)
    y = torch.cat(parts, -1) if rotary == "halves" else torch.stack(parts, -1).flatten(-2)
    return torch.cat([y.to(x.dtype), x[..., 2 * n :]], -1)
