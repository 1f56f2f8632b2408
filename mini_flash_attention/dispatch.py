"""Run a call directly, or as an operator under torch.compile, torch.export and dispatch modes."""

import torch

from . import execution
from .entries import Entry
from .recipes import Arguments, Result
from .validate.options import pair


def run(entry: Entry, arguments: Arguments) -> Result:
    """(out, softmax_lse or None) of a call; its new keys are in the cache afterwards.

    A compiler that traces the call, or a mode that looks at operators, sees one.
    """
    if type(arguments["window_size"]) is not tuple:
        arguments["window_size"] = pair(arguments["window_size"])
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        from . import ops

        return ops.run(entry, arguments)
    return execution.run(entry, arguments)
