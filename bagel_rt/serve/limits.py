"""What a server accepts."""

from dataclasses import dataclass

from bagel_rt.models.bagel.settings import MAX_BATCH, MAX_INPUTS
from bagel_rt.validation import check_fields, checked, integer, number

_DAY = 86400


@dataclass(frozen=True)
class Limits:
    """Bounds of requests, checked before anything of that size is allocated.

    Attributes:
        body: bytes of a request.
        pixels: of an image in a request, before it is decoded.
        images: images in a request.
        prompt_tokens: of all texts in a request, without the system prompts that the server adds.
        side: pixels of an image to be drawn, either way.
        steps: timesteps of an image; at least 2, the fewest that make one.
        written_tokens: that a text may have.
        pictures: images of one request, ``n``.
        queue: requests that wait for the model; one more is refused with 429.
        batch: images that are drawn together.
        seconds: from a request's arrival to its answer.
        grace: seconds that running requests have to finish when the server is told to stop.

    Raises:
        ValueError: a bound is out of range.
    """

    body: int = checked(integer(1), 32 << 20)
    pixels: int = checked(integer(1), 1 << 24)
    images: int = checked(integer(1, MAX_INPUTS - 1), 8)
    prompt_tokens: int = checked(integer(1), 4096)
    side: int = checked(integer(1), 2048)
    steps: int = checked(integer(2), 200)
    written_tokens: int = checked(integer(1), 4096)
    pictures: int = checked(integer(1, MAX_BATCH), 8)
    queue: int = checked(integer(1), 64)
    batch: int = checked(integer(1, MAX_BATCH), 8)
    seconds: float = checked(number(0, _DAY, above=True), 600.0)
    grace: float = checked(number(0, _DAY, above=True), 30.0)

    def __post_init__(self):
        check_fields(self)

    @property
    def requests(self) -> int:
        """Requests held at once, with those being read and answered; one more is refused with 429."""
        return 2 * (self.queue + self.batch)

    @property
    def bodies(self) -> int:
        """Bytes of all bodies held at once, until their images are read; one more is refused with 429."""
        return 8 * self.body
