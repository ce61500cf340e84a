"""Runs the code of an execution, in the process that has been confined for it.

Standard library only, and of that only what starts fast: this is part of every
execution's latency.
"""

from __future__ import annotations

import _frozen_importlib_external as importlib_external
import _io
import _thread
import _weakref
import atexit
import gc
import os
import sys

from . import _testing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
    from typing import Any
else:
    FileFinder, SourceFileLoader = importlib_external.FileFinder, importlib_external.SourceFileLoader

REPORT = 3
"""The descriptor for the report on how the code ended."""
MAX_REPORT = 4 << 20
"""Bytes of a report that are read."""

# Not quite "<sandbox>": of such names linecache does not ask the loader.
_NAME = "<sandbox>.py"


def main(load: Callable[[], dict[str, Any]], _codes: object) -> object:
    """Runs the job in an interpreter that was started for it; see `BOOTSTRAP` of the supervisor."""
    job = load()
    os.set_inheritable(REPORT, False)
    os.closerange(REPORT + 1, os.sysconf("SC_OPEN_MAX"))
    return run(job)


def run(job: dict[str, Any]) -> object:
    """Runs the code, or its tests, and returns what `sys.exit` is to be called with."""
    for stream, settings in (
        (sys.stdout, {"errors": "backslashreplace", "line_buffering": True}),
        (sys.stderr, {"errors": "backslashreplace"}),
    ):
        encoding = {} if os.environ.get("PYTHONIOENCODING") else {"encoding": "utf-8"}
        stream.reconfigure(**encoding, **settings)  # type: ignore[union-attr]
    sys.path.append(job["cwd"])
    source, tests, temporary = job["source"], job["tests"], job["temporary"][1]
    job["loaded"] = sys.modules.keys() - {"__main__"}
    script = f"{temporary}/{job['script']}"
    _import_what_is_on_disk([temporary, *(path for path, _ in job["writable"])])
    _save_what_matplotlib_shows(job["cwd"])
    if tests is None:
        # A line of the file may declare an encoding, which means nothing in text.
        declared = any("coding" in line for line in source.split("\n", 2)[:2])
        text = _MAIN.format(parts=[(_NAME, source)]) if declared else source
        return _run(source, _write(script, text))
    parts = [("<code>", source), ("<tests>", tests)]
    if _write(script, _TESTED.format(parts=parts)):
        sys.modules["__main__"].__file__ = script
    return _testing.run(source, tests, REPORT)


# The main module of a child that multiprocessing spawns.
_EXECUTE = """\
for _name, _text in {parts!r}:
    exec(compile(_text, _name, "exec", dont_inherit=True), """
_MAIN = _EXECUTE + "globals())\n"
_TESTED = f"""\
import sys
sys.modules["sandbox"] = type(sys)("sandbox")
{_EXECUTE}vars(sys.modules["sandbox"]))
"""


