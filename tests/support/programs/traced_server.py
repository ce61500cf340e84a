"""``python -m prodisco_sandbox.server`` in a program that has set up OpenTelemetry.

Called as Python is, with ``-m prodisco_sandbox.server`` and the server's options. The spans go to
the file that TRACED_SERVER_SPANS names, one JSON object a line.
"""

from __future__ import annotations

import os
import runpy
import sys

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

provider = TracerProvider()
# One write a span: several servers may append to the file.
spans = open(os.environ["TRACED_SERVER_SPANS"], "a", buffering=1)  # noqa: SIM115
exporter = ConsoleSpanExporter(out=spans, formatter=lambda span: span.to_json(indent=None) + "\n")
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
del sys.argv[1 : sys.argv.index("prodisco_sandbox.server") + 1]
runpy.run_module("prodisco_sandbox.server", run_name="__main__", alter_sys=True)
