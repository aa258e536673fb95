"""The chat tab: interleaved texts and images, turn by turn."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from bagel_rt.models.bagel.settings import MAX_CHARACTERS, MAX_INPUTS, MAX_ROUNDS, TASKS
from bagel_rt.request import ImageResult, ImageSource, ProgressCallback
from bagel_rt.ui.abilities import Abilities
from bagel_rt.ui.controls import EVENT, Controls, Updates, Values, labeled, resolve_seed, seed_control, think_control
from bagel_rt.ui.gallery import Gallery
from bagel_rt.ui.jobs import Jobs, View
from bagel_rt.ui.theme import hint, idle, status
from bagel_rt.ui.thoughts import split_thought
from bagel_rt.ui.uploads import open_upload

_TEXTS_AND_IMAGES = "Texts and images in any order. This model also generates images where it decides to."
_TEXTS_ONLY = "Texts and images in any order. This model answers with text: it was not trained to generate images here."
_IDLE = idle("No messages yet.")
Part = str | Path  # a text or an image file
Turn = tuple[str, list[Part]]  # "user" or "assistant", and its parts
Answer = list[str | ImageResult]


class ChatTab:
    """Interleaved chat, added to the current Gradio layout. Each turn sends the whole conversation to the model."""

    def __init__(
        self, jobs: Jobs, gallery: Gallery, shown: gr.Gallery, abilities: Abilities, examples: list[list[Any]]
    ):
        """
        Args:
            jobs: runs the requests.
            gallery: receives the images.
            shown: control that shows the gallery.
            abilities: of the model.
            examples: [message] each.
        """
        self.jobs, self.gallery, self._shown, self._abilities = jobs, gallery, shown, abilities
        self._controls = Controls(TASKS["interleave"], prefix="chat")
        with gr.Row(equal_height=False, elem_classes="chat", elem_id="chat-tab"):
            with gr.Column(scale=7, min_width=300):
                self._build_conversation()
                gr.Examples(examples, [self.message], elem_id="chat-examples")
            with gr.Column(scale=4, min_width=300):
                self._build_settings()
        self._turns: gr.State = gr.State([])
        inputs = {self.message, self._turns, self._think, self._seed, self._rounds, self._previews}
        inputs |= set(self._controls.components.values())
        outputs = [self._chat, self.message, self._status, self._hint, self._turns, self._shown, self._new]
        self.message.submit(self._talk, inputs, outputs, **EVENT)
        self.message.stop(self._stop, queue=False, **EVENT)
        fresh = [self._chat, self._turns, self._status]
        self._new.click(lambda: ([], [], _IDLE), None, fresh, queue=False, **EVENT)

    def _build_conversation(self) -> None:
        self._chat = gr.Chatbot(
            label="Conversation",
            height=480,
            elem_id="chat-messages",
            elem_classes="sharp",
            placeholder=_TEXTS_AND_IMAGES if self._abilities.draws_in_chat else _TEXTS_ONLY,
            buttons=[],
            feedback_options=None,
        )
        self.message = gr.MultimodalTextbox(
            label="Message",
            show_label=False,
            placeholder=self._abilities.placeholders["chat"],
            max_plain_text_length=MAX_CHARACTERS,
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            elem_id="chat-message",
        )
        self._status = gr.HTML(_IDLE, elem_id="chat-status", elem_classes="bare")
        self._hint = gr.HTML(elem_id="chat-hint", elem_classes="bare", visible=False)

    def _build_settings(self) -> None:
        self._new = gr.Button("New conversation", elem_id="chat-new")
        with gr.Accordion("Settings", open=False, elem_id="chat-settings"):
            self._think = think_control("chat", self._abilities.thinks, value=self._abilities.thinks)
            self._controls.build("max_think_token_n", "num_timesteps")
        with gr.Accordion("Advanced", open=False, elem_id="chat-advanced"):
            self._seed = seed_control("chat")
            rounds = {"minimum": 1, "maximum": MAX_ROUNDS, "step": 1, "precision": 0, "value": 3}
            self._rounds = labeled("max_rounds", gr.Slider, **rounds)
            self._controls.build_rest()
            self._previews = labeled("previews", gr.Checkbox, value=True)

    def _stop(self, request: gr.Request) -> None:
        self.jobs.cancel((request.session_hash, "chat"))

    def _talk(self, values: Values, request: gr.Request) -> Iterator[Updates]:
        """Run one turn; yield updates of the page."""
        page, seed, message = request.session_hash, resolve_seed(values[self._seed]), values[self.message]
        options = self._controls.read(values)
        options |= {"seed": seed, "think": values[self._think], "max_rounds": values[self._rounds]}
        files: list[Part] = [Path(file) for file in message["files"]]
        parts = [*files, *([message["text"]] if message["text"].strip() else [])]
        turns: list[Turn] = [*values[self._turns], ("user", parts)]
        if problem := _problem(turns):
            yield {self._status: status(View("failed", error=problem)), self.message: message}
            return
        self.gallery.enter(page)

        def call(progress: ProgressCallback) -> Answer:
            inputs: list[str | ImageSource] = [
                open_upload(part) if isinstance(part, Path) else part for _, parts in turns for part in parts
            ]
            return self.jobs.bagel.interleave(inputs, progress=progress, **options)

        yield {
            self._chat: _messages(turns),
            self._status: status(View("waiting")),
            self._hint: hint(self._abilities.hint([message["text"]]) if message["text"].strip() else None),
            self.message: gr.update(value=None, submit_btn=False, stop_btn=True),
            self._new: gr.update(interactive=False),
        }
        for view in self.jobs.watch((page, "chat"), call, values[self._previews], keep_last=True):
            if view.ended and view.stage != "done":  # drop the turn, and return its message for another try
                yield {
                    self._chat: _messages(turns[:-1]),
                    self._status: status(view),
                    self.message: gr.update(value=message, submit_btn=True, stop_btn=False),
                    self._new: gr.update(interactive=True),
                }
                return
            answer: Turn = ("assistant", self._answer(view, page, message["text"]))
            changes = {self._status: status(view, f"Seed {seed}"), self._chat: _messages([*turns, answer], view)}
            if view.ended:
                images = self.gallery.images(page)
                changes |= {
                    self._turns: [*turns, answer],
                    self.message: gr.update(submit_btn=True, stop_btn=False),
                    self._new: gr.update(interactive=True),
                    self._shown: gr.update(value=images, visible=bool(images)),
                }
            yield changes

    def _answer(self, view: View[Answer], page: str, prompt: str) -> list[Part]:
        """The answer so far, images as files; a page that has left gets no files."""
        parts: list[Part] = []
        answer: Sequence[str | Image.Image | ImageResult] = view.parts if view.result is None else view.result
        for number, part in enumerate(answer):
            if isinstance(part, str):
                parts.append(part)
                continue
            if isinstance(part, ImageResult):
                path = self.gallery.add(page, part, prompt, prompt=prompt)
            else:
                path = self.gallery.preview(page, f"chat {number}", part)
            parts += [Path(path)] if path else []
        return parts


def _problem(turns: Sequence[Turn]) -> str | None:
    """Why the last message cannot be sent, or None."""
    if not turns[-1][1]:
        return "There is nothing to send. Write a message or add an image."
    if (count := sum(len(parts) for _, parts in turns)) > MAX_INPUTS:
        return f"A conversation must have at most {MAX_INPUTS} texts and images, got {count}. Start a new one."
    return None


def _messages(turns: Sequence[Turn], view: View[Answer] | None = None) -> list[dict[str, Any]]:
    """Turns as messages of the chat control; finished thoughts are collapsed."""
    messages: list[dict[str, Any]] = []
    for role, parts in turns:
        for part in parts:
            if isinstance(part, Path):
                messages.append({"role": role, "content": {"path": str(part)}})
                continue
            thought, answer = split_thought(part) if role == "assistant" else ("", part)
            if thought:
                pending = view is not None and not view.ended and part is parts[-1] and not answer
                metadata = {"title": "Thoughts", "status": "pending" if pending else "done"}
                messages.append({"role": role, "content": thought, "metadata": metadata})
            if answer:
                messages.append({"role": role, "content": answer})
    return messages
