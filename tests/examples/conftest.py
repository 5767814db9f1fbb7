import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from tests.examples.training_runs import reset_accelerator


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state for the whole process, where each test is a run of its own."""
    yield
    reset_accelerator()


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine, which creates repositories and answers what `answers` says, by path; else with 403."""
    requests, answers = [], {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            requests.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = answers.get(self.path, (403, {"error": "no write access"}))
            if self.path == "/api/repos/create" and status == 200:
                answer = {"url": f"{endpoint}/owner/{json.loads(body)['name']}"}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_GET = do_POST = answer

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield requests, answers
    server.shutdown()
    server.server_close()
    thread.join()
