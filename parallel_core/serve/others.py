"""Further endpoints: tokens, health, metrics, Megatron's `PUT /api`, and what PanGu-Alpha's servers offered."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from parallel_core.data.chat import ChatTemplate
from parallel_core.data.tokenizer import MegatronTokenizer
from parallel_core.errors import ConfigError
from parallel_core.generate.requests import SamplingParams
from parallel_core.serve.answers import Answer, collected
from parallel_core.serve.service import Service
from parallel_core.serve.values import Fields, Refused, json_object

_MEGATRON_REFUSED = {
    "max_len": "it is gone from Megatron too; send tokens_to_generate",
    "sentences": "it is gone from Megatron too; send prompts",
    "beam_width": "there is no beam search; leave it out",
    "length_penalty": "there is no beam search; leave it out",
    "top_p_decay": "top_p stays as it is; leave it out",
    "top_p_bound": "top_p stays as it is; leave it out",
}


class Others:
    """The endpoints of one service.

    Args:
        service: the engine.
        defaults: how `/query` and PanGu-Alpha's endpoint continue texts.
        template: of chats, which clients may write themselves.
        bos_token: what the tokenizer's files say a text begins with.
    """

    def __init__(
        self, service: Service, defaults: SamplingParams, template: ChatTemplate | None, bos_token: str | None
    ) -> None:
        self._service, self._defaults = service, defaults
        self._chat_template, self._bos_token = None if template is None else template.source, bos_token

    # ---- state ------------------------------------------------------------------------------------------------------
    async def health(self, request: Request) -> Response:
        """Say whether the engine answers."""
        service = self._service
        told: dict[str, Any] = {"status": service.state}
        if service.error is not None:
            told["error"] = str(service.error)
        return JSONResponse(told, 200 if service.state == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """Return counts in Prometheus' form."""
        service, counters = self._service, self._service.counters
        counts = service.it.engine.counts
        lines = [
            *_metric("uptime_seconds", "gauge", f"{time.time() - service.begun:.3f}"),
            *_metric("healthy", "gauge", int(service.state == "ok")),
            *_metric("answers_held", "gauge", service.held),
            *_metric("answers_waiting", "gauge", counts["waiting"]),
            *_metric("answers_running", "gauge", counts["reading"] + counts["answering"]),
            *_metric("cache_rows_free", "gauge", counts["free"]),
            *_metric("prompt_tokens_total", "counter", counters.prompt_tokens),
            *_metric("generated_tokens_total", "counter", counters.generated_tokens),
            *_metric("requests_cancelled_total", "counter", counters.cancelled),
            *_metric("requests_refused_total", "counter", counters.refused),
            *_metric("time_to_first_token_seconds_sum", "counter", f"{counters.first_token_seconds:.6f}"),
            *_metric("time_to_first_token_seconds_count", "counter", counters.first_tokens),
            "# TYPE parallel_core_requests_total counter",
            *(
                f'parallel_core_requests_total{{path="{path}",status="{status}"}} {count}'
                for (path, status), count in sorted(counters.requests.items())
            ),
        ]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    # ---- tokens -----------------------------------------------------------------------------------------------------
    def _tokenizer(self) -> MegatronTokenizer:
        it = self._service.it
        if it.tokenizer is None:
            raise Refused(f"this model has no tokenizer ({it.described.why_no_tokenizer})", 404)
        return it.tokenizer

    async def tokenize(self, request: Request) -> Response:
        """Turn a text into ids."""
        tokenizer, fields = self._tokenizer(), Fields(await json_object(request))
        text = fields.take("prompt", str)
        text = fields.take("content", str) if text is None else text
        fields.ignore("model", "add_special_tokens")
        fields.end()
        if text is None:
            raise Refused("prompt: send a text", parameter="prompt")
        tokens = [int(token) for token in tokenizer.tokenize(text)]
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self._service.it.max_length})

    async def detokenize(self, request: Request) -> Response:
        """Turn ids into a text."""
        tokenizer, fields = self._tokenizer(), Fields(await json_object(request))
        tokens, size = fields.take("tokens", list), tokenizer.vocab_size
        fields.ignore("model")
        fields.end()
        if tokens is None or not all(type(t) is int and 0 <= t < size for t in tokens):
            raise Refused(f"tokens: send a list of ids, 0 to {size - 1}", parameter="tokens")
        return JSONResponse({"prompt": tokenizer.detokenize(tokens)})

    async def tokenizer_info(self, request: Request) -> Response:
        """Say what the tokenizer's special tokens are, as lm-evaluation-harness asks."""
        tokenizer = self._tokenizer()
        pad = None if tokenizer.pad is None else tokenizer.detokenize([tokenizer.pad])
        eos = tokenizer.detokenize([tokenizer.eod])
        told = {"eos_token": eos, "bos_token": self._bos_token, "pad_token": pad}
        return JSONResponse({**told, "chat_template": self._chat_template})

    # ---- Megatron ---------------------------------------------------------------------------------------------------
    async def megatron(self, request: Request) -> Response:
        """Answer as `tools/run_text_generation_server.py` does: texts come back with their prompts."""
        fields = Fields(await json_object(request))
        for name, why in _MEGATRON_REFUSED.items():
            fields.refuse(name, why, (False, 0, 0.0))
        prompts = fields.take("prompts", list)
        if not prompts or not all(isinstance(p, str) and p for p in prompts) or len(prompts) > 128:
            raise Refused("prompts: send 1 to 128 texts, none of them empty", parameter="prompts")
        most, logprobs = fields.take("tokens_to_generate", int, 64), fields.take("logprobs", bool, False)
        if most == 0 and not logprobs:
            raise Refused("tokens_to_generate=0 implies logprobs should be True", parameter="tokens_to_generate")
        if fields.take("add_BOS", bool, False):
            raise Refused("add_BOS: the tokenizer's own rule says how texts begin; leave it out", parameter="add_BOS")
        stops = [text for name, text in (("stop_on_double_eol", "\n\n"), ("stop_on_eol", "\n"))
                 if fields.take(name, bool, False)]  # fmt: skip
        stop_token = fields.take("stop_token", int)
        for name in ("prevent_newline_after_colon", "no_log"):
            fields.refuse(name, "is not built; leave it out", (False,))
        top_k = fields.take("top_k", int, 0)
        values = {
            "max_new_tokens": most,
            "temperature": 0.0 if top_k == 1 else fields.number("temperature", 1.0),
            "top_k": top_k,
            "top_p": fields.number("top_p", 0.0) or 1.0,
            "seed": fields.take("random_seed", int),
            "stop": stops,
            "stop_token_ids": [] if stop_token is None else [stop_token],
            "logprobs": 0 if logprobs else None,
            "prompt_logprobs": logprobs,
        }
        fields.ignore("temperature")
        fields.end()
        ticket = await self._service.ask(prompts, _params(values))
        answers = await collected(request, ticket)
        tokens = [[*own[0].tokens, *a.tokens] for own, a in zip(ticket.requests, answers)]
        told: dict[str, Any] = {
            "text": [prompt + a.text for prompt, a in zip(prompts, answers)],
            "segments": [[self._tokenizer().detokenize([t]) for t in row] for row in tokens],
            "tokens": tokens,
        }
        if logprobs:
            told["logprobs"] = [[x.logprob for x in (*a.prompt_logprobs, *a.logprobs)] for a in answers]
        return JSONResponse(told)

    # ---- PanGu-Alpha ------------------------------------------------------------------------------------------------
    async def query(self, request: Request) -> Response:
        """Continue the text `u` of the query string."""
        text = request.query_params.get("u", "")
        if not text:
            raise Refused("send a text: /query?u=...", parameter="u")
        answers = await self._continued(request, text)
        return JSONResponse({"ok": True, "rsvp": text + answers[0].text})

    async def predict(self, request: Request) -> Response:
        """Answer MindSpore Serving's REST route: continue `input_sentence`, or score it after `prompt`."""
        try:
            fields = Fields(await json_object(request))
            instances = fields.take("instances", list)
            fields.end()
            if not instances or not all(isinstance(one, dict) for one in instances):
                raise Refused('send {"instances": [{"input_sentence": "..."}]}')
            out = [{"output_sentence": await self._instance(request, one)} for one in instances]
        except (Refused, ConfigError) as error:
            return JSONResponse({"error_msg": str(error)}, getattr(error, "status", 400))
        return JSONResponse({"instances": out})

    async def _instance(self, request: Request, values: dict[str, Any]) -> Any:
        fields = Fields(values)
        text, prompt = fields.take("input_sentence", str), fields.take("prompt", str)
        scores, most = fields.take("return_scores", bool, False), fields.take("max_generate_length", int)
        fields.end()
        if not text:
            raise Refused("input_sentence: send a text")
        if not scores:
            return text + (await self._continued(request, text, most))[0].text
        params = SamplingParams(max_new_tokens=0, prompt_logprobs=True)
        (answer,) = await collected(request, await self._service.ask([text], params))
        first = len(self._tokenizer().tokenize(prompt)) if prompt else 0
        # As C3 is scored: the tokens after the prompt but the first, over a window of 1024.
        return -sum(x.logprob for x in answer.prompt_logprobs[first:]) / 1024

    async def _continued(self, request: Request, text: str, most: int | None = None) -> list[Answer]:
        tokens = self._service.it.tokens_of(text)
        room = self._service.it.max_length - len(tokens)
        values = {**vars(self._defaults), "max_new_tokens": max(1, min(most or self._defaults.max_new_tokens, room))}
        return await collected(request, await self._service.ask([tokens], _params(values)))

    async def page(self, request: Request) -> Response:
        """Return a page with a text box."""
        return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


