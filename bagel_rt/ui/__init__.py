"""A page to draw, edit, ask and talk in the browser, over one model (extra ``[ui]``).

app.py        the page: what is common to the tasks
drawing.py    text to image, and image editing
asking.py     image understanding
talking.py    interleaved chat
controls.py   the hyper-parameters, with what they do
examples.py   prompts and pictures to begin with
jobs.py       the thread that owns the model: one request at a time, seen while it is worked on, cancelled any time
look.py       colours, type, the status line
"""

import os

# Before Gradio is imported, which asks its makers' servers for its version otherwise.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
