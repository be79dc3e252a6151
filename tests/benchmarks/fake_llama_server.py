"""Speaks as much of llama-server's HTTP as the adapter asks for. FAKE_MISSING tokens of every answer are left out."""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send(json.dumps({"status": "ok"}))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert asked["ignore_eos"]
        assert asked["return_tokens"]
        num = asked["n_predict"] - int(os.environ.get("FAKE_MISSING", "0"))
        if asked["stream"]:
            self._send("".join(f"data: {json.dumps({'tokens': [i]})}\n\n" for i in range(num)))
        else:
            self._send(json.dumps({"tokens_predicted": num}))

    def log_message(self, format: str, *args: object) -> None:
        return None

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
