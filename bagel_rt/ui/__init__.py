"""A web page for generation, editing, understanding and chat, over one model (extra ``[ui]``).

app.py        the page: tabs, gallery, server
image_tab.py  text to image, and image editing
vqa_tab.py    image understanding
chat_tab.py   interleaved chat
controls.py   controls of the hyper-parameters
examples.py   example prompts and images
gallery.py    files of generated images and previews
jobs.py       requests in the model thread, with live views
thoughts.py   split a text into thought and answer
theme.py      colors, fonts, the status line
"""

import os

# Set before Gradio is imported: otherwise it contacts its vendor's servers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
