"""The functions as operators of torch.library, for what looks at a call before it is made.

torch.compile, torch.export and modes such as the FLOP counter see `torch.ops.mini_flash_attention`.
A plain eager call does without them, which saves the CPU some microseconds. They exist once this
module is imported: a FLOP counter made before counts none of them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import execution
from .entries import DENSE, KVCACHE, VARLEN, Entry
from .problem import Problem, empty_out, shape_of_lse
from .recipes import Result
from .validate.backward import refuse

NAMESPACE = "mini_flash_attention"
SCORES = (
    "float? softmax_scale, bool causal, SymInt[] window_size, float softcap, Tensor? alibi_slopes, "
    "Tensor? s_aux, str? score_mod, Tensor[] score_mod_args, bool need_lse"
)
LENGTHS = (
    "Tensor? cu_seqlens_q, SymInt? max_seqlen_q, Tensor? cache_seqlens, SymInt? cache_seqlen, "
    "Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, SymInt num_splits, "
    "SymInt? fixed_split_size"
)
# Without defaults: a gradient is expected for each argument that was given.
TRAINING = "str? score_mod_bwd, bool deterministic, float dropout_p, Tensor? dropout_seed"
SCHEMAS = {
    "dense": f"Tensor q, Tensor k, Tensor v, {SCORES}, {TRAINING}",
    "varlen": (
        "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
        "SymInt? max_seqlen_q, SymInt? max_seqlen_k, Tensor? block_table, Tensor? seqused_k, "
        f"SymInt num_splits, {SCORES}, Tensor? seqused_q, "
        f"Tensor? max_seqlen_q_tensor, Tensor? max_seqlen_k_tensor, {TRAINING}"
    ),
    "kvcache": (
        f"Tensor q, Tensor k_cache, Tensor v_cache, {LENGTHS}, {SCORES}, *, "
        "Tensor? max_seqlen_q_tensor=None"
    ),
    "kvcache_append": (
        "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
        "Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, "
        f"{LENGTHS}, {SCORES}, *, Tensor? max_seqlen_q_tensor=None"
    ),
}
FUNCTIONS = ("score_mod", "score_mod_bwd")
LONGEST = ("max_seqlen_q", "max_seqlen_k")  # ints, or tensors that hold one
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# Operators take no functions: a score_mod goes by a name.
_score_mods: dict[str, Any] = {}


def name_of(score_mod: Any) -> str:
    """A name by which `score_mod` is found again in this process."""
    inner = getattr(score_mod, "fn", score_mod)
    name = f"{inner.__module__}.{inner.__qualname__}:{id(score_mod):x}"
    _score_mods[name] = score_mod
    return name


# What torch.compiler.assume_constant_result does, without the second that importing Dynamo takes.
name_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(entry: Entry, arguments: Mapping[str, Any]) -> Result:
    """(out, softmax_lse or None) of a call, through the operator for it.

    What a compiler traces is checked when it runs, with the lengths it runs with.
    """
    given = dict(arguments)
    others = (x for name, x in given.items() if name not in FUNCTIONS)
    tensors = [x for x in others if isinstance(x, torch.Tensor)]
    differentiated = torch.is_grad_enabled() and any(
        x.requires_grad for x in (*tensors, *given["score_mod_args"])
    )
    if differentiated:
        refuse(entry.function, given)
    if torch.compiler.is_compiling():
        if given["out"] is not None:
            v = given["v_cache" if "v_cache" in given else "v"]
            shape = (*given["q"].shape[:-1], v.shape[-1])
            if given["out"].shape != shape or given["out"].dtype != v.dtype:
                raise ValueError(f"{NAMESPACE}: out: expected shape {shape} in q's dtype")
    else:
        execution.validate(entry, given)
    out = given.pop("out")
    need_lse = given.pop(entry.wants_lse)
    given["need_lse"] = need_lse or differentiated
    given = simple(given)
    name = entry.name
    if name == "kvcache":  # no `is`: Dynamo of torch 2.9 copies a NamedTuple
        given["cache_seqlen"] = None
        if not isinstance(given["cache_seqlens"], torch.Tensor):
            given |= {"cache_seqlens": None, "cache_seqlen": given["cache_seqlens"]}
        if given["k"] is None:
            for extra in ("k", "v", "rotary_cos", "rotary_sin", "rotary_interleaved"):
                given.pop(extra)
        else:
            name = "kvcache_append"
    result, lse = getattr(torch.ops.mini_flash_attention, name)(**given)
    if out is not None:
        result = out.copy_(result)
    return result, lse if need_lse else None


def simple(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments as operators take them: lists, and functions by name."""
    given["window_size"] = [-1 if w is None else w for w in given["window_size"]]
    given["score_mod_args"] = list(given["score_mod_args"])
    for name in FUNCTIONS:
        if given.get(name) is not None:
            given[name] = name_of(given[name])
    if "dropout_p" in given:
        given = {"dropout_seed": None} | given
    for name in LONGEST:
        if name in given:
            late = isinstance(given[name], torch.Tensor)  # read when the operator runs
            given |= {f"{name}_tensor": given[name] if late else None}
            given[name] = None if late else given[name]
    return given


