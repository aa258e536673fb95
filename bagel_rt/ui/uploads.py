"""Uploaded images: the control for them, and reading them."""

from pathlib import Path

import gradio as gr
from PIL import Image

from bagel_rt.models.bagel.images import open_image

MAX_PIXELS = 1 << 24  # of an uploaded image, checked before it is decoded
MAX_UPLOAD = 32 << 20  # bytes of a file; checked in the browser, and by Gradio's server


def images_input(elem_id: str, label: str, render: bool = True) -> gr.Gallery:
    """A control for images; its value is a list of (path, caption), or None.

    A gallery passes files on unopened. An image control would decode them, and hide what is wrong with a file.
    """
    return gr.Gallery(
        label=label,
        type="filepath",
        interactive=True,
        sources=["upload", "clipboard"],
        file_types=["image"],
        columns=3,
        height=280,
        object_fit="contain",
        fit_columns=False,
        buttons=[],
        elem_id=elem_id,
        elem_classes=["sharp", "images"],
        render=render,
    )


def open_uploads(entries: list[tuple[str, str | None]] | None) -> list[Image.Image]:
    """Open the images in the value of a control. Errors as in :func:`open_upload`."""
    return [open_upload(path) for path, _ in entries or []]


def open_upload(path: str | Path) -> Image.Image:
    """Open an uploaded image.

    Raises:
        ValueError: not an image, or too large; the latter is found before it is decoded. The message has the file's
            name, not its path.
    """
    try:
        return open_image(path, MAX_PIXELS)
    except FileNotFoundError:  # a page may stay open for longer than its files are kept
        raise ValueError(f"{Path(path).name} has expired. Upload it again.") from None
    except ValueError as error:
        raise ValueError(str(error).replace(f"{path!s:.200}", Path(path).name)) from None
