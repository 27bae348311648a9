"""Install the loader of pruned checkpoints when transformers' modelling code is imported, not before."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_MODULE = "transformers.modeling_utils"


def install_on_import() -> None:
    """Have `per_layer.install` called as soon as `transformers.modeling_utils` is imported; now if it already is.

    Importing torch and transformers takes seconds: `import hf_prune` must not. Idempotent.
    """
    if _MODULE in sys.modules:
        _install()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _install() -> None:
    from hf_prune.checkpoint import per_layer
    from hf_prune.checkpoint.save_hook import install_save_hook

    per_layer.install()
    install_save_hook()


class _Finder(MetaPathFinder):
    """Finds one module, with a loader that installs after executing it; leaves `sys.meta_path` once it has."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _InstallingLoader(spec.loader)
        else:
            sys.meta_path.insert(0, self)
        return spec


class _InstallingLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _install()

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)  # `get_source` and the like, which inspect and linecache ask for
