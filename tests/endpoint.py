"""A chat model's endpoint for tests."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint:
    """An OpenAI-compatible server on this machine that answers what the test says.

    `answer` is a text, the bytes of a whole body, or a function of what was asked.
    """

    def __init__(self):
        self.asked, self.answer, self.status, self.end = [], "", [200], "stop"
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.asked.append((self.path, dict(self.headers), body))
                status = endpoint.status.pop(0) if len(endpoint.status) > 1 else endpoint.status[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(endpoint.body(body))

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def body(self, asked):
        if isinstance(self.answer, bytes):
            return self.answer
        said = self.answer(asked) if callable(self.answer) else self.answer
        message = {"role": "assistant", "content": said}
        return json.dumps({"choices": [{"message": message, "finish_reason": self.end}]}).encode()
