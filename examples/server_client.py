"""Server and client: a transparent image over HTTP, with nothing but the standard library.

    diffusion-accel serve --transparent      # in another terminal; pip install 'diffusion-accel[serve]'
    python examples/server_client.py http://127.0.0.1:8000

Writes served.png. The environment variable DIFFUSION_ACCEL_TOKEN is the server's token, if it has one.
"""

import json
import os
import sys
import urllib.request
from pathlib import Path

server = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
body = {"prompt": "panda, 3d style", "background": "transparent", "quality": "low", "seed": 1}
headers = {"Content-Type": "application/json", "Accept": "image/png"}  # without Accept: JSON with base64, as OpenAI's
if token := os.environ.get("DIFFUSION_ACCEL_TOKEN"):
    headers["Authorization"] = f"Bearer {token}"

request = urllib.request.Request(f"{server}/v1/images/generations", json.dumps(body).encode(), headers)
with urllib.request.urlopen(request) as answer:
    image = answer.read()
Path("served.png").write_bytes(image)
print(f"served.png: {len(image)} bytes")
