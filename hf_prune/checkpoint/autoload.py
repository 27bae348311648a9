"""Install the loader of pruned checkpoints when transformers' code is imported, not before."""

from __future__ import annotations

import logging
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def install_on_import() -> None:
    """Have checks and loader installed as soon as transformers' modules are imported; now if they already are.

    Importing torch and transformers takes seconds: `import hf_prune` must not. Idempotent.
    """
    for module, install in _INSTALL.items():
        if module in sys.modules:
            install()
        elif not any(isinstance(finder, _Finder) and finder.module == module for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(module))


def _install_config_check() -> None:
    from hf_prune.format import per_layer

    per_layer.install_config_check()
    # It warns three times a load of what our loader does on purpose: it reads values that differ between layers.
    logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").setLevel(logging.ERROR)


def _install() -> None:
    from hf_prune.checkpoint.save_hook import install_save_hook
    from hf_prune.checkpoint.verifying import install_verification
    from hf_prune.format import per_layer

    per_layer.install()
    install_verification()
    install_save_hook()


_INSTALL: dict[str, Callable[[], None]] = {
    "transformers.configuration_utils": _install_config_check,
    "transformers.modeling_utils": _install,
}


class _Finder(MetaPathFinder):
    """Finds one module, with a loader that installs after executing it; leaves `sys.meta_path` once it has."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _InstallingLoader(spec.loader, _INSTALL[self.module])
        else:
            sys.meta_path.insert(0, self)
        return spec


class _InstallingLoader(Loader):
    def __init__(self, loader: Loader, install: Callable[[], None]) -> None:
        self.loader, self.install = loader, install

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.install()

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)  # `get_source` and the like, which inspect and linecache ask for
