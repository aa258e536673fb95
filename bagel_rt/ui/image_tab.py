"""The tabs text to image and image editing."""

from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from PIL import Image, ImageOps

from bagel_rt.models.bagel.images import open_image
from bagel_rt.models.bagel.settings import TASKS
from bagel_rt.ui.controls import SEED_LIMIT, Controls, labeled, preset_sizes, resolve_seed
from bagel_rt.ui.gallery import Gallery
from bagel_rt.ui.jobs import Jobs, View
from bagel_rt.ui.theme import idle, status
from bagel_rt.ui.thoughts import strip_markers

MAX_PIXELS = 1 << 24  # of an uploaded image, checked before it is decoded
EVENT = {"show_progress": "hidden", "api_visibility": "private"}


class ImageTab:
    """Text to image or image editing, added to the current Gradio layout.

    Attributes:
        input: control of the image to edit; None in text to image.
        prompt: control of the text.
        result: control of the generated image.
        edit, ask: buttons that send the result to another tab.
    """

    def __init__(self, jobs: Jobs, gallery: Gallery, shown: gr.Gallery, examples: list[list], edits: bool = False):
        """
        Args:
            shown: control that shows the gallery.
            examples: [prompt] each, or [prompt, seed, result]; for editing, preceded by the image.
        """
        self.jobs, self.gallery, self._shown, self.edits = jobs, gallery, shown, edits
        self._name = "edit" if edits else "draw"
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=340) as left:
                self._build_request()
                with gr.Accordion("Settings", open=False, elem_id=f"{self._name}-settings"):
                    self._build_settings()
            with gr.Column(scale=6, min_width=340):
                self._build_result()
        self._wire()
        with left:
            self._build_examples(examples)

    def _build_request(self) -> None:
        name, edits = self._name, self.edits
        self.input = image_input("edit-given") if edits else None
        label = "What to change" if edits else "What to draw"
        self.prompt = gr.Textbox(label=label, lines=3, max_lines=12, elem_id=f"{name}-prompt", autofocus=not edits)
        self._shapes = preset_sizes(self.jobs.bagel.model.config)
        if not edits:
            self._shape = gr.Radio(list(self._shapes), value="1:1", label="Shape", elem_id="draw-shape")
        self._think = labeled("think", gr.Checkbox, elem_id=f"{name}-think")
        with gr.Row():
            words = "Edit" if edits else "Draw"
            self._run = gr.Button(words, variant="primary", elem_id=f"{name}-run", scale=3)
            self._cancel = gr.Button("Cancel", interactive=False, elem_id=f"{name}-cancel", scale=1, min_width=90)

    def _build_settings(self) -> None:
        self._seed = seed_input(self._name)
        if not self.edits:
            config = self.jobs.bagel.model.config
            step = config.latent_stride
            limits = {"minimum": step, "maximum": config.largest_side, "step": step, "precision": 0}
            height, width = self._shapes["1:1"]
            with gr.Row():
                self._width = gr.Slider(value=width, label="Width, pixels", **limits)
                self._height = gr.Slider(value=height, label="Height, pixels", **limits)
        self._negative = labeled("negative_prompt", gr.Textbox, lines=1)
        self._controls = Controls(*TASKS["edit" if self.edits else "generate"], prefix=self._name)
        self._previews = labeled("previews", gr.Checkbox, value=True)

    def _build_result(self) -> None:
        name = self._name
        shown = {"type": "filepath", "interactive": False, "buttons": ["download", "fullscreen"]}
        self.result = gr.Image(label="Result", height=520, elem_id=f"{name}-result", elem_classes="fitted", **shown)
        self._status = gr.HTML(idle("No image yet."), elem_id=f"{name}-status", elem_classes="bare")
        with gr.Row():
            words = "Edit further" if self.edits else "Edit this"
            self.edit = gr.Button(words, size="sm", interactive=False, elem_id=f"{name}-to-edit")
            self.ask = gr.Button("Ask about this", size="sm", interactive=False, elem_id=f"{name}-to-ask")
            self._again = gr.Button("Keep its seed", size="sm", interactive=False, elem_id=f"{name}-again")
        with gr.Accordion("Thoughts", visible=False) as self._thoughts:
            self._thought = gr.Markdown(elem_id=f"{name}-thought", latex_delimiters=[])

    def _build_examples(self, examples: list[list]) -> None:
        filled = [*([self.input] if self.edits else []), self.prompt, self._seed, self.result]
        shown = gr.Examples(examples, filled[: len(examples[0])])
        if len(examples[0]) == len(filled):  # with a stored result
            updates = {self._status: idle("A stored result, made with this seed and the default settings.")}
            updates |= {button: gr.update(interactive=True) for button in (self.edit, self.ask)}
            shown.load_input_event.then(lambda: updates, None, list(updates), queue=False, **EVENT)

    def _wire(self) -> None:
        self._used = gr.State(-1)  # seed of the last image
        inputs = {self.prompt, self._seed, self._think, self._negative, self._previews}
        inputs |= set(self._controls.components.values())
        inputs |= {self.input} if self.edits else {self._height, self._width}
        outputs = [self.result, self._status, self._thoughts, self._thought, self._run, self._cancel, self._used]
        outputs += [self._shown, self.edit, self.ask, self._again]
        gr.on([self._run.click, self.prompt.submit], self._draw, inputs, outputs, **EVENT)
        self._cancel.click(self._stop, queue=False, **EVENT)
        self._again.click(lambda seed: seed, self._used, self._seed, queue=False, **EVENT)
        if not self.edits:
            self._shape.input(
                lambda shape: self._shapes[shape], self._shape, [self._height, self._width], queue=False, **EVENT
            )

    def _stop(self, request: gr.Request) -> None:
        self.jobs.cancel((request.session_hash, self._name))

    def _draw(self, values: dict, request: gr.Request) -> Iterator[dict]:
        """Run one request; yield updates of the page."""
        page, seed = request.session_hash, resolve_seed(values[self._seed])
        self.gallery.enter(page)
        yield {
            self.result: None,
            self._status: status(View("waiting")),
            self._thought: "",
            self._thoughts: gr.update(visible=values[self._think]),
            self._run: gr.update(interactive=False),
            self._cancel: gr.update(interactive=True),
            self._used: seed,
        } | self._enable(False)
        for view in self.jobs.watch((page, self._name), self._call(values, seed), values[self._previews]):
            changes = {self._status: status(view)}
            if view.text:
                changes[self._thought] = strip_markers(view.text)
            if view.image is not None and not view.ended:
                changes[self.result] = self.gallery.preview(page, self._name, view.image)
            if view.stage == "done":
                changes |= self._finished(view, page, values)
            if view.ended:
                changes |= {self._run: gr.update(interactive=True), self._cancel: gr.update(interactive=False)}
            yield changes

    def _call(self, values: dict, seed: int):
        """The call of the model: takes a progress callback, returns an ImageResult."""
        options = self._controls.read(values)
        options |= {"seed": seed, "think": values[self._think], "negative_prompt": values[self._negative] or None}
        bagel, prompt = self.jobs.bagel, values[self.prompt]

        def call(progress):
            if not self.edits:
                size = (values[self._height], values[self._width])
                return bagel.generate(prompt, size=size, progress=progress, **options)
            if (path := values[self.input]) is None:
                raise ValueError("There is no image to edit. Upload one, or click an example.")
            return bagel.edit(open_upload(path), prompt, progress=progress, **options)

        return call

    def _finished(self, view: View, page: str, values: dict) -> dict:
        """Updates of the page with the final image."""
        result, prompt = view.result, values[self.prompt]
        path = self.gallery.add(page, result, prompt, prompt=prompt, think=values[self._think])
        words = f"Seed {result.seed} · {result.image.width} × {result.image.height} pixels"
        changes = {
            self.result: path,
            self._shown: gr.update(value=self.gallery.images(page), visible=True),
            self._status: status(view, words),
        }
        if result.thought is not None:
            changes[self._thought] = strip_markers(result.thought)
        return changes | self._enable(True)

    def _enable(self, enabled: bool) -> dict:
        """Enable or disable the buttons that use the result."""
        return {button: gr.update(interactive=enabled) for button in (self.edit, self.ask, self._again)}