def _write(path: str, text: str) -> str | None:
    """Makes the file of the main module, which children import by name; None where it cannot be.

    Without it code still runs, where it has filled the disk or removed TMPDIR.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123
            file.write(text.encode())
    except OSError:
        return None
    return path


def _run(source: str, file: str | None) -> object:
    """Runs the code as ``__main__``."""
    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__dict__.update(__builtins__=__builtins__, __loader__=_Source(source))
    if file is not None:
        main.__file__ = file
    sys.argv[:] = [_NAME]
    try:
        exec(compile(source, _NAME, "exec", dont_inherit=True), main.__dict__)  # noqa: S102
    except SystemExit as error:
        if error.code not in (None, 0):
            _tell(f"SystemExit: {error.code}")
        return error.code
    except BaseException as error:  # noqa: BLE001
        _fail(error)
        return 1
    return 0


def end(result: object, job: dict[str, Any], flush_c_streams: Callable[[], None]) -> None:
    """Ends the process with what code can notice of an interpreter's end.

    Threads are waited for, exit handlers run, the code's own objects are destroyed, and files are
    flushed. The rest of it frees memory, which takes longer than most code runs.
    """
    status = _status_of(result)
    threading = sys.modules.get("threading")
    if threading is not None:
        try:
            threading._shutdown()
        except BaseException as error:  # noqa: BLE001
            sys.excepthook(type(error), error, error.__traceback__)
    atexit._run_exitfuncs()
    flushed = _flush(sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    if not _thread._count():  # Threads that go on running need their objects.
        _destroy_modules_of_the_code(job)
    left = [object_ for object_ in gc.get_objects() if issubclass(type(object_), _WRITERS)]
    _flush(*left)
    flush_c_streams()
    os._exit(status if flushed else 120)


_WRITERS = (_io.TextIOWrapper, _io.BufferedWriter, _io.BufferedRandom)


def _status_of(result: object) -> int:
    """The exit status that `sys.exit` gives a value."""
    if result is None:
        return 0
    if isinstance(result, int):
        return result & 0xFF if -sys.maxsize <= result <= sys.maxsize else 0xFF
    print(result, file=sys.stderr)  # noqa: T201
    return 1


def _flush(*streams: Any) -> bool:
    flushed = True
    for stream in streams:
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except Exception:  # noqa: BLE001
            flushed = False
    return flushed


def _destroy_modules_of_the_code(job: dict[str, Any]) -> None:
    below = prefixes([job["cwd"], job["temporary"][1]])
    own = [
        name
        for name, module in sys.modules.items()
        if name not in job["loaded"]
        and isinstance(module, type(sys))
        and (name in ("__main__", "sandbox") or str(vars(module).get("__file__")).startswith(below))
    ]
    modules = [_weakref.ref(sys.modules.pop(name)) for name in own]
    gc.collect()
    for module in modules:
        if (alive := module()) is not None:
            names = vars(alive)
            # Names with an underscore first, as the interpreter does it.
            for name in sorted(names, key=lambda name: not str(name).startswith("_")):
                if name != "__builtins__":
                    names[name] = None
    gc.collect()


class _Source:
    """Gives tracebacks, and inspect, the lines of the code."""

    def __init__(self, source: str) -> None:
        self._source = source

    def get_source(self, _module: str) -> str:
        return self._source


def _fail(error: BaseException) -> None:
    _testing.make_room(error)
    import traceback

    frames = error.__traceback__
    error.__traceback__ = frames and frames.tb_next  # without the frame of this file
    traceback.print_exception(error)
    _tell("".join(traceback.format_exception_only(error)).strip())


def _tell(text: str) -> None:
    write_all(REPORT, text.encode("utf-8", "replace")[:MAX_REPORT])


def write_all(descriptor: int, data: bytes) -> None:
    """Writes the data, however little of it is taken at a time."""
    while data:
        data = data[os.write(descriptor, data) :]


def _import_what_is_on_disk(writable: list[str]) -> None:
    """Has modules below these directories imported as they are now.

    Nothing here writes bytecode. Other interpreters do, those that the code starts in an
    environment of its own, and Python takes bytecode for current whose source has the same
    size and second of change.
    """
    below = prefixes(writable)
    loaders = [
        (loader, suffixes)
        for loader, suffixes in importlib_external._get_supported_file_loaders()  # type: ignore[attr-defined]
        if loader is not SourceFileLoader
    ]
    # Extensions, source, bytecode: the order that the interpreter has.
    loaders.insert(1, (_FreshLoader, importlib_external.SOURCE_SUFFIXES))

    def hook(path: str) -> _FreshFinder:
        try:
            found = f"{os.path.abspath(path)}/".startswith(below) and os.path.isdir(path)  # noqa: PTH100, PTH112
        except OSError:  # relative to a directory that is gone
            found = False
        if not found:
            raise ImportError(path)
        return _FreshFinder(path, *loaders)

    sys.path_hooks.insert(0, hook)
    for path in list(sys.path_importer_cache):
        if f"{path}/".startswith(below):
            del sys.path_importer_cache[path]


def prefixes(directories: Sequence[str]) -> tuple[str, ...]:
    """What paths below the directories begin with."""
    return tuple(path.rstrip("/") + "/" for path in {*directories, *map(os.path.realpath, directories)})


class _FreshFinder(FileFinder):
    """Sees modules that were made a moment ago: directories have coarse times, too."""

    def find_spec(self, fullname: str, target: Any = None) -> ModuleSpec | None:
        self.invalidate_caches()
        return super().find_spec(fullname, target)


class _FreshLoader(SourceFileLoader):
    """Takes bytecode only if it was written after the last change of its source."""

    def path_stats(self, path: str) -> Any:
        try:
            written = os.stat(importlib_external.cache_from_source(path)).st_mtime_ns  # noqa: PTH116
        except OSError:
            return super().path_stats(path)
        source = os.stat(path)  # noqa: PTH116
        # The change of the inode, too: a file may have been moved here with an older time.
        if written <= max(source.st_mtime_ns, source.st_ctime_ns):
            raise OSError(f"the bytecode of {path} may be older than it")
        return super().path_stats(path)


_BACKEND = "prodisco_sandbox.server._matplotlib"
_DIRECTORY = "sandbox_directory"
"""Attribute of matplotlib by which the backend knows where pictures go."""


def _save_what_matplotlib_shows(directory: str) -> None:
    """Has ``plt.show()`` save pictures, unless the code chooses a backend of its own.

    MPLBACKEND is not left in the environment: other interpreters that the code starts would inherit
    it, and lack our module.
    """
    matplotlib = sys.modules.get("matplotlib")
    if matplotlib is None:
        sys.meta_path.insert(0, _Matplotlib(directory))
    elif "MPLBACKEND" not in os.environ and _has_backend():
        matplotlib.rcParams["backend"] = f"module://{_BACKEND}"
        setattr(matplotlib, _DIRECTORY, directory)


def _has_backend() -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(_BACKEND) is not None
    except ImportError:
        return False


class _Matplotlib:
    """Finds matplotlib, once, and sets its backend; leaves all other modules to others."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "matplotlib":
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        import importlib.util

        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None and "MPLBACKEND" not in os.environ:
            self._execute = spec.loader.exec_module
            spec.loader.exec_module = self._exec_module  # type: ignore[method-assign]
        return spec

    def _exec_module(self, module: Any) -> None:
        if _has_backend():
            os.environ["MPLBACKEND"] = f"module://{_BACKEND}"
        setattr(module, _DIRECTORY, self._directory)
        try:
            self._execute(module)
            if "MPLBACKEND" in os.environ:
                # Where it was preloaded, it has read the variable before.
                module.rcParams["backend"] = os.environ["MPLBACKEND"]
        finally:
            os.environ.pop("MPLBACKEND", None)
