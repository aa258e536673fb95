"""The tab that talks: texts and pictures in, texts and pictures out, turn after turn."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import gradio as gr

from bagel_rt.request import ImageResult
from bagel_rt.settings import INTERLEAVE, MAX_ROUNDS
from bagel_rt.ui.album import Album
from bagel_rt.ui.controls import SEED_LIMIT, Controls, chosen_seed, explained
from bagel_rt.ui.drawing import EVENT, open_given
from bagel_rt.ui.jobs import Jobs, View
from bagel_rt.ui.look import idle, status
from bagel_rt.ui.thoughts import split_thought

_HELP = "Texts and pictures in any order. Models that were trained to draw as they think draw in between."
_NOTHING = idle("Nothing said yet.")
Turn = tuple[str, list[str | Path]]  # "user" or "assistant", and texts and files of pictures


class TalkingTab:
    """Interleaved chat, in the layout that is being built. The model is shown the whole conversation at every turn."""

    def __init__(self, jobs: Jobs, album: Album, gallery: gr.Gallery):
        """``gallery`` shows what the album holds."""
        self.jobs, self.album, self.gallery = jobs, album, gallery
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=340):
                self._build_conversation()
            with gr.Column(scale=4, min_width=300):
                self._build_settings()
        self._turns = gr.State([])
        inputs = {self.message, self._turns, self._think, self._seed, self._rounds, self._previews}
        inputs |= set(self._controls.components.values())
        outputs = [self._chat, self.message, self._status, self._turns, self.gallery, self._new]
        self.message.submit(self._talk, inputs, outputs, **EVENT)
        self.message.stop(self._stop, queue=False, **EVENT)
        fresh = [self._chat, self._turns, self._status]
        self._new.click(lambda: ([], [], _NOTHING), None, fresh, queue=False, **EVENT)

    def _build_conversation(self) -> None:
        self._chat = gr.Chatbot(
            label="Conversation",
            height=480,
            elem_id="chat-messages",
            placeholder=_HELP,
            buttons=[],
            feedback_options=None,
        )
        self.message = gr.MultimodalTextbox(
            show_label=False,
            placeholder="A message; pictures may go with it",
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            elem_id="chat-message",
        )
        self._status = gr.HTML(_NOTHING, elem_id="chat-status", elem_classes="bare")

    def _build_settings(self) -> None:
        self._new = gr.Button("New conversation", elem_id="chat-new")
        self._think = explained("think", gr.Checkbox, value=True, elem_id="chat-think")
        with gr.Accordion("Settings", open=False, elem_id="chat-settings"):
            limits = {"precision": 0, "minimum": -1, "maximum": SEED_LIMIT}
            self._seed = explained("seed", gr.Number, value=-1, elem_id="chat-seed", **limits)
            rounds = {"minimum": 1, "maximum": MAX_ROUNDS, "step": 1, "precision": 0, "value": 3}
            self._rounds = explained("max_rounds", gr.Slider, **rounds)
            self._controls = Controls(*INTERLEAVE, prefix="chat")
            self._previews = explained("previews", gr.Checkbox, value=True)

    def _stop(self, request: gr.Request) -> None:
        self.jobs.cancel((request.session_hash, "chat"))

    def _talk(self, values: dict, request: gr.Request) -> Iterator[dict]:
        """One turn from the message to the end of the answer: changes of the page."""
        page, seed, message = request.session_hash, chosen_seed(values[self._seed]), values[self.message]
        options = self._controls.read(values)
        options |= {"seed": seed, "think": values[self._think], "max_rounds": values[self._rounds]}
        parts = [*map(Path, message["files"]), *([message["text"]] if message["text"].strip() else [])]
        turns: list[Turn] = [*values[self._turns], ("user", parts)]

        def call(progress) -> list[str | ImageResult]:
            inputs = [part for _, parts in turns for part in parts]
            inputs = [open_given(part) if isinstance(part, Path) else part for part in inputs]
            return self.jobs.bagel.interleave(inputs, progress=progress, **options)

        yield {
            self._chat: _messages(turns),
            self._status: status(View("waiting")),
            self.message: gr.update(value=None, submit_btn=False, stop_btn=True),
            self._new: gr.update(interactive=False),
        }
        for view in self.jobs.watch((page, "chat"), call, values[self._previews]):
            answer: Turn = ("assistant", self._answer(view, page, message["text"]))
            changes = {self._status: status(view, f"Seed {seed}"), self._chat: _messages([*turns, answer], view)}
            if view.ended:
                changes[self.message] = gr.update(submit_btn=True, stop_btn=False)
                changes[self._new] = gr.update(interactive=True)
            if view.stage == "done":
                pictures = self.album.pictures(page)
                changes |= {
                    self._turns: [*turns, answer],
                    self.gallery: gr.update(value=pictures, visible=bool(pictures)),
                }
            elif view.ended:  # the turn did not take place: the message may be sent again
                changes[self.message] = gr.update(value=message, submit_btn=True, stop_btn=False)
                changes[self._chat] = _messages(turns[:-1])
            yield changes

    def _answer(self, view: View, page: str, prompt: str) -> list[str | Path]:
        """The answer as far as it goes, pictures as files."""
        if view.stage == "done":
            return [
                made if isinstance(made, str) else Path(self.album.add(page, made, prompt, prompt=prompt))
                for made in view.result
            ]
        return [
            part if isinstance(part, str) else Path(self.album.preview(page, f"chat {number}", part))
            for number, part in enumerate(view.parts)
        ]


def _messages(turns: Sequence[Turn], view: View | None = None) -> list[dict]:
    """Turns as the chat shows them; thoughts fold away when they are done."""
    messages = []
    for role, parts in turns:
        for part in parts:
            if isinstance(part, Path):
                messages.append({"role": role, "content": {"path": str(part)}})
                continue
            thought, answer = split_thought(part) if role == "assistant" else ("", part)
            if thought:
                going_on = view is not None and not view.ended and part is parts[-1] and not answer
                about = {"title": "Thoughts", "status": "pending" if going_on else "done"}
                messages.append({"role": role, "content": thought, "metadata": about})
            if answer:
                messages.append({"role": role, "content": answer})
    return messages
