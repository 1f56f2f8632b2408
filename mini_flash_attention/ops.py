"""The functions as operators of torch.library, for what looks at a call before it is made.

torch.compile, torch.export and modes such as the FLOP counter see `torch.ops.mini_flash_attention`.
A plain eager call does without them, which saves the CPU some microseconds. They exist once this
module is imported: a FLOP counter made before counts none of them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import execution, execution_backward
from .entries import DENSE, DENSE_BACKWARD, KVCACHE, VARLEN, VARLEN_BACKWARD, Entry
from .execution_backward import Gradients, readable, sink_gradient
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
_GIVEN = (
    "Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor dout, "
    "Tensor? dsoftmax_lse, float? softmax_scale, bool causal, SymInt[] window_size, "
    "float softcap, Tensor? alibi_slopes, bool deterministic, str? score_mod, "
    "Tensor[] score_mod_args, str? score_mod_bwd, float dropout_p, Tensor? dropout_seed"
)
BACKWARD = {
    "dense_backward": _GIVEN,
    "varlen_backward": (
        f"{_GIVEN}, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt? max_seqlen_q, "
        "SymInt? max_seqlen_k, Tensor? seqused_q, Tensor? seqused_k, *, "
        "Tensor? max_seqlen_q_tensor=None, Tensor? max_seqlen_k_tensor=None"
    ),
}
RESULTS = ("dq", "dk", "dv")
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
    given = _simple(given)
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


def run_backward(entry: Entry, arguments: Mapping[str, Any]) -> Gradients:
    """The gradients of a call, through the operator for them."""
    given = dict(arguments)
    results = [given.pop(name) for name in RESULTS]
    operator = getattr(torch.ops.mini_flash_attention, entry.name)
    gradients = operator(**_simple(given))
    made = (x if out is None else out.copy_(x) for x, out in zip(gradients, results, strict=False))
    dq, dk, dv = made
    return Gradients(dq, dk, dv, gradients[3])


def _simple(given: dict[str, Any]) -> dict[str, Any]:
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


def _arguments(name: str, given: dict[str, Any]) -> dict[str, Any]:
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
    if name in BACKWARD:
        return given | dict.fromkeys(RESULTS)
    given["out"] = None
    need_lse = given.pop("need_lse")
    if name in ("dense", "varlen"):
        return given | {"return_attn_probs": need_lse}
    number = given.pop("cache_seqlen")
    if number is not None:
        given["cache_seqlens"] = number
    nothing = dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin")) | {"rotary_interleaved": True}
    return nothing | given | {"return_softmax_lse": need_lse}


def _define(entry: Entry, name: str, schema: str, results: int, compute: Any, fake: Any) -> Any:
    """An operator: what it does, what it makes of tensors without memory, and what that costs.

    compute, fake: functions of the operator's arguments by name.
    """
    made = ", ".join(["Tensor"] * results)
    LIBRARY.define(f"{name}({schema}) -> ({made})", tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.mini_flash_attention, name).default
    signature = operator._schema.arguments
    order = [argument.name for argument in signature]
    defaults = {a.name: a.default_value for a in signature if a.has_default_value()}
    products = 5 if name in BACKWARD else 2

    def by_name(function: Any) -> Any:
        def call(*values: Any, **named: Any) -> Any:
            return function(**{**defaults, **dict(zip(order, values, strict=False)), **named})

        return call

    def flops(out_val: Any = None, **given: Any) -> int:
        """2 products forward, 5 backward."""
        return _flops(entry.parse(**_arguments(name, given))) * products // 2

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, by_name(compute), key)
    torch.library.register_fake(operator, by_name(fake), lib=LIBRARY)
    register_flop_formula(operator.overloadpacket, get_raw=True)(by_name(flops))
    return operator


def _define_forward(entry: Entry, name: str, schema: str) -> None:
    def compute(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # In a graph that PyTorch records, memory is its own and none may be kept.
        out, lse = execution.run(entry, _arguments(name, given), keep=False)
        return out, out.new_empty(0, dtype=torch.float32) if lse is None else lse

    def fake(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, v = given["q"], given[entry.tensors.get("v", "v")]
        shape = shape_of_lse(q) if given["need_lse"] else (0,)
        return empty_out(q, v.shape[-1]), q.new_empty(shape, dtype=torch.float32)

    operator = _define(entry, name, schema, 2, compute, fake)
    if entry is not KVCACHE:
        _differentiate(operator, f"{name}_backward")


def _define_backward(entry: Entry, name: str, schema: str) -> None:
    def compute(**given: Any) -> tuple[torch.Tensor, ...]:
        dq, dk, dv, delta = execution_backward.run(entry, _arguments(name, given), keep=False)
        return dq, dk, dv, delta.clone()  # without the room beside it

    def fake(**given: Any) -> tuple[torch.Tensor, ...]:
        delta = torch.empty_like(given["softmax_lse"], memory_format=torch.contiguous_format)
        return *(empty_out(given[x]) for x in ("q", "k", "v")), delta

    _define(entry, name, schema, 4, compute, fake)


def _differentiate(operator: Any, backward_name: str) -> None:
    """Register the gradients of a forward operator."""
    order = [argument.name for argument in operator._schema.arguments]
    backward_operator = getattr(torch.ops.mini_flash_attention, backward_name)
    wanted = [argument.name for argument in backward_operator.default._schema.arguments]

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        given = dict(zip(order, inputs, strict=True))
        if not given["need_lse"]:
            raise ValueError(f"{NAMESPACE}: need_lse: expected True where gradients are wanted")
        ctx.names = [name for name, x in given.items() if isinstance(x, torch.Tensor)]
        ctx.others = {name: x for name, x in given.items() if name not in ctx.names}
        aux = ctx.others.pop("score_mod_args")
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(given[name] for name in ctx.names), *aux, *output)

    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        given = ctx.others | dict(zip(ctx.names, tensors, strict=False))
        given |= {"out": out, "softmax_lse": lse, "dsoftmax_lse": dlse}
        given["dout"] = torch.zeros_like(out) if dout is None else readable(dout)
        given["score_mod_args"] = list(tensors[len(ctx.names) :])
        dq, dk, dv, delta = backward_operator(
            **{name: given[name] for name in wanted if name in given}
        )
        gradients: dict[str, Any] = {"q": dq, "k": dk, "v": dv}
        if given["s_aux"] is not None:
            gradients["s_aux"] = sink_gradient(given["s_aux"], lse, delta)
        gradients["score_mod_args"] = [None] * len(given["score_mod_args"])
        return tuple(gradients.get(name) for name in order)

    torch.library.register_autograd(operator, backward, setup_context=setup_context, lib=LIBRARY)


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


for _name, _schema in BACKWARD.items():
    _entry = DENSE_BACKWARD if _name == DENSE_BACKWARD.name else VARLEN_BACKWARD
    _define_backward(_entry, _name, _schema)
for _name, _schema in SCHEMAS.items():
    _define_forward({"dense": DENSE, "varlen": VARLEN}.get(_name, KVCACHE), _name, _schema)
