"""A second import name for a package, under which its modules are the same objects."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

from typing_extensions import override

__all__ = ["alias_package"]


def alias_package(alias: str, package: str) -> None:
    """Lets a package be imported by another name too: `alias.part` is `package.part`, and not a copy of it.

    It is called by the module of that name, while that is imported. A package of the user's own that has the name, and
    comes first on the search path, is not touched.

    Args:
        alias: The further name.
        package: The package.
    """
    sys.modules[alias] = importlib.import_module(package)
    sys.meta_path.insert(0, _AliasFinder(alias, package))


class _AliasFinder(MetaPathFinder, InspectLoader):
    """Finds the modules of a package by its other name."""

    def __init__(self, alias: str, package: str) -> None:
        self.alias, self.package = alias, package
        self._specs: dict[str, ModuleSpec | None] = {}

    def _real_name(self, name: str) -> str:
        return self.package + name.removeprefix(self.alias)

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{self.alias}.") or sys.modules.get(self.alias) is not sys.modules[self.package]:
            return None
        real = importlib.util.find_spec(self._real_name(fullname))
        if real is None:
            return None
        return ModuleSpec(fullname, self, origin=real.origin, is_package=real.submodule_search_locations is not None)

    @override
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._real_name(spec.name))
        self._specs[spec.name] = module.__spec__
        return module

    @override
    def exec_module(self, module: ModuleType) -> None:
        """The module has been executed; the import system has only given it the spec of its other name."""
        assert module.__spec__ is not None, "set by the import system"
        module.__spec__ = self._specs.pop(module.__spec__.name)

    @override
    def get_code(self, fullname: str) -> CodeType | None:
        """For `python -m`."""
        spec = importlib.util.find_spec(self._real_name(fullname))
        loader = None if spec is None else spec.loader
        return loader.get_code(self._real_name(fullname)) if isinstance(loader, InspectLoader) else None

    @override
    def get_source(self, fullname: str) -> str | None:
        return None
