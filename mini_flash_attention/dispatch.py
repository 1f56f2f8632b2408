"""Run a call directly, or as an operator under torch.compile, torch.export and dispatch modes."""

import torch

from . import execution, execution_backward, recipes, training
from .entries import Entry
from .recipes import Arguments, Result
from .validate.options import pair


def run(entry: Entry, arguments: Arguments) -> Result:
    """(out, softmax_lse or None) of a call; its new keys are in the cache afterwards.

    A compiler that traces the call, or a mode that looks at operators, sees one.
    """
    if type(arguments["window_size"]) is not tuple:
        arguments["window_size"] = pair(arguments["window_size"])
    if arguments.get("dropout_p") and "dropout_seed" not in arguments:
        arguments["dropout_seed"] = training.seed(arguments["q"])
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        from . import ops, ops_backward  # noqa: F401  (it registers gradients)

        training.autocasts(arguments)
        return ops.run(entry, arguments)
    key, recipe = recipes.look_up(entry, arguments)
    if recipe is None and training.autocasts(arguments):
        return run(entry, arguments)
    if key is recipes.GRADIENT:
        from . import autograd

        return autograd.run(entry, arguments)
    return execution.run_known(entry, arguments, key, recipe)


def run_backward(entry: Entry, arguments: Arguments) -> execution_backward.Gradients:
    """The gradients of a call; `entry` is that of its backward pass."""
    if type(arguments["window_size"]) is not tuple:
        arguments["window_size"] = pair(arguments["window_size"])
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        from . import ops_backward

        return ops_backward.run_backward(entry, arguments)
    with torch.no_grad():
        return execution_backward.run(entry, arguments)
