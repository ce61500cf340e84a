from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import structlog

from prodisco_sandbox._log import get_logger
from tests.support.patience import PATIENCE


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


@pytest.fixture(autouse=True)
def _unconfigured() -> Iterator[None]:
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


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
        get_logger("manager").debug("sandbox_ready", name="sandbox-1", seconds=1.5)
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
    out, _ = run("import prodisco_sandbox, structlog; print(structlog.is_configured())")
    assert out == "False\n"


# Where the application has configured structlog


def test_its_processors_and_output_apply_and_the_standard_library_gets_nothing() -> None:
    out, err = run(
        "import structlog; structlog.configure(processors=[structlog.processors.add_log_level,"
        " structlog.processors.JSONRenderer(sort_keys=True)])\n"
        "log.info('sandbox_ready', name='sandbox-1', seconds=1.5); log.warning('delete_failed')"
    )
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "event": "sandbox_ready",
            "level": "info",
            "logger": "prodisco_sandbox.manager",
            "name": "sandbox-1",
            "seconds": 1.5,
        },
        {"event": "delete_failed", "level": "warning", "logger": "prodisco_sandbox.manager"},
    ]
    assert err == ""


def test_capture_logs_sees_the_events() -> None:
    log = get_logger("watch")
    with structlog.testing.capture_logs() as events:
        log.debug("a")
        log.info("b")
        log.warning("c")
        log.error("d", reason="e")
        log.log(logging.INFO, "f")
    logger = {"logger": "prodisco_sandbox.watch"}
    assert events == [
        {"event": "a", "log_level": "debug", **logger},
        {"event": "b", "log_level": "info", **logger},
        {"event": "c", "log_level": "warning", **logger},
        {"event": "d", "log_level": "error", "reason": "e", **logger},
        {"event": "f", "log_level": "info", **logger},
    ]


def test_bound_context_variables_appear() -> None:
    events: list[structlog.typing.EventDict] = []
    configure(structlog.contextvars.merge_contextvars, events=events)
    with structlog.contextvars.bound_contextvars(request="r1"):
        get_logger("manager").info("session_refused", reason="full")
    get_logger("manager").info("session_refused")
    assert events == [
        {"event": "session_refused", "logger": NAME, "reason": "full", "request": "r1"},
        {"event": "session_refused", "logger": NAME},
    ]


def test_its_level_filter_applies_and_every_event_is_counted() -> None:
    events: list[structlog.typing.EventDict] = []
    counts: Counter[str] = Counter()
    log = get_logger("manager", counts)
    log.info("a")
    configure(events=events, wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    log.info("a")
    log.warning("b")
    assert [event["event"] for event in events] == ["b"]
    assert counts == {"a": 2, "b": 1}


def test_it_may_be_configured_at_any_time_and_otherwise_later() -> None:
    log = get_logger("manager")
    first: list[structlog.typing.EventDict] = []
    second: list[structlog.typing.EventDict] = []
    with handled(logging.INFO) as output:
        log.info("a")
        for events in (first, second):
            configure(events=events)
            log.info("b")
        structlog.reset_defaults()
        log.info("c")
    assert output.getvalue() == "a\nc\n"
    assert [event["event"] for event in [*first, *second]] == ["b", "b"]
    assert len(second) == 1


def test_its_exceptions_have_their_traceback() -> None:
    events: list[structlog.typing.EventDict] = []
    configure(structlog.processors.format_exc_info, events=events, wrapper_class=structlog.BoundLogger)
    try:
        raise OSError("connection refused")
    except OSError:
        get_logger("manager").exception("reaper_failed", retry=True)
    assert events[0]["exception"].endswith("OSError: connection refused")
    assert events[0]["retry"] is True


def test_structlog_over_the_standard_library_gets_the_loggers_name_and_level() -> None:
    structlog.configure(
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
    )
    formatter = logging.Formatter("%(levelname)s %(name)s %(message)s")
    with handled(logging.INFO, formatter) as output:
        get_logger("manager").debug("unseen")
        get_logger("manager").info("sandbox_ready", seconds=1.5)
    assert output.getvalue() == f"INFO {NAME} event='sandbox_ready' logger='{NAME}' seconds=1.5\n"


NAME = "prodisco_sandbox.manager"


def configure(
    *processors: structlog.typing.Processor,
    events: list[structlog.typing.EventDict],
    wrapper_class: type[structlog.typing.BindableLogger] | None = None,
) -> None:
    """Configures structlog to append events to a list."""

    def keep(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        events.append(event)
        raise structlog.DropEvent

    structlog.configure(processors=[*processors, keep], wrapper_class=wrapper_class)
