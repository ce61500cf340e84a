from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import structlog
from _patience import PATIENCE

from prodisco_sandbox._log import get_logger


def run(code: str) -> tuple[str, str]:
    """What a fresh interpreter prints on standard output and standard error."""
    prelude = "from prodisco_sandbox._log import get_logger; log = get_logger('manager')\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + code],
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return done.stdout, done.stderr


@contextmanager
def handled(level: int, formatter: logging.Formatter | None = None) -> Iterator[io.StringIO]:
    """The output of a handler on the library's logger."""
    logger, output = logging.getLogger("prodisco_sandbox"), io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(formatter)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield output
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def test_silent_on_both_outputs_until_the_program_configures_logging() -> None:
    assert run("log.debug('sandbox_created'); log.info('sandbox_ready', name='sandbox-1')") == ("", "")


def test_warnings_go_to_standard_error_and_never_to_standard_output() -> None:
    out, err = run("log.warning('delete_failed', name='sandbox-1', status=503)")
    assert (out, err) == ("", "delete_failed name='sandbox-1' status=503\n")


def test_a_program_that_configures_structlog_for_itself_changes_nothing() -> None:
    out, err = run(
        "import structlog; structlog.configure(logger_factory=structlog.PrintLoggerFactory(),"
        " wrapper_class=structlog.BoundLogger, processors=[structlog.processors.JSONRenderer()])\n"
        "log.info('sandbox_ready'); log.warning('delete_failed')"
    )
    assert (out, err) == ("", "delete_failed\n")


def test_the_standard_librarys_configuration_rules() -> None:
    out, err = run(
        "import logging\n"
        "logging.basicConfig(level=logging.INFO, format='%(levelname)s %(name)s %(message)s')\n"
        "log.info('sandbox_ready', name='sandbox-1'); log.debug('unseen')"
    )
    assert (out, err) == ("", "INFO prodisco_sandbox.manager sandbox_ready name='sandbox-1'\n")


def test_the_pairs_are_on_the_record_for_handlers_that_write_json() -> None:
    class Json(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return json.dumps(record.__dict__["sandbox"])

    with handled(logging.DEBUG, Json()) as output:
        get_logger("manager").bind(name="sandbox-1").debug("sandbox_ready", seconds=1.5)
    assert json.loads(output.getvalue()) == {"event": "sandbox_ready", "name": "sandbox-1", "seconds": 1.5}


def test_levels_are_the_standard_librarys(caplog: pytest.LogCaptureFixture) -> None:
    log = get_logger("watch")
    with caplog.at_level(logging.DEBUG, "prodisco_sandbox"):
        log.debug("a")
        log.info("b")
        log.warning("c")
        log.error("d")
    assert {record.filename for record in caplog.records} == {"test_log.py"}, "not structlog's"
    seen = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert seen == [("prodisco_sandbox.watch", *pair) for pair in zip(LEVELS, "abcd", strict=True)]


LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def test_a_level_that_is_off_renders_nothing() -> None:
    class Costly:
        def __repr__(self) -> str:
            raise AssertionError("rendered")

    with handled(logging.WARNING) as output:
        get_logger("manager").info("sandbox_ready", value=Costly())
    assert output.getvalue() == ""


def test_an_exception_is_logged_with_its_traceback() -> None:
    with handled(logging.INFO) as output:
        try:
            raise OSError("connection refused")
        except OSError:
            get_logger("manager").exception("reaper_failed", retry=True)
    first, *rest = output.getvalue().splitlines()
    assert first == "reaper_failed retry=True"
    assert rest[0].startswith("Traceback")
    assert output.getvalue().count("Traceback") == 1
    assert rest[-1] == "OSError: connection refused"


def test_percent_signs_are_text() -> None:
    with handled(logging.INFO) as output:
        get_logger("manager").info("100% of %s", text="%d")
    assert output.getvalue() == "100% of %s text='%d'\n"


def test_importing_configures_no_structlog() -> None:
    assert not structlog.is_configured()
