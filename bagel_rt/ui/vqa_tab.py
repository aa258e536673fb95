"""The image understanding tab (visual question answering)."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from bagel_rt.models.bagel.settings import TASKS
from bagel_rt.request import ProgressCallback
from bagel_rt.ui.abilities import Abilities
from bagel_rt.ui.controls import EVENT, Controls, Updates, Values, resolve_seed, seed_control, think_control
from bagel_rt.ui.jobs import Jobs, View
from bagel_rt.ui.theme import hint, idle, status
from bagel_rt.ui.thoughts import split_thought
from bagel_rt.ui.uploads import images_input, open_uploads


class VqaTab:
    """Image understanding, added to the current Gradio layout. The order of its parts is that of ``ImageTab``.

    Attributes:
        input: control of the images.
        prompt: control of the question.
    """

    def __init__(self, jobs: Jobs, abilities: Abilities, examples: list[list[Any]]):
        """
        Args:
            jobs: runs the requests.
            abilities: of the model.
            examples: [images, question] each.
        """
        self.jobs, self._abilities = jobs, abilities
        self._controls = Controls(TASKS["chat"], prefix="ask")
        with gr.Row(elem_classes="task", elem_id="ask-tab"):
            with gr.Column(elem_classes="request", min_width=0):
                self._build_request()
            with gr.Column(elem_classes="result", min_width=0):
                self._build_result()
            with gr.Column(elem_classes="settings", min_width=0):
                gr.Examples(examples, [self.input, self.prompt], elem_id="ask-examples")
                with gr.Accordion("Settings", open=False, elem_id="ask-settings"):
                    self._think = think_control("ask", abilities.thinks)
                    self._controls.build("max_think_token_n")
                with gr.Accordion("Advanced", open=False, elem_id="ask-advanced"):
                    self._seed = seed_control("ask")
                    self._controls.build_rest()
        inputs = {self.input, self.prompt, self._think, self._seed, *self._controls.components.values()}
        outputs = [self._answer, self._status, self._hint, self._thoughts, self._thought, self._run, self._cancel]
        gr.on([self._run.click, self.prompt.submit], self._ask, inputs, outputs, **EVENT)
        self._cancel.click(self._stop, queue=False, **EVENT)

    def _build_request(self) -> None:
        self.input = images_input("ask-input", "Images")
        placeholder = f"Such as: {self._abilities.placeholders['ask']}"
        options = {"lines": 3, "max_lines": 12, "placeholder": placeholder, "elem_id": "ask-prompt"}
        self.prompt = gr.Textbox(label="Question", **options)
        self._hint = gr.HTML(elem_id="ask-hint", elem_classes="bare", visible=False)
        with gr.Row():
            self._run = gr.Button("Ask", variant="primary", elem_id="ask-run", elem_classes="run", scale=3)
            self._cancel = gr.Button("Cancel", interactive=False, elem_id="ask-cancel", scale=1, min_width=90)

    def _build_result(self) -> None:
        options = {"latex_delimiters": [], "line_breaks": True, "container": True}
        self._answer = gr.Markdown(min_height=220, buttons=["copy"], elem_id="ask-answer", **options)
        self._status = gr.HTML(idle("No question yet."), elem_id="ask-status", elem_classes="bare")
        with gr.Accordion("Thoughts", visible=False) as self._thoughts:
            self._thought = gr.Markdown(elem_id="ask-thought", latex_delimiters=[])

    def _stop(self, request: gr.Request) -> None:
        self.jobs.cancel((request.session_hash, "ask"))

    def _ask(self, values: Values, request: gr.Request) -> Iterator[Updates]:
        """Answer one question; yield updates of the page."""
        images, prompt = values[self.input], values[self.prompt]
        if not images and not prompt.strip():
            problem = "There is nothing to answer. Write a question, or click an example."
            yield {self._status: status(View("failed", error=problem))}
            return
        seed = resolve_seed(values[self._seed])
        options = self._controls.read(values) | {"seed": seed, "think": values[self._think]}

        def call(progress: ProgressCallback) -> str:
            return self.jobs.bagel.chat(prompt, open_uploads(images), progress=progress, **options)

        yield {
            self._answer: "",
            self._status: status(View("waiting")),
            self._hint: hint(self._abilities.hint([prompt]) if prompt.strip() else None),
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

    def _texts(self, view: View[str]) -> Updates:
        """The answer and the thought so far."""
        thought, answer = split_thought(view.text if view.result is None else view.result)
        return {self._answer: answer, self._thought: thought}
