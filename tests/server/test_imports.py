"""What code imports is what is on disk, and Python's variables have their usual effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.servers import Stub, code, running, with_tests

# Writes a module, as an editor does, at a time that is always the same: to bytecode, which
# notes seconds and size, no version of it differs from another.
WRITE = """
import os, sys, subprocess
def write(path, text):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as file:
        file.write(text)
    os.utime(path, (1_700_000_000, 1_700_000_000))
PATH, NAME = {path!r}, {name!r}
"""
PLACES = {
    "module": ("stale_module.py", "stale_module"),
    "package": ("stale_package/__init__.py", "stale_package"),
    "in a package": ("stale_package/inner/__init__.py", "stale_package.inner"),
    "namespace package": ("stale_namespace/inner.py", "stale_namespace.inner"),
}


async def output(stub: Stub, source: str) -> str:
    answer = await stub.Execute(code(source))
    assert answer.success, answer.error + answer.output
    return answer.output.strip()


@pytest.fixture(params=PLACES)
def prelude(request: pytest.FixtureRequest) -> str:
    path, name = PLACES[request.param]
    return WRITE.format(path=path, name=name)


async def test_a_module_that_was_rewritten(stub: Stub, prelude: str) -> None:
    for value in "12":
        await output(stub, f"{prelude}write(PATH, 'value = {value}\\n')")
        source = f"{prelude}import importlib; print(importlib.import_module(NAME).value)"
        assert await output(stub, source) == value


async def test_a_module_that_was_rewritten_between_children(stub: Stub, prelude: str) -> None:
    source = f"""{prelude}
for value in "34":
    write(PATH, f"value = {{value}}\\n")
    child = [sys.executable, "-c", f"import importlib; print(importlib.import_module(NAME).value)"]
    child = [part.replace("NAME", repr(NAME)) for part in child]
    print(subprocess.run(child, capture_output=True, text=True, check=True).stdout.strip(), end="")
"""
    assert await output(stub, source) == "34"


async def test_bytecode_that_others_have_written_is_checked(stub: Stub, prelude: str) -> None:
    """As of a child without our variables, or of a program that compiles."""
    source = f"""{prelude}
import importlib, py_compile
write(PATH, "value = 5\\n")
cached = py_compile.compile(PATH, doraise=True)
write(PATH, "value = 6\\n")
print(os.path.exists(cached), importlib.import_module(NAME).value)
"""
    assert await output(stub, source) == "True 6"


async def test_bytecode_newer_than_its_source_is_used(stub: Stub) -> None:
    """What was installed is not compiled again and again."""
    source = f"""{WRITE.format(path="installed.py", name="installed")}
import py_compile
write(PATH, "value = 'source'\\n")
status = os.stat(PATH)
cached = py_compile.compile(PATH, doraise=True)
data = open(cached, "rb").read()
open(cached, "wb").write(data.replace(b"source", b"cached"))
later = max(status.st_ctime, status.st_mtime) + 10
os.utime(cached, (later, later))
import installed
print(installed.value)
"""
    assert await output(stub, source) == "cached"


async def test_a_module_that_was_made_a_moment_ago(stub: Stub) -> None:
    source = """
import os
for n in range(200):
    try:
        __import__(f"new_{n}")
        print("is there already")
    except ImportError:
        with open(f"new_{n}.py", "w") as file:
            file.write(f"value = {n}")
    assert __import__(f"new_{n}").value == n
    os.unlink(f"new_{n}.py")
"""
    assert await output(stub, source) == ""


async def test_a_module_under_test_that_was_rewritten(stub: Stub, prelude: str) -> None:
    for value in "78":
        request = with_tests(
            f"{prelude}write(PATH, 'value = {value}\\n')",
            f"def test_it():\n    assert __import__('importlib').import_module(NAME).value == {value}",
        )
        answer = await stub.ExecuteTest(request)
        assert answer.success, answer


async def test_a_file_of_tests_that_was_rewritten(stub: Stub) -> None:
    pytest_in_child = """
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # They take seconds to load.
write("pytest.ini", "")  # Else one from a directory above holds.
for value in (1, 2):
    write("test_stale.py", f"def test_it(): assert {value} == 1\\n")
    child = subprocess.run([sys.executable, "-m", "pytest", "-q", "test_stale.py"], capture_output=True)
    print(child.returncode, end="")
"""
    source = WRITE.format(path="", name="") + pytest_in_child
    answer = await stub.Execute(code(source))
    assert answer.output == "01", answer


async def test_no_bytecode_is_written(stub: Stub) -> None:
    source = """