def seed_input(task: str) -> gr.Number:
    """A control for the seed; -1 for a new one each time."""
    limits = {"precision": 0, "minimum": -1, "maximum": SEED_LIMIT}
    return labeled("seed", gr.Number, value=-1, elem_id=f"{task}-seed", **limits)


def image_input(elem_id: str) -> gr.Image:
    """A control for an image; its value is the path of the uploaded file."""
    sources = ["upload", "clipboard"]
    control = gr.Image(label="Image", height=280, sources=sources, elem_id=elem_id, elem_classes="fitted")
    # Gradio would decode the file here, and hide what is wrong with it.
    control.preprocess = lambda payload: payload and payload.path
    return control


def open_upload(path: str | Path) -> Image.Image:
    """Open an uploaded image in the orientation of its EXIF data: phones often store photos sideways.

    Raises:
        ValueError: not an image, or too large; the latter is found before it is decoded. The message has the file's
            name, not its path.
    """
    try:
        image = open_image(path, MAX_PIXELS)
    except FileNotFoundError:  # a page may stay open for longer than its files are kept
        raise ValueError(f"{Path(path).name} has expired. Upload it again.") from None
    except ValueError as error:
        raise ValueError(str(error).replace(f"{path!s:.200}", Path(path).name)) from None
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data; Pillow's parsers raise all kinds of exceptions
        return image
