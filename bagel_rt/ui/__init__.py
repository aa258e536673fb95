"""A web page for generation, editing, understanding and chat, over one model (extra ``[ui]``).

app.py        the page: tabs, gallery, server
image_tab.py  text to image, and image editing
vqa_tab.py    image understanding
chat_tab.py   interleaved chat
abilities.py  texts on what the loaded model can do
controls.py   controls of the hyper-parameters
examples.py   example prompts and images
gallery.py    files of generated images and previews
jobs.py       requests in the model thread, with live views
thoughts.py   split a text into thought and answer
uploads.py    uploaded images
theme.py      colors, fonts, layout, the status line
script.py     keys, sharp scaling of small images, messages for failed uploads
"""

import os

# Set before Gradio is imported: otherwise it contacts its vendor's servers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"  # it would keep prompts and results in the browser
