"""Random calls of the three functions, and what the definition says they must give.

A case is built from a seed and a few words, so a failure is reproduced by one line. Every slot
that no sequence uses holds NaN, and every output lies between margins of NaN.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import mini_flash_attention as mfa
from mini_flash_attention import reference, triton_on_cpu

MARGIN = 512
FLOAT32_EPS = torch.finfo(torch.float32).eps


@dataclass
class Case:
    """A call, ready to be made as often as wanted, and its oracle."""

    function: str
    arguments: dict[str, Any]
    rows: list[tuple[Any, Any, torch.Tensor, torch.Tensor, torch.Tensor]]
    """(index into out, index into lse, q, k, v) of each sequence."""
    meaning: dict[str, Any] = field(default_factory=dict)
    """softmax_scale, causal, window_size and the rest as the reference takes them."""
    keys: list[Any] = field(default_factory=list)
    """Index into k and v of each sequence, where these are no pages and no cache."""

    def run(self, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = self.arguments | changes
        if self.function == "flash_attn_with_kvcache":
            return mfa.flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
        out, lse, _ = getattr(mfa, self.function)(**arguments, return_attn_probs=True)
        return out, lse

    def oracle(self, b: int, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the definition gives for sequence b."""
        meaning = self.meaning_of(b) | more
        meaning.pop("score_mod_bwd", None)
        return reference.attention(*self.rows[b][2:], **meaning)

    def meaning_of(self, b: int) -> dict[str, Any]:
        """What the reference is told about sequence b."""
        meaning = dict(self.meaning)
        slopes = meaning.get("alibi_slopes")
        if slopes is not None and slopes.dim() == 2:
            meaning["alibi_slopes"] = slopes[b]
        aux = meaning.pop("score_mod_args", ())
        for name in ("score_mod", "score_mod_bwd"):
            if meaning.get(name) is not None:
                meaning |= {name: partial(_on_tensors, meaning[name], aux), "batch": b}
        return meaning

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

    def dresults(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of out and LSE: NaN in rows of no sequence."""
        g, q = torch.Generator().manual_seed(seed), self.arguments["q"]
        shape = (*q.shape[:-1], self.arguments["v"].shape[-1])
        lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
        device = str(q.device)
        drawn = (
            randn(g, *shape, dtype=q.dtype, device=device),
            randn(g, *lse_shape, dtype=torch.float32, device=device),
        )
        dout, dlse = (torch.full_like(x, float("nan")) for x in drawn)
        for at, lse_at, *_ in self.rows:
            dout[at], dlse[lse_at] = drawn[0][at], drawn[1][lse_at]
        return dout, dlse

    def differentiate(self, *dresults: torch.Tensor, **changes: Any) -> dict[str, torch.Tensor]:
        """The gradients of q, k, v and s_aux through autograd, for that of out, or out and LSE."""
        given = self.arguments | changes
        names = [name for name in ("q", "k", "v", "s_aux") if given.get(name) is not None]
        leaves = [given[name].detach().requires_grad_() for name in names]
        results = self.run(**changes | dict(zip(names, leaves, strict=True)))
        gradients = torch.autograd.grad(results[: len(dresults)], leaves, dresults)
        return dict(zip(names, gradients, strict=True))

    def backward(self, dout: torch.Tensor, dlse: torch.Tensor | None = None) -> dict[str, Any]:
        """The gradients of q, k and v, of which `backward` writes nothing around."""
        out, lse = self.run()
        given = dict(self.arguments)
        for name in ("s_aux", "num_splits"):
            given.pop(name, None)
        tensors = [given[name] for name in "qkv"]
        buffers = [margined(tuple(x.shape), x.dtype, str(x.device)) for x in tensors]
        into = dict(zip(("dq", "dk", "dv"), buffers, strict=True))
        found = mfa.backward(dout, out=out, softmax_lse=lse, dsoftmax_lse=dlse, **given, **into)
        assert all(x is y and margins_intact(y) for x, y in zip(found, buffers, strict=True))
        return dict(zip("qkv", buffers, strict=True))

    def check_gradients(
        self, found: dict[str, torch.Tensor], dout: torch.Tensor, dlse: torch.Tensor | None = None
    ) -> None:
        """Within the promise, in each sequence; exactly 0 in the rows that none uses."""
        nobody = {name: torch.ones_like(found[name], dtype=torch.bool) for name in "qkv"}
        refs = [self._gradients(b, dout, dlse) for b in range(len(self.rows))]
        errors, sink_error = self._errors_of_plain(dout, dlse)
        dtype, sink_slack = self.arguments["q"].dtype, 0.0
        for b, (at, _, q, k, v) in enumerate(self.rows):
            # What sums in fp32 cost: scores, which weights are made of, and dP and delta.
            scale = self.meaning.get("softmax_scale")
            scale = abs(q.shape[-1] ** -0.5 if scale is None else scale)
            unit = FLOAT32_EPS * (8 + scale * _largest(_products(q.abs(), k.abs())))
            dp = unit * _largest(_products(dout[at], v))
            slack = (dp * scale * _largest(k), dp * scale * _largest(q), unit * _largest(dout[at]))
            sink_slack += dp * q.shape[0] ** 0.5
            for n, (name, place) in enumerate(zip("qkv", (at, *[self.keys[b]] * 2), strict=True)):
                nobody[name][place] = False
                what = f"d{name} of sequence {b}"
                kept(what, found[name][place], refs[b][n], dtype, errors[b][n], slack[n])
        for name, rows in nobody.items():
            assert not found[name][rows].any(), f"d{name}: rows of no sequence are not 0"
        if "s_aux" in found:
            ref = sum((x[3] for x in refs), torch.zeros_like(found["s_aux"]).double())
            kept("ds_aux", found["s_aux"], ref, dtype, sink_error, sink_slack)

    def _gradients(
        self, b: int, dout: torch.Tensor, dlse: torch.Tensor | None,
        dtype: torch.dtype = torch.float64,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """What the definition gives for sequence b."""
        at, lse_at, *tensors = self.rows[b]
        dlse = None if dlse is None else dlse[lse_at]
        return reference.gradients(*tensors, dout[at], dlse, **self.meaning_of(b), dtype=dtype)

    def _errors_of_plain(
        self, dout: torch.Tensor, dlse: torch.Tensor | None
    ) -> tuple[list[list[float]], float]:
        """How wrong the definition is in the input's precision: dq, dk and dv of each sequence, and
        the sinks' gradient.

        A few numbers may be right by luck, or a row's, which have one dS. Of these the largest
        error in eight draws of dO's signs counts.
        """
        g, dtype = torch.Generator().manual_seed(0), self.arguments["q"].dtype
        few = any(0 < q.shape[0] * q.shape[1] < 64 for _, _, q, *_ in self.rows)
        errors, sink_error = [[0.0] * 3 for _ in self.rows], 0.0
        for draw in range(8 if few or "s_aux" in self.meaning else 1):
            if draw:
                dout = dout * _signs(g, dout)
                dlse = None if dlse is None else dlse * _signs(g, dlse)
            of_sinks = torch.zeros((), dtype=torch.float64, device=dout.device)
            for b in range(len(self.rows)):
                refs, plain = (self._gradients(b, dout, dlse, x) for x in (torch.float64, dtype))
                apart = [
                    None if x is None else x.double() - y for x, y in zip(plain, refs, strict=True)
                ]
                errors[b] = [max(x, _largest(y)) for x, y in zip(errors[b], apart[:3], strict=True)]
                of_sinks = of_sinks if apart[3] is None else of_sinks + apart[3]
            sink_error = max(sink_error, _largest(of_sinks))
        return errors, sink_error


def _signs(g: torch.Generator, x: torch.Tensor) -> torch.Tensor:
    return torch.randint(2, x.shape, generator=g).to(x.dtype).to(x.device) * 2 - 1


def _products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of all rows of all heads, in float64."""
    return x.flatten(0, 1).double() @ y.flatten(0, 1).double().mT


def _on_tensors(function: Any, aux: tuple[torch.Tensor, ...], *given: Any) -> torch.Tensor:
    """A score_mod or its gradient, as the reference calls it."""
    there = tuple(x.to(given[0].device) for x in aux)
    return triton_on_cpu.call(function, *given, *([there] if aux else []))


def kept(
    what: str, x: torch.Tensor, ref: torch.Tensor, dtype: torch.dtype, plain: float, slack: float
) -> None:
    """Hold x to the promise. plain: the error in the input's precision, dtype.

    slack: what fp32 costs. It is little, but in dtype a difference may happen to be exactly 0.
    """
    error = _largest(x.double() - ref)
    promise = 2 * plain + 2 * rounding(ref, dtype) + slack
    assert math.isfinite(promise), f"{what}: the input's precision does not reach so far"
    assert error <= promise, f"{what}: error {error:.3g} over {promise:.3g}"


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
    arguments = {"q": q, "k": k, "v": v} | meaning
    return Case("flash_attn_func", arguments, rows, meaning, list(range(batch)))


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
    head_dim_v: int = 0, used_q: bool = False, used_k: bool = False,
    longest: tuple[int, int] | None = None, **meaning: Any,
) -> Case:  # fmt: skip
    """used_q, used_k: the last queries or keys of some sequences are not in use, and hold NaN.

    longest: max_seqlen_q and max_seqlen_k; nor are tokens past them.
    """
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
    if used_k:
        lengths_k = [int(torch.randint(n + 1, (), generator=g)) for n in lengths_k]
        arguments["seqused_k"] = torch.tensor(lengths_k).int().to(device)
    if longest is not None:
        arguments |= {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
        lengths_q = [min(n, longest[0]) for n in lengths_q]
        lengths_k = [min(n, longest[1]) for n in lengths_k]
    places = [slice(start, start + n) for start, n in zip(cu_k.tolist(), lengths_k, strict=False)]
    if used_k or longest is not None:
        keys = [(k_b[:n], v_b[:n]) for (k_b, v_b), n in zip(keys, lengths_k, strict=True)]
        for place, end in zip(places, cu_k.tolist()[1:], strict=True):
            k[place.stop : end] = v[place.stop : end] = float("nan")
    rows = []
    for b, (k_b, v_b) in enumerate(keys):
        mine = slice(starts[b], starts[b] + lengths_q[b])
        q[mine.stop : starts[b + 1]] = float("nan")
        rows.append((mine, (slice(None), mine), q[mine], k_b, v_b))
    return Case("flash_attn_varlen_func", arguments, rows, meaning, [] if page_size else places)


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
