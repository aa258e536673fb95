"""The tabs text to image and image editing."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from bagel_rt.models.bagel.settings import TASKS
from bagel_rt.request import ImageResult, ProgressCallback
from bagel_rt.ui.abilities import Abilities
from bagel_rt.ui.controls import (
    EVENT,
    Controls,
    Updates,
    Values,
    labeled,
    preset_sizes,
    resolve_seed,
    seed_control,
    think_control,
)
from bagel_rt.ui.gallery import Gallery
from bagel_rt.ui.jobs import Call, Jobs, View
from bagel_rt.ui.theme import hint, idle, status
from bagel_rt.ui.thoughts import strip_markers
from bagel_rt.ui.uploads import images_input, open_uploads

MAX_COUNT = 8  # images of one request


class ImageTab:
    """Text to image or image editing, added to the current Gradio layout.

    The parts are in the order of a phone: request, result, examples and settings. On a wide window the result is at the
    right of the others.

    Attributes:
        input: control of the images to edit; None in text to image.
        prompt: control of the text.
        result: control of the generated image; of several, the selected one.
        edit, ask: buttons that send the result to another tab.
    """

    def __init__(
        self,
        jobs: Jobs,
        gallery: Gallery,
        shown: gr.Gallery,
        abilities: Abilities,
        examples: list[list[Any]],
        edits: bool = False,
    ):
        """
        Args:
            jobs: runs the requests.
            gallery: receives the images.
            shown: control that shows the gallery.
            abilities: of the model.
            examples: [prompt] each, or [prompt, seed, result]; for editing, preceded by the list of images.
            edits: whether this is image editing.
        """
        self.jobs, self.gallery, self._shown, self._abilities = jobs, gallery, shown, abilities
        self._name = "edit" if edits else "draw"
        self._controls = Controls(TASKS["edit" if edits else "generate"], prefix=self._name)
        self.input = images_input("edit-input", "Images to edit", render=False) if edits else None
        with gr.Row(elem_classes="task", elem_id=f"{self._name}-tab"):
            with gr.Column(elem_classes="request", min_width=0):
                self._build_request()
            with gr.Column(elem_classes="result", min_width=0):
                self._build_result()
            with gr.Column(elem_classes="settings", min_width=0):
                place = gr.Column()
                with gr.Accordion("Settings", open=False, elem_id=f"{self._name}-settings"):
                    self._build_settings()
                with gr.Accordion("Advanced", open=False, elem_id=f"{self._name}-advanced"):
                    self._build_advanced()
        self._wire()
        with place:  # after the controls that the examples fill in
            self._build_examples(examples)

    def _build_request(self) -> None:
        name, placeholder = self._name, f"Such as: {self._abilities.placeholders[self._name]}"
        if self.input is not None:
            self.input.render()
            gr.HTML("Of several images, the last one determines the size of the result.", elem_classes=["bare", "note"])
        label = "What to draw" if self.input is None else "What to change"
        options = {"lines": 3, "max_lines": 12, "placeholder": placeholder, "elem_id": f"{name}-prompt"}
        self.prompt = gr.Textbox(label=label, autofocus=self.input is None, **options)
        self._hint = gr.HTML(elem_id=f"{name}-hint", elem_classes="bare", visible=False)
        self._sizes = preset_sizes(self.jobs.bagel.model.config)
        if self.input is None:
            self._ratio = gr.Radio(list(self._sizes), value="1:1", label="Aspect ratio", elem_id="draw-aspect-ratio")
        with gr.Row():
            words = "Draw" if self.input is None else "Edit"
            self._run = gr.Button(words, variant="primary", elem_id=f"{name}-run", elem_classes="run", scale=3)
            self._cancel = gr.Button("Cancel", interactive=False, elem_id=f"{name}-cancel", scale=1, min_width=90)

    def _build_settings(self) -> None:
        limits = {"minimum": 1, "maximum": MAX_COUNT, "step": 1, "precision": 0, "value": 1}
        self._count = labeled("count", gr.Slider, elem_id=f"{self._name}-count", **limits)
        self._seed = seed_control(self._name)
        self._think = think_control(self._name, self._abilities.thinks)
        self._negative = labeled("negative_prompt", gr.Textbox, lines=1, elem_id=f"{self._name}-negative_prompt")
        scales = ("cfg_text_scale",) if self.input is None else ("cfg_text_scale", "cfg_img_scale")
        self._controls.build(*scales, "num_timesteps")

    def _build_advanced(self) -> None:
        if self.input is None:
            config = self.jobs.bagel.model.config
            step = config.latent_stride
            limits = {"minimum": step, "maximum": config.largest_side, "step": step, "precision": 0}
            height, width = self._sizes["1:1"]
            with gr.Row():
                self._width = gr.Slider(value=width, label="Width, pixels", elem_id="draw-width", **limits)
                self._height = gr.Slider(value=height, label="Height, pixels", elem_id="draw-height", **limits)
        self._controls.build_rest()
        self._previews = labeled("previews", gr.Checkbox, value=True)

    def _build_result(self) -> None:
        name = self._name
        options = {"type": "filepath", "interactive": False, "buttons": ["download", "fullscreen"]}
        self.result = gr.Image(
            label="Result", height=520, elem_id=f"{name}-result", elem_classes=["fitted", "sharp"], **options
        )
        self._status = gr.HTML(idle("No image yet."), elem_id=f"{name}-status", elem_classes="bare")
        self._batch = gr.Gallery(
            label="Images of this request",
            columns=4,
            height="auto",
            object_fit="contain",
            fit_columns=False,
            allow_preview=False,
            interactive=False,
            buttons=[],
            visible=False,
            elem_id=f"{name}-batch",
            elem_classes=["sharp", "images"],
        )
        with gr.Row():
            words = "Edit this" if self.input is None else "Edit further"
            options = {"size": "sm", "interactive": False, "min_width": 90}  # side by side on a phone
            self.edit = gr.Button(words, elem_id=f"{name}-to-edit", **options)
            self.ask = gr.Button("Ask about this", elem_id=f"{name}-to-ask", **options)
            self._again = gr.Button("Keep its seed", elem_id=f"{name}-again", **options)
        with gr.Accordion("Thoughts", visible=False) as self._thoughts:
            self._thought = gr.Markdown(elem_id=f"{name}-thought", latex_delimiters=[])

    def _wire(self) -> None:
        self._seeds = gr.State([])  # seeds of the last images
        self._used = gr.State(-1)  # seed of the shown image
        inputs = {self.prompt, self._seed, self._count, self._think, self._negative, self._previews}
        inputs |= set(self._controls.components.values())
        inputs |= {self._height, self._width} if self.input is None else {self.input}
        outputs = [self.result, self._status, self._hint, self._thoughts, self._thought, self._run, self._cancel]
        outputs += [self._used, self._seeds, self._batch, self._shown, self.edit, self.ask, self._again]
        gr.on([self._run.click, self.prompt.submit], self._draw, inputs, outputs, **EVENT)
        self._cancel.click(self._stop, queue=False, **EVENT)
        self._again.click(lambda seed: seed, self._used, self._seed, queue=False, **EVENT)
        self._batch.select(_select, [self._batch, self._seeds], [self.result, self._used], queue=False, **EVENT)
        if self.input is None:
            sides = [self._height, self._width]
            self._ratio.input(lambda ratio: self._sizes[ratio], self._ratio, sides, queue=False, **EVENT)

    def _build_examples(self, examples: list[list[Any]]) -> None:
        filled = [*([] if self.input is None else [self.input]), self.prompt, self._seed, self.result]
        dataset = gr.Examples(examples, filled[: len(examples[0])], elem_id=f"{self._name}-examples")
        updates = {self._hint: hint(None), self._batch: gr.update(visible=False)}
        if len(examples[0]) == len(filled):  # with a stored result
            updates[self._status] = idle("A stored result, made with this seed and the default settings.")
            updates |= {button: gr.update(interactive=True) for button in (self.edit, self.ask)}
        dataset.load_input_event.then(lambda: updates, None, list(updates), queue=False, **EVENT)

    def _stop(self, request: gr.Request) -> None:
        self.jobs.cancel((request.session_hash, self._name))

    def _problem(self, values: Values) -> str | None:
        """Why the request cannot run, or None."""
        if self.input is not None and not values[self.input]:
            return "There is no image to edit. Upload one, or click an example."
        if not values[self.prompt].strip():
            verb = "draw" if self.input is None else "change"
            return f"The prompt is empty. Describe what to {verb}, or click an example."
        return None

    def _draw(self, values: Values, request: gr.Request) -> Iterator[Updates]:
        """Run one request; yield updates of the page."""
        if problem := self._problem(values):
            yield {self._status: status(View("failed", error=problem))}
            return
        page, seed, count = request.session_hash, resolve_seed(values[self._seed]), int(values[self._count])
        self.gallery.enter(page)
        yield {
            self.result: None,
            self._status: status(View("waiting")),
            self._hint: hint(self._abilities.hint([values[self.prompt]])),
            self._thought: "",
            self._thoughts: gr.update(visible=values[self._think]),
            self._run: gr.update(interactive=False),
            self._cancel: gr.update(interactive=True),
            self._batch: gr.update(value=[], visible=False),
            self._seeds: [],
        } | self._enable(False)
        finished: list[ImageResult] = []
        call = self._call(values, list(range(seed, seed + count)), finished)
        for view in self.jobs.watch((page, self._name), call, values[self._previews]):
            edited = self.input is not None and count > 1
            changes: Updates = {
                self._status: status(view, prefix=f"Image {len(finished) + 1} of {count}. " if edited else "")
            }
            if view.text:
                changes[self._thought] = strip_markers(view.text)
            if view.image is not None and not view.ended:
                changes[self.result] = self.gallery.preview(page, self._name, view.image)
            if view.stage == "done" and view.result:
                changes |= self._finished(view, view.result, page, values)
            if view.ended:
                changes |= {self._run: gr.update(interactive=True), self._cancel: gr.update(interactive=False)}
            yield changes

    def _call(self, values: Values, seeds: list[int], finished: list[ImageResult]) -> Call[list[ImageResult]]:
        """The call of the model, one image for each seed; images of an edit are added to ``finished`` one by one."""
        options = self._controls.read(values)
        options |= {"think": values[self._think], "negative_prompt": values[self._negative] or None}
        bagel, prompt = self.jobs.bagel, values[self.prompt]

        def generate(progress: ProgressCallback) -> list[ImageResult]:
            size = (values[self._height], values[self._width])
            results = bagel.generate([prompt] * len(seeds), size=size, seed=seeds, progress=progress, **options)
            return results if isinstance(results, list) else [results]

        def edit(progress: ProgressCallback) -> list[ImageResult]:
            images = open_uploads(values[self.input])
            for seed in seeds:
                result = bagel.edit(images, prompt, seed=seed, progress=progress, **options)
                finished.append(result)  # one by one: the status line shows its length
            return finished

        return generate if self.input is None else edit

    def _finished(self, view: View[Any], results: list[ImageResult], page: str, values: Values) -> Updates:
        """Updates of the page with the final images."""
        prompt, entries, seeds = values[self.prompt], [], [result.seed for result in results]
        for number, result in enumerate(results, start=1):
            path = self.gallery.add(page, result, prompt, prompt=prompt, think=values[self._think])
            entries += [(path, f"Image {number}")] if path else []
        if not entries:  # the page has left
            return {}
        image, thought = results[0].image, results[0].thought
        words = f"Seed {seeds[0]} · {image.width}x{image.height} pixels"
        if len(seeds) > 1:
            words = f"{len(seeds)} images, seeds {seeds[0]} to {seeds[-1]} · {image.width}x{image.height} pixels"
        changes = {
            self.result: entries[0][0],
            self._used: seeds[0],
            self._seeds: seeds,
            self._batch: gr.update(value=entries, visible=len(entries) > 1, selected_index=0),
            self._shown: gr.update(value=self.gallery.images(page), visible=True),
            self._status: status(view, words),
        }
        if thought is not None:
            changes[self._thought] = strip_markers(thought)
        return changes | self._enable(True)

    def _enable(self, enabled: bool) -> Updates:
        """Enable or disable the buttons that use the result."""
        return {button: gr.update(interactive=enabled) for button in (self.edit, self.ask, self._again)}


def _select(entries: list[tuple[str, str | None]], seeds: list[int], event: gr.SelectData) -> tuple[str, int]:
    """The path and the seed of the image that was clicked in a batch."""
    return entries[event.index][0], seeds[event.index]
