"""Modules that are loaded already, but that code does not see before it imports them.

Runs in a zygote and in the executions that it forks; standard library only. An import of such
a module finds it as usual, on the path as it is then, and takes the loaded one if it is from
the same file; so `sys.modules`, and modules that shadow others, are as in a fresh interpreter.
"""

from __future__ import annotations

import _frozen_importlib_external as importlib_external
import _thread
import builtins
import ctypes
import itertools
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

WITHOUT_THREADS = {
    "OPENBLAS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    # Its threads, once they start, spin for 25 ms of a processor before they sleep: 2**26 cycles.
    "OPENBLAS_THREAD_TIMEOUT": "16",
}
"""Variables that keep libraries from starting threads while they are imported."""


class Preloaded:
    """The loaded modules; a finder, to be the first of `sys.meta_path`."""

    def __init__(self) -> None:
        self._modules: dict[str, ModuleType] = {}
        self._revealed: dict[str, ModuleType] = {}
        self._needs: dict[str, set[str]] = {}
        self._closures: dict[str, tuple[str, ...]] = {}
        self._found: set[str] = set()
        self._make_lock()
        os.register_at_fork(after_in_child=self._make_lock)

    def load(self, names: Iterable[str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Imports modules, and hides them.

        Returns:
            The names that could not be imported, and the first one whose import has left something
            that a fork would break; each with the reason.
        """
        before, descriptors = set(sys.modules), _open_descriptors()
        original = builtins.__import__

        def noting(name: str, *args: Any, **kwargs: Any) -> ModuleType:
            module = original(name, *args, **kwargs)
            self._note(name, *args, **kwargs)
            return module

        problems, unfit = [], []
        builtins.__import__ = noting
        try:
            for name in names:
                try:
                    noting(name)
                except Exception as error:  # noqa: BLE001
                    problems.append((name, f"{type(error).__name__}: {error}"))
                if len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208
                    unfit.append((name, "it starts threads"))
                elif _open_descriptors() > descriptors:
                    unfit.append((name, "it keeps files open"))
                if unfit:
                    break
        finally:
            builtins.__import__ = original
        self._hide(before)
        # Found here, so that no execution has to touch the memory of all that is noted.
        self._closures = {name: self._closure(name) for name in names if name in self._modules}
        return problems, unfit

    def files(self) -> list[str]:
        """The files that the modules were loaded from."""
        specs = [getattr(module, "__spec__", None) for module in self._modules.values()]
        return [spec.origin for spec in specs if spec is not None and spec.has_location]

    def _note(
        self, name: str, globals_: Any = None, _locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> None:
        """Notes what a module imports."""
        names = globals_ or {}
        if level:
            package = str(names.get("__package__") or names.get("__name__")).split(".")
            name = ".".join([*package[: len(package) - level + 1], *filter(None, [name])])
        importer = str(names.get("__name__"))
        if importer.startswith("importlib._bootstrap"):
            return  # It runs for an extension module, which it does not name.
        needed = self._needs.setdefault(importer, set())
        needed.add(name)
        needed.update(full for part in fromlist or () if (full := f"{name}.{part}") in sys.modules)

    def _hide(self, before: set[str]) -> None:
        new = [name for name in sys.modules if name not in before]
        for name in new:
            top, spec = name.partition(".")[0], getattr(sys.modules[name], "__spec__", None)
            if name == "__mp_main__":
                del sys.modules[name]  # Of multiprocessing.
                continue
            if spec is None or spec.name != name:
                # Put there by its package, such as six.moves, with which it comes back.
                if top not in new or top == name:
                    continue
                self._needs.setdefault(top, set()).add(name)
            elif spec.origin in ("built-in", "frozen"):
                continue
            self._modules[name] = sys.modules.pop(name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        module = self._modules.get(name) or (None if target is not None else self._revealed.get(name))
        if module is None:
            return None
        spec: ModuleSpec | None = importlib_external.PathFinder.find_spec(name, path, target)
        own = module.__spec__
        if spec is None or own is None or spec.origin != own.origin:
            return None
        with self._lock:
            if name not in self._modules:
                # If another thread has revealed it since this import did not find it in `sys.modules`, the
                # import would load a second one. Otherwise code has removed it there, and wants that.
                if sys.modules.get(name) is not module:
                    return None
                del sys.modules[name]
            self._found.add(name)
        loader: Any = _Loader(self, module)
        spec.loader = loader
        return spec

    def reveal(self, name: str) -> None:
        """Takes a module out of hiding, and with it all that it has imported."""
        revealed = {}
        with self._lock:
            for one in self._closures.get(name) or self._closure(name):
                # Those that were found go into `sys.modules` by the imports that are under way.
                if one in self._modules and (one not in self._found or one == name):
                    revealed[one] = module = self._modules.pop(one)
                    sys.modules.setdefault(one, module)
            self._revealed.update(revealed)
        for one, prepare in _PREPARE.items():
            if one in revealed:
                prepare(revealed[one])

    def _closure(self, name: str) -> tuple[str, ...]:
        """A module, and all that it has imported."""
        found = {name: None}
        pending = [name]
        for one in pending:  # grows while it is walked
            needed = {one.rpartition(".")[0], *self._needs.get(one, ())} - found.keys()
            new = [other for other in needed if other in self._modules]
            found.update(dict.fromkeys(new))
            pending += new
        return tuple(found)

    def _make_lock(self) -> None:
        self._lock = _thread.allocate_lock()


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


class _Loader:
    """Hands out a loaded module."""

    def __init__(self, preloaded: Preloaded, module: ModuleType) -> None:
        self._preloaded, self._module = preloaded, module
        self._spec = module.__spec__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._spec and self._spec.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._preloaded.reveal(spec.name)
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _tempfile(module: Any) -> None:
    module.tempdir = module._name_sequence = None


def _ssl(module: Any) -> None:
    module.RAND_add(os.urandom(32), 32.0)


def _logging(module: Any) -> None:
    import time

    module._startTime = time.time_ns() if isinstance(module._startTime, int) else time.time()


def _multiprocessing(module: Any) -> None:
    sys.modules["__mp_main__"] = sys.modules["__main__"]
    module.ORIGINAL_DIR = os.getcwd()  # noqa: PTH109
    module.current_process().authkey = os.urandom(32)


def _numpy_random(module: Any) -> None:
    module.seed()


def _matplotlib(module: Any) -> None:
    # It has noted the directories of a home that is gone, and read no configuration from this one.
    for function in (module.get_configdir, module.get_cachedir):
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if "called" in cells:
            cells["called"].cell_contents = False
    path = module.matplotlib_fname()
    if not path.startswith(module.get_data_path()):
        module.rc_file(path)


def _numexpr(module: Any) -> None:
    module._init_num_threads()


def find_blas() -> None:
    """Has the loaded copies of OpenBLAS get the threads that they would have started by themselves.

    Each when the package that it belongs to is first imported.
    """
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123
        paths = {line.split(maxsplit=5)[-1].rstrip() for line in file if "openblas" in line}
    for path in paths:
        library = ctypes.CDLL(path)
        for prefix, suffix in itertools.product(("scipy_", ""), ("64_", "")):
            set_threads = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
            if set_threads is not None:
                _PREPARE["scipy" if "/scipy" in path else "numpy"] = _blas_threads(set_threads)
                break


def _blas_threads(set_threads: Any) -> Callable[[Any], None]:
    def prepare(_module: Any) -> None:
        count = len(os.sched_getaffinity(0))
        for variable in ("OMP_NUM_THREADS", "GOTO_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            value = os.environ.get(variable, "")
            count = int(value) if value.isdecimal() and int(value) else count
        set_threads(count)

    return prepare


_PREPARE: dict[str, Callable[[Any], None]] = {
    "tempfile": _tempfile,
    "ssl": _ssl,
    "logging": _logging,
    "matplotlib": _matplotlib,
    "multiprocessing.process": _multiprocessing,
    "numexpr": _numexpr,
    "numpy.random": _numpy_random,
}
"""What makes a module's state this process's own, when code first imports it."""
