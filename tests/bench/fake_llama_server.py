#!/usr/bin/env python3
"""Stands in for llama.cpp's server, which tests cannot build: the routes that the bench uses.

Answers with the prompt's last token again and again. Notes its arguments in a file next to itself.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/completion" or body["temperature"] or body["cache_prompt"]:
            self.send_response(400)
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        token, count = body["prompt"][-1], body["n_predict"]
        for _ in range(count):
            self._event({"content": "x", "tokens": [token], "stop": False})
        self._event({"content": "", "tokens": [], "stop": True, "tokens_predicted": count})

    def _event(self, event: object) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


if __name__ == "__main__":
    Path(__file__).with_suffix(".arguments").write_text(json.dumps(sys.argv[1:]))
    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