def arguments_of(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The public function's arguments from the operator's."""
    given = {**given, "window_size": tuple(given["window_size"])}
    given["score_mod_args"] = tuple(given["score_mod_args"])
    for function in FUNCTIONS:
        if given.get(function) is not None:
            given[function] = _score_mods[given[function]]
    for length in LONGEST:
        x = given.pop(f"{length}_tensor", None)
        if x is not None:
            given[length] = x
    if "dout" in given:
        return given | {"dq": None, "dk": None, "dv": None}
    given["out"] = None
    need_lse = given.pop("need_lse")
    if name in ("dense", "varlen"):
        return given | {"return_attn_probs": need_lse}
    number = given.pop("cache_seqlen")
    if number is not None:
        given["cache_seqlens"] = number
    nothing = dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin")) | {"rotary_interleaved": True}
    return nothing | given | {"return_softmax_lse": need_lse}


def define(
    entry: Entry, name: str, schema: str, results: int, compute: Any, fake: Any, products: int
) -> None:
    """An operator: what it does, what it makes of tensors without memory, and what that costs.

    compute, fake: functions of the operator's arguments by name. products: matrix products for
    each pair of a query and a key.
    """
    made = ", ".join(["Tensor"] * results)
    LIBRARY.define(f"{name}({schema}) -> ({made})", tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.mini_flash_attention, name).default
    signature = operator._schema.arguments
    order = [argument.name for argument in signature]
    defaults = {a.name: a.default_value for a in signature if a.has_default_value()}

    def by_name(function: Any) -> Any:
        def call(*values: Any, **named: Any) -> Any:
            return function(**{**defaults, **dict(zip(order, values, strict=False)), **named})

        return call

    def flops(out_val: Any = None, **given: Any) -> int:
        return _flops(entry.parse(**arguments_of(name, given))) * products // 2

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, by_name(compute), key)
    torch.library.register_fake(operator, by_name(fake), lib=LIBRARY)
    register_flop_formula(operator.overloadpacket, get_raw=True)(by_name(flops))


def _define_forward(entry: Entry, name: str, schema: str) -> None:
    def compute(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # In a graph that PyTorch records, memory is its own and none may be kept.
        out, lse = execution.run(entry, arguments_of(name, given), keep=False)
        return out, out.new_empty(0, dtype=torch.float32) if lse is None else lse

    def fake(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, v = given["q"], given[entry.tensors.get("v", "v")]
        shape = shape_of_lse(q) if given["need_lse"] else (0,)
        return empty_out(q, v.shape[-1]), q.new_empty(shape, dtype=torch.float32)

    define(entry, name, schema, 2, compute, fake, 2)


def _flops(p: Problem) -> int:
    """2 q kᵀ and 2 p v for each pair of a query and a key in use, masks left out of account."""
    queries, keys = [p.seqlen_q] * p.batch, [p.seqlen_k] * p.batch
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = p.lengths
    if cu_seqlens_q is not None:
        queries = cu_seqlens_q.diff().tolist() if seqused_q is None else seqused_q.tolist()
    if cu_seqlens_k is not None:
        keys = cu_seqlens_k.diff().tolist()
    if seqused_k is not None:
        new = queries if p.cache.appended < 0 else [p.cache.appended] * p.batch
        keys = [n + more for n, more in zip(seqused_k.tolist(), new, strict=True)]
    pairs = sum(n * m for n, m in zip(queries, keys, strict=True))
    return int(2 * p.q.shape[-2] * pairs * (p.q.shape[-1] + p.v.shape[-1]))


for _name, _schema in SCHEMAS.items():
    _define_forward({"dense": DENSE, "varlen": VARLEN}.get(_name, KVCACHE), _name, _schema)
