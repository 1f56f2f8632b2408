"""A function in Triton's language, run on CPU tensors: what a score_mod does there.

The function is rebuilt: the same code with other values. Where it reaches a value of Triton's
(a global, a closure variable, a default argument, an attribute of a module), it finds PyTorch's:
a function for a function of `tl`, a dtype for a dtype, a plain number for a `tl.constexpr`. Its
helpers are rebuilt in the same way.
"""

import types
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

from .validate import invalid, kind_of

# Functions that PyTorch has under the same name: those of tl, and those of libdevice.
SAME = "abs ceil cos erf exp exp2 floor log log2 rsqrt sigmoid sin sqrt zeros_like"
LIBDEVICE = """abs acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh erf erfc erfinv
    exp exp2 expm1 floor fmod hypot isinf isnan lgamma log log10 log1p log2 nextafter pow rsqrt sin
    sinh sqrt tan tanh trunc"""
DTYPES = "bfloat16 float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64"
# What Triton's dtypes call themselves, where PyTorch has other names.
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


# -- values ---------------------------------------------------------------------------------------


class Tile:
    """A tensor that computes as Triton's do, where PyTorch's differ: integers divide toward zero,
    a Python float is fp32, and `x += 1` is another tensor.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.dtype = values, values.dtype

    def __getattr__(self, name: str) -> Any:
        """Methods are functions of tl."""
        return partial(getattr(LANGUAGE, name), self)

    def __bool__(self) -> bool:
        if self.values.numel() != 1:
            hint = "on the CPU an argument is a tensor of all its values: use tl.where, & and |"
            got = tuple(self.values.shape)
            raise invalid(ValueError, "score_mod", "condition", "one value", got, hint)
        return bool(self.values)

    def to(self, dtype: torch.dtype) -> "Tile":
        return Tile(self.values.to(dtype))


def tensor(x: Any, what: str = "value") -> torch.Tensor:
    """PyTorch's tensor for a tile, or for a number as Triton makes a tensor of it."""
    if isinstance(x, Tile):
        return x.values
    if isinstance(x, torch.Tensor):
        return x
    if not isinstance(x, (bool, int, float)):
        raise invalid(TypeError, "score_mod", what, "a tensor or a number", kind_of(x))
    dtype = torch.float32 if isinstance(x, float) else None
    return torch.tensor(x, dtype=dtype, device="cpu")


