"""What a server accepts."""

from dataclasses import dataclass, fields

from bagel_rt.models.bagel.settings import MAX_BATCH, MAX_INPUTS

_DAY = 86400


@dataclass(frozen=True)
class Limits:
    """Bounds of requests; whatever is beyond one is refused before anything of its size exists.

    Attributes:
        body: bytes of a request.
        pixels: of a picture in a request, before it is decoded.
        images: pictures in a request.
        prompt_tokens: of all texts in a request, without the system prompts that the server adds.
        side: pixels of a picture to be drawn, either way.
        steps: timesteps of a picture.
        written_tokens: that a text may have.
        pictures: of one request, ``n``.
        queue: pictures and answers that wait for the model; one more is refused with 429.
        batch: pictures that are drawn together.
        seconds: from a request's arrival to its answer.
        grace: seconds that requests under way have when the server is told to stop.

    Raises:
        ValueError: a bound is not positive, or above what the model's code can take.
    """

    body: int = 32 << 20
    pixels: int = 1 << 24
    images: int = 8
    prompt_tokens: int = 4096
    side: int = 2048
    steps: int = 200
    written_tokens: int = 4096
    pictures: int = 8
    queue: int = 64
    batch: int = 8
    seconds: float = 600.0
    grace: float = 30.0

    def __post_init__(self):
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}: allowed are numbers above 0")
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}: allowed are numbers from 2, the fewest that make a picture")
        for name, most in (
            ("batch", MAX_BATCH),
            ("pictures", MAX_BATCH),
            ("images", MAX_INPUTS - 1),
            ("seconds", _DAY),
            ("grace", _DAY),
        ):
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}: allowed are numbers up to {most}")

    @property
    def requests(self) -> int:
        """Requests that are held at once, with those that are being read and answered; one more is refused with 429."""
        return 2 * (self.queue + self.batch)

    @property
    def bodies(self) -> int:
        """Bytes of all bodies that are held at once, until their pictures are read; one more is refused with 429."""
        return 8 * self.body
