"""The page: a tab for each task over one model, and the pictures of the session."""

import os
import socket
import tempfile
from pathlib import Path

import gradio as gr

from bagel_rt import __version__
from bagel_rt.pipeline import Bagel
from bagel_rt.ui.chat_tab import TalkingTab
from bagel_rt.ui.examples import Examples
from bagel_rt.ui.gallery import Album
from bagel_rt.ui.image_tab import EVENT, DrawingTab
from bagel_rt.ui.jobs import MAX_JOBS, Jobs
from bagel_rt.ui.theme import CSS, masthead, theme
from bagel_rt.ui.vqa_tab import AskingTab

_UPLOAD = "32mb"
_DAY = 24 * 3600


class Page:
    """The page and what stands behind it. Use it in a ``with``: leaving ends requests and takes all files away.

    Attributes:
        url: where it is, once it is open.
    """

    def __init__(self, bagel: Bagel, name: str, small: bool):
        """
        Args:
            bagel: the page's alone from now on.
            name: of the model, as it is shown.
            small: whether it is the embedded model, which knows nothing but coloured shapes; for the examples.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="bagel_rt-", ignore_cleanup_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = self._folder.name  # of uploads, and of copies of what is shown
        dtype = str(bagel.model.dtype).removeprefix("torch.")
        source = {"model": name, "version": __version__, "dtype": dtype}
        self._jobs, self._album = Jobs(bagel), Album(Path(self._folder.name), source)
        self._blocks = self._build(masthead(name, str(bagel.model.device), dtype), small)
        self.url = ""

    def open(self, host: str, port: int) -> None:
        """Serve it, in threads of its own; at port 0, at a free one.

        Raises:
            ValueError: it cannot be served there.
        """
        queue = self._blocks.queue(default_concurrency_limit=None, max_size=2 * MAX_JOBS)  # the line is in Jobs
        try:
            _, self.url, _ = queue.launch(
                server_name=host,
                server_port=port or _free_port(),
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                max_file_size=_UPLOAD,
                max_threads=2 * MAX_JOBS,
                footer_links=[],
                enable_monitoring=False,
                theme=theme(),
                css=CSS,
            )
        except OSError as error:
            advice = "give another port, or 0 for a free one"
            raise ValueError(f"nothing can be served at {host}, port {port}: {advice}") from error

    def wait(self) -> None:
        """Serve until interrupted."""
        self._blocks.block_thread()

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_) -> None:
        self._jobs.close()
        self._blocks.close(verbose=False)
        self._folder.cleanup()

    def _build(self, head: str, small: bool) -> gr.Blocks:
        examples = Examples(Path(self._folder.name), small)
        gallery = gr.Gallery(
            label="Pictures of this session",
            columns=6,
            height="auto",
            object_fit="contain",
            fit_columns=False,
            interactive=False,
            buttons=["download", "fullscreen"],
            visible=False,
            render=False,
            elem_id="gallery",
        )
        with gr.Blocks(title="bagel_rt", analytics_enabled=False, delete_cache=(3600, _DAY), fill_width=True) as blocks:
            gr.HTML(head, elem_classes="bare")
            with gr.Tabs(elem_id="tasks") as tabs:
                with gr.Tab("Text to image", id="draw"):
                    draw = DrawingTab(self._jobs, self._album, gallery, examples.draw)
                with gr.Tab("Image editing", id="edit"):
                    edit = DrawingTab(self._jobs, self._album, gallery, examples.edit, edits=True)
                with gr.Tab("Image understanding", id="ask"):
                    ask = AskingTab(self._jobs, examples.ask)
                with gr.Tab("Interleaved chat", id="chat"):
                    # The embedded model has not learned to think.
                    TalkingTab(self._jobs, self._album, gallery, examples.talk, think=not small)
            gallery.render()
            for tab in (draw, edit):
                for button, given, to in ((tab.edit, edit.given, "edit"), (tab.ask, ask.given, "ask")):
                    button.click(_carry(to), tab.drawn, [given, tabs], **EVENT)
            blocks.unload(self._leave)
        return blocks

    def _leave(self, request: gr.Request) -> None:
        self._jobs.leave(request.session_hash)
        self._album.leave(request.session_hash)


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def _carry(tab: str):
    """A handler that brings a picture to a tab."""
    return lambda path: (path, gr.Tabs(selected=tab))
