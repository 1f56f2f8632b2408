"""Whether a call fits, asked before anything is launched or written, and without reading a tensor.

Every message has one form: *function: argument: expected X, got Y (what to do)*.
"""


def invalid(
    error: type[Exception], function: str, argument: str, expected: str, got: object, hint: str = ""
) -> Exception:
    """The exception to raise for an argument that is not what it has to be."""
    advice = f" ({hint})" if hint else ""
    return error(f"{function}: {argument}: expected {expected}, got {got}{advice}")


def wrong_type(
    function: str, argument: str, expected: str, got: object, hint: str = ""
) -> Exception:
    """`invalid` as a TypeError."""
    return invalid(TypeError, function, argument, expected, got, hint)


def wrong_value(
    function: str, argument: str, expected: str, got: object, hint: str = ""
) -> Exception:
    """`invalid` as a ValueError."""
    return invalid(ValueError, function, argument, expected, got, hint)


def not_implemented(function: str, argument: str, value: str) -> NotImplementedError:
    """The exception to raise for an argument that this package does not have yet."""
    return NotImplementedError(
        f"{function}: {argument}: not implemented yet; pass {value} or leave it out"
    )


def not_differentiable(function: str, what: str, hint: str = "") -> NotImplementedError:
    """The exception to raise where a gradient is wanted and there is none."""
    hint = hint or "call it under torch.no_grad() or detach its tensors"
    return NotImplementedError(f"{function}: backward: not implemented for {what}; {hint}")


def kind_of(x: object) -> str:
    """The type of x by name, with its module where that is not Python's own."""
    cls = type(x)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"
