"""What a server accepts."""

from dataclasses import dataclass

from bagel_rt.models.bagel.settings import MAX_BATCH, MAX_INPUTS
from bagel_rt.validation import check_fields, checked, integer, number

_DAY = 86400


@dataclass(frozen=True)
class Limits:
    """Bounds of requests, checked before anything of that size is allocated. ValueError if one is out of range."""

    body: int = checked(integer(1), 32 << 20, help="Bytes of a request.")
    pixels: int = checked(integer(1), 1 << 24, help="Pixels of an image in a request, before it is decoded.")
    images: int = checked(integer(1, MAX_INPUTS - 1), 8, help="Images in a request.")
    prompt_tokens: int = checked(
        integer(1), 4096, help="Tokens of a request's texts, without the system prompts that the server adds."
    )
    side: int = checked(integer(1), 2048, help="Pixels of the longer side of a generated image.")
    steps: int = checked(integer(2), 200, help="Timesteps per image.")
    written_tokens: int = checked(integer(1), 4096, help="Tokens of a generated text.")
    outputs: int = checked(integer(1, MAX_BATCH), 10, help="Images, or answers, generated for one request.")
    connections: int = checked(
        integer(1), 1000, help="Open connections; one more closes the one that has been idle longest."
    )
    queue: int = checked(integer(1), 64, help="Requests in the queue; one more gets 429.")
    batch: int = checked(integer(1, MAX_BATCH), 8, help="Images generated in one batch.")
    seconds: float = checked(number(0, _DAY, above=True), 600.0, help="Seconds for a request, until 504.")
    grace: float = checked(
        number(0, _DAY, above=True), 30.0, help="Seconds for running requests to finish when the server stops."
    )

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def requests(self) -> int:
        """Requests held at once, with those being read and answered; one more is refused with 429.

        As many others may be receiving their bodies. One client address may take half of either.
        """
        return 2 * (self.queue + self.batch)

    @property
    def bodies(self) -> int:
        """Bytes of all bodies held at once, until their images are read; one more is refused with 429.

        One client address may take half.
        """
        return 8 * self.body
