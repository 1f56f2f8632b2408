"""Random calls against the definition. A seed and a number describe a call wholly.

    python tests/fuzz.py --cases 2000 --jobs 12
    python tests/fuzz.py --seed 0 --case 17
    python tests/fuzz.py --backward

Memory that no sequence uses holds NaN, also around all that the package allocates, and must hold
the same bits after the call.
"""

import argparse
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from cases import Case, dense, kvcache, margined, varlen

import mini_flash_attention as mfa
from mini_flash_attention import plan, recipes, settings
from mini_flash_attention.kernels import workspace
from mini_flash_attention.plan import backward as planning

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU runs functions as they are
    triton = tl = None
if settings.INTERPRETED:
    import interpreter

    interpreter.hasten()

COMBINATIONS = 96  # case n has combination n % 96, so that a GPU compiles few variants
DECODING = 36  # these decode without any feature, the others are anything
MASKS = ("none", "causal", "left", "both", "right")
# The CPU takes what is small: the first five and the first nine. A page size of 0 is no paging.
HEAD_DIMS = (16, 40, 64, 64, 64, 80, 128, 128, 128, 192, 256)
PAGE_SIZES = (0, 0, 0, 1, 3, 16, 20, 48, 64, 128, 256)


def sparse(score, batch, head, q_idx, kv_idx, args):
    """A score_mod that reads numbers and cuts keys away: 4096 biases, -inf for some."""
    at = ((q_idx + 7 * kv_idx + 3 * head) % 4096 + 4096) % 4096
    bias = tl.load(args[0] + at)
    return tl.where(bias > 1.0, float("-inf"), score + bias)


def curved(score, batch, head, q_idx, kv_idx, args):
    """As above, and not a straight line."""
    at = ((q_idx + 7 * kv_idx + 3 * head) % 4096 + 4096) % 4096
    bias = tl.load(args[0] + at)
    return tl.where(bias > 1.0, float("-inf"), score + 3.0 * bias * tl.sigmoid(score))


def curved_backward(grad, score, batch, head, q_idx, kv_idx, args):
    at = ((q_idx + 7 * kv_idx + 3 * head) % 4096 + 4096) % 4096
    bias, s = tl.load(args[0] + at), tl.sigmoid(score)
    slope = 1.0 + 3.0 * bias * s * (1.0 - s)
    return tl.where(bias > 1.0, float("nan"), grad * slope)


if triton is not None:
    sparse, curved, curved_backward = map(triton.jit, (sparse, curved, curved_backward))