def elementwise(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A function of PyTorch's for tiles and numbers. Beside its tensors, which a plain Python
    function has, it gives one of them.
    """

    def apply(*operands: Any) -> Any:
        if any(isinstance(x, Pointer) for x in operands):
            return NotImplemented
        result = function(*map(tensor, operands))
        return result if any(isinstance(x, torch.Tensor) for x in operands) else Tile(result)

    return apply


def divide(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Two integers give fp32."""
    x, y = (n if n.is_floating_point() else n.to(torch.float32) for n in (x, y))
    return torch.true_divide(x, y)


def reflected(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x, y: function(y, x)


BINARY = ("add", "sub", "mul", "and", "or", "xor", "lshift", "rshift")
OTHERS = ("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "invert")
OPERATORS = {name: getattr(torch.Tensor, f"__{name}__") for name in BINARY}
OPERATORS |= {"truediv": divide, "mod": torch.fmod}
OPERATORS["floordiv"] = partial(torch.div, rounding_mode="trunc")
for name, function in OPERATORS.items():
    setattr(Tile, f"__{name}__", elementwise(function))
    setattr(Tile, f"__r{name}__", elementwise(reflected(function)))
for name in OTHERS:
    setattr(Tile, f"__{name}__", elementwise(getattr(torch.Tensor, f"__{name}__")))


class Pointer:
    """A tensor's memory and an index into it, in elements from the tensor's first."""

    def __init__(self, memory: torch.Tensor, index: Any = 0) -> None:
        self.memory, self.index = memory, index

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.memory, self.index + more)

    __radd__ = __add__

    def __sub__(self, less: Any) -> "Pointer":
        return Pointer(self.memory, self.index - less)


def load(pointer: Pointer, mask: Any = None, other: Any = None, **hints: Any) -> Any:
    """tl.load; the hints are for a GPU's caches."""
    x = pointer.memory
    first, size = x.storage_offset(), x.untyped_storage().nbytes() // x.element_size()

    def read(index: torch.Tensor, there: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        index = torch.where(there.bool(), index, 0).long()
        if not index.numel() or not there.any():  # nor need there be any memory
            return torch.broadcast_tensors(other.to(x.dtype), index)[0]
        ends = [int(n) for n in index.aminmax()]
        if any(not -first <= n < size - first for n in ends):
            wanted, got = f"indices from {-first} to {size - first - 1}", f"{ends[0]} to {ends[1]}"
            raise invalid(IndexError, "score_mod", "tl.load", wanted, got, "mask what lies outside")
        values = x.as_strided((size,), (1,), 0)[index + first]
        return torch.where(there.bool(), values, other.to(x.dtype))

    mask = True if mask is None else mask
    return elementwise(read)(pointer.index, mask, 0 if other is None else other)


# -- Triton's names -------------------------------------------------------------------------------


class Names:
    """A module of Triton's, as far as CPU tensors have its functions."""

    def __init__(self, module: str, same: str = "", **others: Any) -> None:
        self.module = module
        vars(self).update({x: elementwise(getattr(torch, x)) for x in same.split()}, **others)

    def __getattr__(self, name: str) -> Any:
        wanted, got = "an elementwise function", "one that CPU tensors don't have"
        raise invalid(AttributeError, "score_mod", f"{self.module}.{name}", wanted, got)

    def late(self, name: str) -> Any:
        """The function of this name, or one that refuses when it is called."""
        return vars(self).get(name, lambda *_, **__: getattr(self, name))


def static_assert(condition: Any, message: str = "") -> None:
    assert condition, message


MATH = Names("libdevice", LIBDEVICE, rint=elementwise(torch.round))
LANGUAGE = Names(
    "tl",
    SAME,
    fdiv=elementwise(divide),
    fma=elementwise(lambda x, y, z: x * y + z),
    maximum=elementwise(torch.fmax),  # a number, where the other is NaN
    minimum=elementwise(torch.fmin),
    clamp=elementwise(lambda x, least, most: torch.fmin(torch.fmax(x, least), most)),
    where=elementwise(lambda condition, x, y: torch.where(condition.bool(), x, y)),
    cast=lambda x, dtype: elementwise(lambda y: y.to(dtype))(x),
    load=load,
    constexpr=lambda x: x,
    range=range,
    static_range=range,
    static_assert=static_assert,
    int1=torch.bool,
    **{name: getattr(torch, name) for name in DTYPES.split()},
    libdevice=MATH,
)
# So are its submodules called: tl.math.exp, tl.extra.libdevice.tanh, tl.extra.cuda.libdevice.tanh.
vars(LANGUAGE).update(math=LANGUAGE, extra=LANGUAGE, cuda=LANGUAGE)


def counterpart(x: Any) -> Names | None:
    """What stands for the module of Triton's language that x is or comes from, if it does."""
    of_module = isinstance(x, types.ModuleType)
    module = x.__name__ if of_module else getattr(original(x), "__module__", "")
    if f"{module}.".startswith("triton.language."):
        return MATH if module.endswith("libdevice") else LANGUAGE
    return None


# -- functions ------------------------------------------------------------------------------------


def call(score_mod: Any, score: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """What score_mod, or its gradient, makes of scores; a tuple becomes one of pointers."""
    given = [tuple(map(Pointer, x)) if isinstance(x, tuple) else x for x in (score, *arguments)]
    if is_compiled(score_mod):  # there integers are int32
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        tensors = [x if x.is_floating_point() else x.int() for x in tensors]
        given[: len(tensors)] = map(Tile, tensors)
    result = tensor(Rebuilder().function(score_mod)(*given), "result")
    if result.shape != score.shape:  # nor would it be broadcast in a kernel
        wanted, hint = f"the score's shape {tuple(score.shape)}", "add 0 * score"
        raise invalid(ValueError, "score_mod", "result", wanted, tuple(result.shape), hint)
    return result.to(score.dtype)


def is_compiled(x: Any) -> bool:
    """Whether x is what @triton.jit makes of a function, for a GPU or for the interpreter."""
    return hasattr(x, "arg_names") and isinstance(getattr(x, "fn", None), types.FunctionType)


def original(x: Any) -> Any:
    return x.fn if is_compiled(x) else x


def used(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in code, that of inner functions included."""
    inner = (used(x) for x in code.co_consts if isinstance(x, types.CodeType))
    return set(code.co_names).union(*inner)


class Module(types.ModuleType):
    """A module of the user's; its attributes are translated when they are asked for."""

    def __init__(self, module: types.ModuleType, translate: Callable[[Any], Any]) -> None:
        super().__init__(module.__name__)
        vars(self).update(_module=module, _translate=translate)

    def __getattr__(self, name: str) -> Any:
        return self._translate(getattr(self._module, name))


class Rebuilder:
    """Rebuilds functions, each of them once: they may call one another."""

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}
        self.names: dict[tuple[str, str], Any] = {}

    def function(self, x: Any) -> Any:
        """x with the values that `value` has for its own; x itself if it is no function."""
        old = original(x)
        if not isinstance(old, types.FunctionType) or id(x) in self.made:
            return self.made.get(id(x), x)
        if is_compiled(x) and self.names.setdefault((old.__module__, old.__qualname__), x) is not x:
            got = f"two called {old.__qualname__}"
            hint = "Triton compiles the first for both: pass what differs as an argument"
            raise invalid(
                ValueError, "score_mod", "helpers", "a different name for each", got, hint
            )
        cells = {name: types.CellType() for name in old.__code__.co_freevars}
        names = dict(old.__globals__)
        new = types.FunctionType(old.__code__, names, old.__name__, None, tuple(cells.values()))
        self.made[id(x)] = made = self.wrapped(x, new)
        for name in used(old.__code__) & names.keys():
            names[name] = self.value(names[name])
        for (name, cell), given in zip(cells.items(), old.__closure__ or (), strict=True):
            if given != types.CellType():  # not one that is still to be assigned
                cell.cell_contents = names[name] = self.value(given.cell_contents)
        new.__defaults__ = self.value(old.__defaults__)
        new.__kwdefaults__ = {n: self.value(y) for n, y in (old.__kwdefaults__ or {}).items()}
        return made

    def wrapped(self, x: Any, new: types.FunctionType) -> Any:
        return new

    def value(self, x: Any) -> Any:
        """What stands for x in a rebuilt function."""
        if type(x).__name__ == "tuple":
            return tuple(map(self.value, x))
        names = counterpart(x)
        if names is not None:
            constant = type(x).__name__ == "constexpr"
            return self.value(x.value) if constant else self.of_triton(names, x)
        if isinstance(x, types.ModuleType):
            return Module(x, self.value)
        return self.function(x) if is_compiled(x) else x

    def of_triton(self, names: Names, x: Any) -> Any:
        """What stands for a module, a function or a dtype of Triton's."""
        if isinstance(x, types.ModuleType):
            return names
        name = getattr(original(x), "__name__", None) or x.name
        return names.late(SHORT.get(name, name))


class Interpretable(Rebuilder):
    """Makes globals of closure variables: Triton's interpreter compiles a function's source anew,
    and finds its names only there.
    """

    def wrapped(self, x: Any, new: types.FunctionType) -> Any:
        return type(x)(new, **x.kwargs)

    def of_triton(self, names: Names, x: Any) -> Any:
        return x


@lru_cache(maxsize=64)
def launchable(score_mod: Any, interpreted: bool) -> Any:
    """A score_mod as kernels take it, on a GPU or in Triton's interpreter."""
    made = (Interpretable() if interpreted else Rebuilder()).function(score_mod)
    return made if interpreted else score_mod