import os, subprocess, sys, multiprocessing
open("plain.py", "w").write("value = 1")
import plain
subprocess.run([sys.executable, "-c", "import plain"], check=True)
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=__import__, args=("plain",))
    child.start(); child.join()
    print(child.exitcode, os.path.exists("__pycache__"), sys.dont_write_bytecode)
"""
    await output(stub, "import shutil; shutil.rmtree('__pycache__', ignore_errors=True)")
    assert await output(stub, source) == "0 False True"


VARIABLES = {
    "PYTHONPATH": ("import given; print(given.value)", "given"),
    "PYTHONHASHSEED": (
        "print(hash('text') == hash('text'), __import__('sys').flags.hash_randomization)",
        "True 1",
    ),
    "PYTHONUNBUFFERED": ("import sys; print(sys.stdout.write_through)", "True"),
    "PYTHONUTF8": ("import sys; print(sys.flags.utf8_mode)", "0"),
    "PYTHONOPTIMIZE": ("assert False; print('not checked')", "not checked"),
    "PYTHONWARNINGS": ("import warnings; warnings.warn('heard'); print('quiet')", "quiet"),
    "PYTHONINTMAXSTRDIGITS": ("import sys; print(sys.get_int_max_str_digits())", "640"),
    "PYTHONIOENCODING": ("import sys; print(sys.stdout.encoding)", "iso8859-1"),
}
VALUES = {
    "PYTHONHASHSEED": "3",
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "0",
    "PYTHONOPTIMIZE": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONINTMAXSTRDIGITS": "640",
    "PYTHONIOENCODING": "latin-1",
}


async def test_variables_for_python(tmp_path: Path) -> None:
    (tmp_path / "given.py").write_text("value = 'given'")
    env = {"PYTHONPATH": str(tmp_path), **VALUES}
    with running(tmp_path / "server", "--pass-env", ",".join(env), env=env) as server:
        async with server.connect() as stub:
            for name, (source, expected) in VARIABLES.items():
                assert await output(stub, source) == expected, name
            everything = "\n".join(source for source, _ in VARIABLES.values())
            child = (
                f"import subprocess, sys; subprocess.run([sys.executable, '-c', {everything!r}], check=True)"
            )
            assert (await output(stub, child)).split("\n") == [expected for _, expected in VARIABLES.values()]
            # Alike in all runs, in children and in the code itself.
            print_hash = "print(hash('a string'))"
            hashes = {await output(stub, print_hash) for _ in range(2)}
            hashes.add(await output(stub, child.replace(repr(everything), repr(print_hash))))
            assert len(hashes) == 1
            assert await output(stub, "import os, sys; print(os.getcwd() == sys.path[-1])") == "True"


async def test_tests_heed_variables_for_python(tmp_path: Path) -> None:
    (tmp_path / "given.py").write_text("value = 'given'")
    with running(
        tmp_path / "server", "--pass-env", "PYTHONPATH", env={"PYTHONPATH": str(tmp_path)}
    ) as server:
        async with server.connect() as stub:
            tests = "def test_it(): assert given.value == 'given'"
            answer = await stub.ExecuteTest(with_tests("import given", tests))
            assert answer.success, answer
            failed = await stub.Execute(code("1/0"))
            assert failed.error == "ZeroDivisionError: division by zero"
            assert 'File "<sandbox>.py", line 1' in failed.output


async def test_a_module_of_the_codes_does_not_run_in_the_supervisor(tmp_path: Path) -> None:
    """Which has the server's rights: nothing that code can write may get into it."""
    modules = tmp_path / "modules"
    modules.mkdir()
    env = {"PYTHONPATH": str(modules)}
    options = ["--pass-env", "PYTHONPATH", "--writable", str(modules)]
    with running(tmp_path / "server", *options, env=env) as server:
        async with server.connect() as stub:
            trap = "open('trapped', 'a').write(open('/proc/self/status').read())"
            names = ("ctypes", "marshal", "os", "resource", "select", "sitecustomize", "encodings")
            await output(stub, f"for n in {names}: open(f'{modules}/{{n}}.py', 'w').write({trap!r})")
            for _ in range(4):  # The spares were started before.
                await stub.Execute(code("print(1)"))
        workspace = next((tmp_path / "server").glob("prodisco-sandbox-*/workspace"))
        trapped = workspace / "trapped"
        assert not trapped.exists() or "NoNewPrivs:\t0" not in trapped.read_text()
        assert not list((tmp_path / "server").glob("**/trapped")) or trapped.exists()