def features(
    combination: random.Random, r: random.Random, gpu: bool, nheads: int, batch: int,
    dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """What becomes of scores, in words of the reference; which, is the combination's."""
    g = torch.Generator().manual_seed(r.getrandbits(32))
    words: dict[str, Any] = {}
    chosen = combination.choice(("", "softcap", "alibi", "sinks", "mod", "softcap sinks alibi mod"))
    if "softcap" in chosen:
        words["softcap"] = r.choice((0.5, 15.0, 50.0))
    if "alibi" in chosen:
        shape = (batch, nheads) if combination.random() < 0.5 else (nheads,)
        words["alibi_slopes"] = torch.rand(shape, generator=g)
    if "sinks" in chosen:
        sink = 3 * torch.randn(nheads, generator=g)
        words["s_aux"] = sink.to(dtype) if combination.random() < 0.5 else sink
    if "mod" in chosen:
        words |= {"score_mod": sparse, "score_mod_args": (torch.randn(4096, generator=g),)}
    return words


def build(seed: int, number: int, gpu: bool) -> tuple[Case, dict[str, Any]]:
    """The case, in the CPU's memory, and what was drawn for it."""
    # What kernels are compiled for comes from c, which many cases share; r draws the rest.
    c = random.Random(f"{seed} {gpu} {number % COMBINATIONS}")
    dtype = c.choice((torch.float16, torch.bfloat16 if gpu else torch.float32))
    head_dim = c.choice(HEAD_DIMS[: 11 if gpu else 5])
    page_size = c.choice(PAGE_SIZES[: 11 if gpu else 9])
    mask, lse, shares = c.choice(MASKS), c.random() < 0.5, c.random() < 0.3
    r = random.Random(f"{seed} {gpu} case {number}")
    batch = 70 if gpu and r.random() < 0.05 else r.randint(1, 12 if gpu else 3)
    # Several queries first: they need the most variants, and the last should not take longest.
    seqlen_q = r.randint(2, 16 if gpu else 6) if number % COMBINATIONS < 11 else 1
    nheads_k = r.choice((1, 2, 5) if gpu else (1, 2))
    if head_dim % 16:  # else some heads make strides multiples of 16, which compiles anew
        nheads_k = 2
    longest = int(((300 if batch == 70 else 3000) if gpu else 60) ** r.random() ** 0.5)
    appended = r.choice((0, 0, 0, 1, 1, 2, 9))
    if page_size and r.random() < 0.5:
        longest += -(longest + appended) % page_size
    left, right = int((longest + 2) ** r.random()) - 1, r.randint(0, seqlen_q)
    windows = {"left": (left, 0), "both": (left, right), "right": (-1, right)}
    words: dict[str, Any] = {
        "seed": r.getrandbits(32),
        "seqlen_q": seqlen_q,
        "lengths": [r.choice((0, longest, *[r.randint(1, longest)] * 8)) for _ in range(batch)],
        "appended": appended,
        "page_size": page_size,
        "nheads": nheads_k * r.choice((1, 2, 3, 4, 7, 8, 16)),
        "nheads_k": nheads_k,
        "head_dim": head_dim,
        "dtype": dtype,
        "num_splits": r.choice((0, 0, 0, 0, 0, 0, 1, 2, 5, *((17, 128) if gpu else ()))),
        "causal": mask in ("causal", "left"),
        "window_size": windows.get(mask, (-1, -1)),
    }
    kind, more = "decode", {}
    if number % COMBINATIONS >= DECODING:
        f = random.Random(f"{seed} {gpu} features {number % COMBINATIONS}")
        kind = f.choice(("decode", "decode", "packed", "packed", "varlen", "varlen", "dense"))
        more = features(f, r, gpu, words["nheads"], batch, dtype)
        if f.random() < 0.3:
            more["head_dim_v"] = f.choice(HEAD_DIMS[: 11 if gpu else 5])
        if f.random() < 0.3 and "score_mod" not in more:
            more["leftpad"] = kind in ("decode", "packed")
        if f.random() < 0.3:
            more["rows"] = kind in ("decode", "packed")
            more["used_q"] = kind == "varlen"
        rotary = f.choice(("", "pairs", "halves"))
        if rotary and head_dim >= 16 and kind in ("decode", "packed"):
            more["rotary"], words["appended"] = rotary, max(1, appended)
    words |= more
    hopper, room = c.random() < 0.5, r.choice((0, 0, 1, 1, 300))
    if kind in ("varlen", "dense"):
        case = prefill(kind, words, r, gpu)
        words |= {"lse": lse, "shares": shares, "kind": kind, "hopper": hopper}
        return case, words | {"own_out": r.random() < 0.4}
    if kind == "packed":
        most = (200 if c.random() < 0.5 else 16) if gpu else 9
        words["seqlen_q"] = [r.choice((0, *[r.randint(1, most)] * 8)) for _ in range(batch)]
        longest_q = max(words["seqlen_q"])
        if not longest_q:
            words["seqlen_q"][0] = longest_q = 1
        words["appended"] = int(words["appended"] > 0)
        appended = longest_q * words["appended"]
    else:
        appended = words["appended"]
    words.pop("used_q", None)
    case = kvcache(**words, device="cpu")
    case.arguments["return_softmax_lse"] = lse
    if not words["num_splits"] and r.random() < 0.1:
        # Of a key each, the parts of many queries in a large cache fill the GPU's memory.
        case.arguments["fixed_split_size"] = r.choice(
            (400, 200, 1000) if kind == "packed" else (1, 200, 1000)
        )
    if page_size:
        new = words["seqlen_q"] if kind == "packed" and appended else [appended] * batch
        case.arguments["block_table"] = with_junk(case.arguments, torch.tensor(new), room)
    elif not room and kind == "decode":  # the longest sequence fills the cache
        full = max(words["lengths"]) + appended
        case.arguments |= {x: case.arguments[x][:, :full] for x in ("k_cache", "v_cache")}
    size = case.arguments.get("fixed_split_size")
    words |= {"lse": lse, "shares": shares, "room": room, "fixed_split_size": size}
    words |= {"kind": kind, "hopper": hopper}
    return case, words | {"own_out": r.random() < 0.4}


def prefill(kind: str, words: dict[str, Any], r: random.Random, gpu: bool) -> Case:
    """A call of one of the other two functions; words of `build` that don't concern it are left."""
    most = (400 if gpu else 40) ** r.random()
    keep = ("leftpad", "rows", "rotary", "appended", "lengths", "seqlen_q")
    given = {name: x for name, x in words.items() if name not in keep}
    splits, page_size = given.pop("num_splits"), given.pop("page_size")
    words["appended"] = 0
    if kind == "dense":
        given.pop("used_q", None)
        batch = min(3, len(words["lengths"]))
        sizes = {"seqlen_q": int(most) + r.randint(0, 9), "seqlen_k": r.choice(words["lengths"])}
        for name in ("alibi_slopes",):
            if given.get(name) is not None and given[name].dim() == 2:
                given[name] = given[name][:batch]
        return dense(**given, **sizes, batch=batch, device="cpu")
    lengths = [r.choice((0, *[r.randint(1, int(most) + 1)] * 9)) for _ in words["lengths"]]
    case = varlen(**given, lengths_q=lengths, lengths_k=words["lengths"], page_size=page_size,
                  device="cpu")  # fmt: skip
    case.arguments["num_splits"] = splits
    return case


def build_backward(seed: int, number: int, gpu: bool) -> tuple[Case, dict[str, Any]]:
    """A call that has gradients, as `build` makes calls."""
    c = random.Random(f"backward {seed} {gpu} {number % COMBINATIONS}")
    dtype = c.choice((torch.float16, torch.bfloat16 if gpu else torch.float32))
    head_dims = HEAD_DIMS[: 11 if gpu else 8]
    head_dim, head_dim_v = c.choice(head_dims), c.choice((0, 0, 0, c.choice(head_dims)))
    kind, mask, dlse = c.choice(("dense", "varlen")), c.choice(MASKS), c.random() < 0.5
    used = [c.random() < 0.3 for _ in "qk"]
    r = random.Random(f"backward {seed} {gpu} case {number}")
    batch = r.randint(1, 12 if gpu else 3)
    nheads_k = 2 if head_dim % 16 or head_dim_v % 16 else r.choice((1, 2, 5) if gpu else (1, 2))
    nheads = nheads_k * r.choice((1, 1, 2, 3, 4, *((7, 8) if gpu else ())))
    most = (2000 if gpu else 80) ** r.random()
    lengths = [
        [r.choice((0, *[r.randint(1, int(most) + 9)] * 8)) for _ in range(batch)] for _ in "qk"
    ]
    if r.random() < 0.3:
        lengths[1] = lengths[0]
    left, right = int(most ** r.random()) - 1, r.randint(0, int(most))
    windows = {"left": (left, 0), "both": (left, right), "right": (-1, right)}
    words: dict[str, Any] = {
        "seed": r.getrandbits(32),
        "nheads": nheads,
        "nheads_k": nheads_k,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "dtype": dtype,
        "causal": mask in ("causal", "left"),
        "window_size": windows.get(mask, (-1, -1)),
        "softmax_scale": r.choice((None, None, None, None, 0.3, -0.5, 0.0)),
    }
    words |= features(c, r, gpu, nheads, batch, dtype)
    if "score_mod" in words:
        words |= {"score_mod": curved, "score_mod_bwd": curved_backward}
    if kind == "dense":
        words |= {"batch": batch, "seqlen_q": lengths[0][0], "seqlen_k": lengths[1][0]}
        case = dense(**words, device="cpu")
    else:
        words |= {"lengths_q": lengths[0], "lengths_k": lengths[1]}
        words |= {"used_q": used[0], "used_k": used[1], "padding": r.choice((0, 1, 70))}
        if r.random() < 0.2:
            words["longest"] = (r.randint(0, int(most)), r.randint(0, int(most)))
        case = varlen(**words, page_size=0, device="cpu")
    words |= {"kind": kind, "dlse": dlse, "own": r.random() < 0.4}
    return case, words | {"blocks": c.choice(((16, 32), (32, 16), (64, 64)))}


def with_junk(arguments: dict[str, Any], appended: torch.Tensor, room: int) -> torch.Tensor:
    """The block table and `room` columns, unused entries: no page, one of NaN, another's."""
    table, cache = arguments["block_table"], arguments["k_cache"]
    pages = -(-(arguments["cache_seqlens"] + appended) // cache.shape[1])
    if "cache_batch_idx" in arguments:
        of_rows = torch.zeros(len(table), dtype=pages.dtype)
        of_rows[arguments["cache_batch_idx"].long()] = pages
        pages = of_rows
    empty = cache.isnan().flatten(1).all(1).nonzero().flatten().tolist()
    junk = torch.tensor([-1, -(2**31), 2**31 - 1, len(cache), *empty[:3], *range(len(cache))[:3]])
    g = torch.Generator().manual_seed(int(pages.sum()))
    wide = junk[torch.randint(len(junk), (len(table), table.shape[1] + room), generator=g)].int()
    used = torch.arange(table.shape[1]) < pages[:, None]
    wide[:, : table.shape[1]] = table.where(used, wide[:, : table.shape[1]])
    return wide[:, : max(1, int(pages.max())) + room]


def bits(x: torch.Tensor) -> torch.Tensor:
    """All memory behind x, as integers."""
    dtype = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return torch.empty(0, dtype=dtype, device=x.device).set_(x.untyped_storage())


def copied(x: Any, device: str) -> Any:
    """x with all memory behind it."""
    if isinstance(x, tuple):
        return tuple(copied(y, device) for y in x)
    if not isinstance(x, torch.Tensor):
        return x
    storage = bits(x).to(device, copy=True).untyped_storage()
    empty = torch.empty(0, dtype=x.dtype, device=device)
    return empty.set_(storage, x.storage_offset(), x.shape, x.stride())


@contextmanager
def poisoned() -> Iterator[list[torch.Tensor]]:
    """What is allocated inside: numbers are NaN between margins of NaN, integers are 2**30."""
    made = []

    def allocate(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        x = original(*args, **kwargs)
        if x.is_meta or not x.is_floating_point():
            return x if x.is_meta else x.fill_(2**30)
        made.append(margined(tuple(x.shape), x.dtype, str(x.device)))
        return made[-1]

    empty, empty_like = partial(allocate, torch.empty), partial(allocate, torch.empty_like)
    with patch.object(torch, "empty", empty), patch.object(torch, "empty_like", empty_like):
        yield made


def call(case: Case, words: dict[str, Any], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, LSE) of the call on copies of its tensors. Only caches may change, by what is appended.

    An LSE that is not asked for is the right one.
    """
    given = {name: copied(x, device) for name, x in case.arguments.items()}
    q, lse, decodes = given["q"], None, case.function == "flash_attn_with_kvcache"
    wanted = (*q.shape[:-1], given["v_cache" if decodes else "v"].shape[-1])
    if words["own_out"]:
        *outer, tokens, nheads, head_dim = wanted
        shape = (*(n + 2 for n in outer), tokens + 1, nheads + 2, head_dim + 16)
        around = torch.full(shape, float("nan"), dtype=q.dtype, device=device)
        given["out"] = around[(*[slice(1, -1)] * len(outer), slice(1, None))]
        given["out"] = given["out"][..., :nheads, :head_dim]
    case.meaning |= {name: given[name] for name in case.meaning if name in given}
    if not decodes:
        given["return_attn_probs"] = words["lse"]
    with poisoned() as made:
        out = getattr(mfa, case.function)(**given)
    if words["lse"]:
        out, lse = out[:2]
    given.pop("return_attn_probs", None)
    assert out is given.pop("out", out), "out is not the caller's"
    assert out.dtype is q.dtype and out.shape == wanted, f"out is {out.dtype} {out.shape}"
    if lse is None:
        shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (len(q), q.shape[2], q.shape[1])
        lse = torch.full(shape, float("-inf"), device=device)
        for b, (_, lse_at, *_) in enumerate(case.rows):
            lse[lse_at] = case.oracle(b)[1].float()
    result = out.clone(), lse.float().clone()
    for x in (*made, out):
        memory = bits(x.fill_(float("nan")))
        assert (memory == memory[0]).all(), f"written outside a result of shape {tuple(x.shape)}"
    after = {name: copied(x, "cpu") for name, x in case.arguments.items()}
    for b, n in enumerate(words["lengths"] if words["appended"] else ()):
        new = words["seqlen_q"][b] if words["kind"] == "packed" else words["appended"]
        j = torch.arange(n, n + new)
        rows = after.get("cache_batch_idx")
        row = b if rows is None else int(rows[b])
        at = (torch.full_like(j, row), j)
        if words["page_size"]:
            page = after["block_table"][row, j // words["page_size"]].long()
            at = (page, j % words["page_size"])
        for name, x in zip(("k_cache", "v_cache"), case.rows[b][3:], strict=True):
            after[name][at] = x[len(x) - new :].cpu()
    for name, x in given.items():
        # The rotation is rounded in another order than the definition's.
        close = name == "k_cache" and words.get("rotary")
        same = not isinstance(x, torch.Tensor) or (
            near(copied(x, "cpu"), after[name])
            if close
            else torch.equal(bits(x).cpu(), bits(after[name]))
        )
        assert same, f"{name}: changed, or not as keys should be appended"
    return result


def call_backward(case: Case, words: dict[str, Any], device: str) -> None:
    """Differentiate the call on copies of its tensors, none of which may change."""
    dout, dlse = (x.to(device) for x in case.dresults(words["seed"] % 1000))
    dresults = (dout, dlse) if words["dlse"] else (dout,)
    given = {name: copied(x, device) for name, x in case.arguments.items()}
    case.meaning |= {name: given[name] for name in case.meaning if name in given}
    out, lse, _ = getattr(mfa, case.function)(**given, return_attn_probs=True)
    own = {name: x for name, x in given.items() if name != "s_aux"}
    for name in "qkv" if words["own"] else "":
        *outer, tokens, heads, head_dim = given[name].shape
        shape = (*(n + 2 for n in outer), tokens + 1, heads + 2, head_dim + 16)
        around = torch.full(shape, float("nan"), dtype=dout.dtype, device=device)
        around = around[(*[slice(1, -1)] * len(outer), slice(1, None))]
        own[f"d{name}"] = around[..., :heads, :head_dim]
    with poisoned() as made:
        found = mfa.backward(
            dout, out=out, softmax_lse=lse, dsoftmax_lse=dlse if words["dlse"] else None, **own
        )
    results = {name: x.clone() for name, x in zip("qkv", found, strict=True)}
    for x in (*made, *found):
        memory = bits(x.fill_(float("nan")))
        assert (memory == memory[0]).all(), f"written outside a result of shape {tuple(x.shape)}"
    for name, x in given.items():
        same = not isinstance(x, torch.Tensor) or torch.equal(
            bits(x).cpu(), bits(copied(case.arguments[name], "cpu"))
        )
        assert same, f"{name}: changed"
    case.arguments = given
    case.check_gradients(results, *dresults)
    if not settings.INTERPRETED or "s_aux" in given:  # as autograd calls it
        again = case.differentiate(*dresults)
        assert all(torch.equal(results[name], again[name]) for name in "qkv"), "other bits"
        case.check_gradients(again, *dresults)


def near(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Equal but for the last digits, NaN where the other is, and the memory around alike."""
    same = torch.isclose(x.float(), y.float(), rtol=0.02, atol=0.02, equal_nan=True).all()
    around = [bits(copied(z, "cpu").zero_()) for z in (x, y)]
    return bool(same) and torch.equal(*around)


def narrowed(
    choose: Callable[..., tuple[plan.configs.Tiles, ...]], *words: Any
) -> tuple[plan.configs.Tiles, ...]:
    """The tiles chosen, of 16 keys."""
    return tuple(tiles._replace(block_n=16) for tiles in choose(*words))


def check(seed: int, number: int, device: str) -> None:
    """Make the call. If it is wrong, the error begins with the line that makes it again."""
    words: dict[str, Any] = {}
    try:
        case, words = build(seed, number, device == "cuda")
        case.rows = [(*row[:2], *(x.to(device) for x in row[2:])) for row in case.rows]
        work = 0 if words["shares"] else plan.decode.STREAM_K_WORK
        with ExitStack() as stack:
            stack.enter_context(patch.object(plan.decode, "STREAM_K_WORK", work))
            stack.enter_context(patch.object(plan.decode, "WAVES_WORK", work))
            if words["hopper"]:
                stack.enter_context(patch.object(plan.hopper, "HOPPER_FLOPS", 0))
                stack.enter_context(patch.object(plan.decode, "SPLIT_KEYS", 0))
            stack.enter_context(patch.object(recipes, "_recipes", {}))
            stack.enter_context(patch.object(workspace, "MAX_KEPT", 1))  # margins around parts
            stack.enter_context(patch.object(workspace, "_rooms", {}))
            if device == "cpu":  # the interpreter's few keys, in many tiles
                few = partial(narrowed, plan.decode.decode_tiles)
                stack.enter_context(patch.object(plan.decode, "decode_tiles", few))
            out, lse = call(case, words, device)
            case.check(out, lse)
            assert not lse.isnan().any(), "NaN in the LSE"
            if not settings.INTERPRETED:  # now as its recipe and the launchers kept it
                for x, y in zip((out, lse), call(case, words, device), strict=True):
                    assert torch.equal(x, y), "other bits when called again"
    except Exception as error:
        line = f"python tests/fuzz.py --seed {seed} --case {number} --device {device}"
        line = f"TRITON_INTERPRET=1 {line}" if settings.INTERPRETED else line
        raise AssertionError(f"{line}\n  {error!r}\n  {words}") from error


def check_backward(seed: int, number: int, device: str) -> None:
    """`check` for gradients."""
    words: dict[str, Any] = {}
    try:
        case, words = build_backward(seed, number, device == "cuda")
        case.rows = [(*row[:2], *(x.to(device) for x in row[2:])) for row in case.rows]
        with ExitStack() as stack:
            if device == "cpu":  # the interpreter's few tokens, in many blocks
                few = plan.configs.Tiles(*words["blocks"], 4, 1)
                choice = planning.Choice(few, few)
                stack.enter_context(patch.object(planning, "TILES", {}))
                stack.enter_context(
                    patch.object(planning, "SMALL", dict.fromkeys((64, 128, 256), choice))
                )
            stack.enter_context(patch.object(recipes, "_recipes", {}))
            stack.enter_context(patch.object(workspace, "MAX_KEPT", 1))
            stack.enter_context(patch.object(workspace, "_rooms", {}))
            call_backward(case, words, device)
    except Exception as error:
        line = f"python tests/fuzz.py --backward --seed {seed} --case {number} --device {device}"
        line = f"TRITON_INTERPRET=1 {line}" if settings.INTERPRETED else line
        raise AssertionError(f"{line}\n  {error!r}\n  {words}") from error


def check_all(
    numbers: range, seed: int, device: str, backward: bool = False
) -> tuple[int, list[str]]:
    """How many cases were checked, and what failed. After a GPU's fault no more can be."""
    failures: list[str] = []
    for done, number in enumerate(numbers, 1):
        try:
            (check_backward if backward else check)(seed, number, device)
        except AssertionError as error:
            failures.append(str(error))
            if "CUDA error" in failures[-1] or "[CUDA]" in failures[-1]:
                return done, failures
        if device == "cuda" and torch.cuda.memory_reserved() > 2 << 30:
            torch.cuda.empty_cache()  # other processes share the GPU
    return len(numbers), failures


def main(argv: list[str] | None = None) -> int:
    """Check the cases asked for, print what failed, and return 1 if anything did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case alone")
    parser.add_argument("--cases", type=int, default=100, help="how many (100)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is a GPU")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    parser.add_argument("--backward", action="store_true", help="gradients instead")
    asked = parser.parse_args(argv)
    parts = [range(i, asked.cases, COMBINATIONS) for i in range(min(COMBINATIONS, asked.cases))]
    if asked.case is not None:
        parts = [range(asked.case, asked.case + 1)]
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    work = partial(check_all, seed=asked.seed, device=device, backward=asked.backward)
    began, cases, failed = time.monotonic(), 0, 0
    with ExitStack() as stack:
        results: Iterator[tuple[int, list[str]]] = map(work, parts)
        if asked.jobs > 1:  # each on one thread; a combination's variants are compiled by one
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(asked.jobs, torch.set_num_threads, (1,)))
            results = pool.imap_unordered(work, parts)
        for done, failures in results:
            cases, failed = cases + done, failed + len(failures)
            print(*failures, sep="\n", end="\n" * bool(failures), flush=True)
            seconds = time.monotonic() - began
            print(f"{cases} of {asked.cases} cases, {seconds:.0f} s", file=sys.stderr, flush=True)
    print(f"{cases} cases, {failed} failures, {time.monotonic() - began:.1f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
