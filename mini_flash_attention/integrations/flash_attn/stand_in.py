"""How Python's import system finds the stand-ins, and what it says about missing modules.

A finder on `sys.meta_path` answers for a few top-level modules and all below them. What is missing
raises the exceptions that it would raise without this package; their messages name this package.
"""

import importlib
import opcode
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

IMPORT_FROM = opcode.opmap["IMPORT_FROM"]


class Contents(NamedTuple):
    """What a stand-in holds."""

    source: str  # the file that its functions come from
    names: dict[str, Any]
    borrowed: Mapping[str, str] = MappingProxyType({})  # names from other packages, if installed


class StandIn(ModuleType):
    """A module in another package's place."""

    def __getattr__(self, name: str) -> Any:
        """Only missing names come here.

        `from module import name` replaces the message of an AttributeError with one of its own, so
        it gets an ImportError. `hasattr` and `getattr` need the AttributeError.
        """
        message = missing(f"{self.__name__}.{name}")
        if name in self.__dict__.get("__borrowed__", {}):
            package = self.__borrowed__[name]
            message += f" without {package} (pip install {package})"
        caller = sys._getframe(1)
        if caller.f_code.co_code[caller.f_lasti] == IMPORT_FROM:
            raise ImportError(message, name=self.__name__, path=self.__dict__.get("__file__"))
        raise AttributeError(message, name=name, obj=self)

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        """Pickled and copied by name, as cloudpickle does with modules of Python's own type."""
        return importlib.import_module, (self.__name__,)


def missing(name: str) -> str:
    """The message for a module or a name that the stand-ins don't have."""
    root = name.partition(".")[0]
    return f"mini_flash_attention stands in for {root} and has no {name}"


class Finder(DistributionFinder, Loader):
    """Finds and loads the stand-ins, and lists them as distributions.

    contents: what each module holds, by its name. A module that others lie below is a package.
    distributions: (name, version) of a distribution, by the top-level module that it provides.
    """

    def __init__(
        self, contents: dict[str, Contents], distributions: dict[str, tuple[str, str]]
    ) -> None:
        self.contents = contents
        self.distributions = distributions
        self.modules: dict[str, StandIn] = {}

    def owns(self, name: str) -> bool:
        """Whether a module is one of the top-level ones here, or lies below one."""
        return name.partition(".")[0] in self.contents

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in self.contents:
            is_package = any(other.startswith(f"{fullname}.") for other in self.contents)
            source = self.contents[fullname].source
            spec = ModuleSpec(fullname, self, origin=source, is_package=is_package)
            spec.has_location = True  # so that the module gets a __file__, for inspect
            return spec
        # Given None, an import says "No module named ...", and importlib.util.find_spec returns it.
        # Both come here by way of importlib's _find_spec.
        if self.owns(fullname) and sys._getframe(2).f_code.co_name == "_find_and_load_unlocked":
            raise ModuleNotFoundError(missing(fullname), name=fullname)
        return None

    def create_module(self, spec: ModuleSpec) -> StandIn:
        if spec.name not in self.modules:
            self.modules[spec.name] = StandIn(spec.name)
        return self.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        _, names, borrowed = self.contents[module.__name__]
        module.__doc__ = f"mini_flash_attention's stand-in for {module.__name__}."
        vars(module).update(names, __borrowed__=borrowed)
        for name, package in borrowed.items():
            try:
                vars(module)[name] = getattr(importlib.import_module(package), name)
            except ImportError:
                continue

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008
    ) -> Iterator[Distribution]:
        """All in a listing, as importlib.metadata.packages_distributions() makes one.

        By name only what is called like its module: who asks for flash-attn-3 imports flash_attn_3.
        """
        wanted = context.name and context.name.lower().replace("-", "_")
        for module, (name, version) in self.distributions.items():
            if wanted is None or wanted == module == name.replace("-", "_"):
                yield Listed(name, version, module)


class Listed(Distribution):
    """A distribution that provides one top-level module and has no files."""

    def __init__(self, name: str, version: str, module: str) -> None:
        self.texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            "top_level.txt": f"{module}\n",
        }

    def read_text(self, filename: str) -> str | None:
        return self.texts.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path
