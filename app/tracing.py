"""Traces: OpenTelemetry spans of requests and jobs, sent over OTLP when an endpoint is configured, else nothing at all.

FastAPI and docket make the spans themselves (docket carries the trace through the queue); this module gives them a
provider. Metrics stay with Prometheus, logs with structlog.
"""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from opentelemetry import trace

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class TracingError(Exception):
    """Traces were asked for and cannot be sent; the message says what to do."""


def provider(endpoint: str, service: str) -> "TracerProvider | None":
    """The process's tracer provider, also made the global one; None where no endpoint is configured.

    Its `shutdown` sends the last spans and is the caller's to call.

    Args:
        endpoint: the collector's address; empty: OpenTelemetry's own environment variables.
        service: `service.name` of every span, unless OTEL_SERVICE_NAME says otherwise.
    """
    if not endpoint and not any(os.environ.get(name) for name in VARIABLES):
        return None
    if find_spec("opentelemetry.exporter") is None:
        raise TracingError("traces are configured, but OpenTelemetry is not installed: pip install 'headwater[otel]'")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create() if os.environ.get("OTEL_SERVICE_NAME") else Resource.create({SERVICE_NAME: service})
    made = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces") if endpoint else OTLPSpanExporter()
    made.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(made)
    return made
