"""Use the server with OpenAI's client. ``python examples/openai_client.py [FOLDER]`` writes server.png to the folder.

To be self-contained, the script starts the server in this process, on a free port; normally, run ``bagel-rt serve``.
Needs the extra ``[serve]`` and the package ``openai``.
"""

import base64
import socket
import sys
import threading
from pathlib import Path

from openai import OpenAI

from bagel_rt import Bagel
from bagel_rt.serve.app import create_app
from bagel_rt.serve.run import make_server

folder = Path(*sys.argv[1:2])

listening = socket.create_server(("127.0.0.1", 0))
server = make_server(create_app(Bagel.from_pretrained(), "shapes"), log_level="warning")
thread = threading.Thread(target=server.run, args=([listening],))
thread.start()
try:
    client = OpenAI(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1", api_key="none")
    drawn = client.images.generate(prompt="a green square", size="128x128", extra_body={"seed": 0}).data[0].b64_json
    (folder / "server.png").write_bytes(base64.b64decode(drawn))

    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{drawn}"}}
    content = [url, {"type": "text", "text": "what color is the square"}]
    messages = [{"role": "user", "content": content}]
    for chunk in client.chat.completions.create(model="shapes", messages=messages, max_tokens=32, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
finally:
    server.should_exit = True
    thread.join()
