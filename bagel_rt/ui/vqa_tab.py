"""The image understanding tab (visual question answering)."""

from collections.abc import Iterator

import gradio as gr

from bagel_rt.models.bagel.settings import TASKS
from bagel_rt.ui.controls import Controls, labeled, resolve_seed
from bagel_rt.ui.image_tab import EVENT, image_input, open_upload, seed_input
from bagel_rt.ui.jobs import Jobs, View
from bagel_rt.ui.theme import idle, status
from bagel_rt.ui.thoughts import split_thought


class VqaTab:
    """Image understanding, added to the current Gradio layout.

    Attributes:
        input: control of the image.
        prompt: control of the question.
    """

    def __init__(self, jobs: Jobs, examples: list[list[str]]):
        """``examples`` are [image, question] each."""
        self.jobs = jobs
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=340):
                self.input = image_input("ask-given")
                self.prompt = gr.Textbox(label="Question", lines=3, max_lines=12, elem_id="ask-prompt")
                self._think = labeled("think", gr.Checkbox, elem_id="ask-think")
                with gr.Row():
                    self._run = gr.Button("Ask", variant="primary", elem_id="ask-run", scale=3)
                    self._cancel = gr.Button("Cancel", interactive=False, elem_id="ask-cancel", scale=1, min_width=90)
                with gr.Accordion("Settings", open=False, elem_id="ask-settings"):
                    self._seed = seed_input("ask")
                    self._controls = Controls(TASKS["chat"].text, prefix="ask")
                gr.Examples(examples, [self.input, self.prompt])
            with gr.Column(scale=6, min_width=340):
                shown = {"latex_delimiters": [], "line_breaks": True, "container": True}
                self._answer = gr.Markdown(min_height=220, buttons=["copy"], elem_id="ask-answer", **shown)
                self._status = gr.HTML(idle("No question yet."), elem_id="ask-status", elem_classes="bare")
                with gr.Accordion("Thoughts", visible=False) as self._thoughts:
                    self._thought = gr.Markdown(elem_id="ask-thought", latex_delimiters=[])
        inputs = {self.input, self.prompt, self._think, self._seed, *self._controls.components.values()}
        outputs = [self._answer, self._status, self._thoughts, self._thought, self._run, self._cancel]
        gr.on([self._run.click, self.prompt.submit], self._ask, inputs, outputs, **EVENT)
        self._cancel.click(self._stop, queue=False, **EVENT)

    def _stop(self, request: gr.Request) -> None:
        self.jobs.cancel((request.session_hash, "ask"))

    def _ask(self, values: dict, request: gr.Request) -> Iterator[dict]:
        """Answer one question; yield updates of the page."""
        seed = resolve_seed(values[self._seed])
        options = self._controls.read(values) | {"seed": seed, "think": values[self._think]}
        path, prompt = values[self.input], values[self.prompt]

        def call(progress) -> str:
            images = [] if path is None else [open_upload(path)]
            return self.jobs.bagel.chat(prompt, images, progress=progress, **options)

        yield {
            self._answer: "",
            self._status: status(View("waiting")),
            self._thought: "",
            self._thoughts: gr.update(visible=values[self._think]),
            self._run: gr.update(interactive=False),
            self._cancel: gr.update(interactive=True),
        }
        words = f"Seed {seed}" if options["do_sample"] else "Done"
        for view in self.jobs.watch((request.session_hash, "ask"), call):
            changes = {self._status: status(view, words)} | self._texts(view)
            if view.ended:
                changes |= {self._run: gr.update(interactive=True), self._cancel: gr.update(interactive=False)}
            yield changes

    def _texts(self, view: View) -> dict:
        """The answer and the thought so far."""
        thought, answer = split_thought(view.result if view.stage == "done" else view.text)
        return {self._answer: answer, self._thought: thought}
