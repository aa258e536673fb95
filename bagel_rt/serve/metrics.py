"""Metrics of ``/metrics``, in Prometheus' text format."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bagel_rt.model_thread import ModelThread

CLOSED = 499  # nginx's status for a client that disconnected
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self._registry), partial(Gauge, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        self.requests = counter("bagel_rt_requests", "Requests by route and status", ["route", "status"])
        self.seconds = histogram("bagel_rt_request_seconds", "Latency of requests", ["route"], buckets=_SECONDS)
        self.first_piece = histogram(
            "bagel_rt_first_token_seconds", "Time from a chat request to its first text", buckets=_SECONDS
        )
        self.waited = histogram("bagel_rt_queue_seconds", "Time in the queue", buckets=_SECONDS)
        self.batch = histogram("bagel_rt_batch_size", "Requests in a batch", buckets=(1, 2, 4, 8, 16, 32, 64))
        self.images = counter("bagel_rt_images", "Generated images")
        self.tokens = counter("bagel_rt_tokens", "Generated tokens")
        self.cancelled = counter("bagel_rt_cancelled", "Requests whose client disconnected")
        self._waiting = gauge("bagel_rt_queue", "Requests in the queue")
        self._running = gauge("bagel_rt_running", "Requests that the model works on")

    def watch(self, worker: ModelThread) -> None:
        """Read the queue gauges from a model thread."""
        self._waiting.set_function(lambda: worker.waiting)
        self._running.set_function(lambda: worker.running)

    def record(self, route: str, status: int, seconds: float) -> None:
        """Count a finished request; its status is 499 if the client disconnected before."""
        self.requests.labels(route, status).inc()
        self.seconds.labels(route).observe(seconds)
        if status == CLOSED:
            self.cancelled.inc()

    def observe(self, what: str, value: float) -> None:
        """Count what a model thread reports: "batch" or "waited"."""
        {"batch": self.batch, "waited": self.waited}[what].observe(value)

    def text(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        return generate_latest(self._registry)
