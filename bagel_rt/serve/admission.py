"""Count the requests and the body bytes that the server holds, in all and for each client."""

from collections import Counter

from bagel_rt.model_thread import Busy
from bagel_rt.serve.limits import Limits


class Admission:
    """The counts. A request is first receiving its body, then it is held; each phase has the same limit.

    Slow or unfinished bodies therefore cannot block requests that have arrived. One client
    address may use half of each limit, so that it cannot block other clients.
    """

    def __init__(self, limits: Limits):
        self._limits = {"receiving": limits.requests, "held": limits.requests, "bytes": limits.bodies}
        self._total: Counter[str] = Counter()
        self._of_client: Counter[tuple[str, str]] = Counter()

    def add(self, client: str, kind: str, amount: int = 1) -> None:
        """Count ``amount`` more of "receiving", "held" or "bytes". Busy if that exceeds a limit."""
        limit = self._limits[kind]
        if self._total[kind] + amount > limit or 2 * (self._of_client[client, kind] + amount) > limit:
            raise Busy
        self._total[kind] += amount
        self._of_client[client, kind] += amount

    def remove(self, client: str, kind: str, amount: int = 1) -> None:
        """Undo :meth:`add`."""
        self._total[kind] -= amount
        self._of_client[client, kind] -= amount
        if not self._of_client[client, kind]:
            del self._of_client[client, kind]


class Admitted:
    """One request of a client: moves from receiving to held, and is uncounted at its end.

    Attributes:
        complete: whether its body has arrived.
    """

    def __init__(self, admission: Admission, client: str):
        """Busy if the client, or all together, send too many requests."""
        self._admission, self._client, self._bytes, self.complete = admission, client, 0, False
        admission.add(client, "receiving")

    def receive(self, size: int) -> None:
        """Count bytes of the body. Busy if too many are held."""
        self._admission.add(self._client, "bytes", size)
        self._bytes += size

    def hold(self) -> None:
        """The body is complete. Busy if too many requests are held."""
        if not self.complete:
            self._admission.add(self._client, "held")
            self._admission.remove(self._client, "receiving")
            self.complete = True

    def release_body(self) -> None:
        """The body's bytes are no longer in memory."""
        self._admission.remove(self._client, "bytes", self._bytes)
        self._bytes = 0

    def close(self) -> None:
        """The request has ended."""
        self.release_body()
        self._admission.remove(self._client, "held" if self.complete else "receiving")
