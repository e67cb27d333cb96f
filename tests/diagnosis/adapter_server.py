"""A small server with OpenAI's completions API: several adapters on one base, and a cache of keys and values.

What it keeps them under is the fault: by the prompt alone, one adapter goes on from what another computed.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import torch

from graftlm.formats.content_digest import content_digest
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach_folder
from graftlm.models.load import load_model

KeptUnder = Literal["prompt", "name", "digest"]


class Engine:
    """The base with its adapters; one request at a time."""

    def __init__(self, base: str, adapters: Mapping[str, Path], kept_under: KeptUnder) -> None:
        self.model, self.tokenizer = load_model(base, dtype="float32")
        self.lock, self.kept_under = threading.Lock(), kept_under
        self.kept: dict[tuple[str, tuple[int, ...]], Any] = {}
        self.names: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        for name, folder in adapters.items():
            self.load(name, folder)

    def load(self, name: str, folder: Path) -> None:
        """Serve what is in `folder` under `name`, whatever had that name before."""
        here = f"v{len(self.names)}-{len(self.digests)}"
        self.adapters = attach_folder(self.model, folder, here, storage=FOLDER)
        self.names[name], self.digests[name] = here, content_digest(folder)

    @torch.no_grad()
    def next_token(self, name: str, prompt: list[int]) -> torch.Tensor:
        """Log-probabilities after the prompt; all of it but its last token may be in the cache."""
        salt = {"prompt": "", "name": name, "digest": self.digests[name]}[self.kept_under]
        key = (salt, tuple(prompt[:-1]))
        with self.lock, self.adapters.activated(self.names[name]):
            if key not in self.kept:
                ids = torch.tensor([prompt[:-1]])
                self.kept[key] = self.model(input_ids=ids, use_cache=True).past_key_values
            cache = copy.deepcopy(self.kept[key])
            last = torch.tensor([prompt[-1:]])
            logits = self.model(input_ids=last, past_key_values=cache, use_cache=True).logits
        return logits[0, -1].float().log_softmax(-1)


def serve(engine: Engine) -> str:
    """Start a server in a thread of this process; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if asked["model"] not in engine.names:
                self._answer(404, {"error": {"message": f"no model {asked['model']}"}})
                return
            said = engine.next_token(asked["model"], asked["prompt"])
            values, ids = said.topk(asked["logprobs"])
            spelled = (
                [f"token_id:{number}" for number in ids.tolist()]
                if asked.get("return_tokens_as_token_ids")
                else [engine.tokenizer.decode([number]) for number in ids.tolist()]
            )
            top = dict(zip(spelled, values.tolist(), strict=True))
            self._answer(200, {"choices": [{"text": "", "logprobs": {"top_logprobs": [top]}}]})

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