def _params(values: dict[str, Any]) -> SamplingParams:
    try:
        return SamplingParams.of({name: value for name, value in values.items() if value is not None})
    except ConfigError as error:
        raise Refused(str(error)) from None


def _metric(name: str, kind: str, value: Any) -> list[str]:
    return [f"# TYPE parallel_core_{name} {kind}", f"parallel_core_{name} {value}"]


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>parallel_core</title>
<style>
  body { font: 16px/1.5 sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }
  textarea { width: 100%; box-sizing: border-box; font: inherit; padding: .5rem }
  button { font: inherit; padding: .4rem 1.2rem; margin: .5rem 0 }
  #answer { white-space: pre-wrap; border: 1px solid #bbb; min-height: 6rem; padding: .5rem }
</style></head><body>
<form id="form">
  <label for="text">Text / 文本</label>
  <textarea id="text" rows="5" autofocus></textarea>
  <button id="button">生成</button>
</form>
<div id="answer" role="status" aria-live="polite"></div>
<script>
  const [form, text, button, answer] = ['form', 'text', 'button', 'answer'].map(id => document.getElementById(id));
  form.addEventListener('submit', async event => {
    event.preventDefault();
    if (!text.value) { alert('Write a text first. / 请先输入文本。'); return; }
    button.disabled = true;
    answer.textContent = '…';
    try {
      const reply = await fetch('/query?u=' + encodeURIComponent(text.value));
      const told = await reply.json();
      answer.textContent = told.ok ? told.rsvp : told.error.message;
    } catch (error) { answer.textContent = String(error); }
    button.disabled = false;
  });
</script></body></html>
"""
