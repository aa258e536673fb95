"""What ``/metrics`` tells, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CLOSED = 499  # the status that stands for a client that went away
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class Measures:
    """Counters of one server, in a registry of its own."""

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("bagel_rt_requests", "Answered requests", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "bagel_rt_request_seconds", "From a request to its answer", ["route"], buckets=_SECONDS, registry=registry
        )
        self.waited = Histogram("bagel_rt_queue_seconds", "Waiting for the model", buckets=_SECONDS, registry=registry)
        self.batch = Histogram(
            "bagel_rt_batch_size", "Pictures drawn together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.pictures = Counter("bagel_rt_pictures", "Pictures drawn", registry=registry)
        self.tokens = Counter("bagel_rt_tokens", "Tokens written", registry=registry)
        self.cancelled = Counter("bagel_rt_cancelled", "Requests whose client went away", registry=registry)
        self._waiting = Gauge("bagel_rt_queue", "Requests that wait", registry=registry)
        self._running = Gauge("bagel_rt_running", "Requests that the model works on", registry=registry)

    def watch(self, worker) -> None:
        """Tell a worker's queue and load when asked."""
        self._waiting.set_function(lambda: worker.waiting)
        self._running.set_function(lambda: worker.running)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request that has its answer, or whose client went away before (499)."""
        self.requests.labels(route, status).inc()
        self.seconds.labels(route).observe(seconds)
        if status == CLOSED:
            self.cancelled.inc()

    def observe(self, what: str, value: float) -> None:
        """What a worker reports: "batch" or "waited"."""
        {"batch": self.batch, "waited": self.waited}[what].observe(value)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
