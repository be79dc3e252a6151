"""POST /tokenize and /detokenize, GET /tokenizer_info."""

import asyncio

from fastapi import APIRouter, Response

from fairlead.errors import RequestError
from fairlead.tokenization.tokenizer import Tokenizer
from fairlead_server.errors import ApiError
from fairlead_server.json_route import JsonRoute
from fairlead_server.protocol import DetokenizeBody, TokenizeBody
from fairlead_server.responses import Json, json_response
from fairlead_server.service import Service

MAX_TOKENS = 2**17  # of one /detokenize, or the context if that is longer: it takes 50 ms, in which all others wait
LONG_TOKENS = 4096  # more of them are spelt in a thread


def router(service: Service) -> APIRouter:
    """The routes that show how text and token ids go together."""
    routes = APIRouter(route_class=JsonRoute)
    engine = service.engine

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        service.model_name(body.model)
        body.check()
        if body.prompt is None:
            messages = [message.for_template() for message in body.messages]
            options = body.chat_options(trusts_template=service.config.trust_chat_template)
            token_ids = (await engine.encode_chat(messages, options)).token_ids
        else:
            token_ids = await engine.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        found: Json = {
            "count": len(token_ids),
            "max_model_len": engine.info.max_model_len,
            "tokens": token_ids,
        }
        if body.return_token_strs:
            if len(token_ids) <= LONG_TOKENS:
                found["token_strs"] = _spelt(service, token_ids)
            else:
                found["token_strs"] = await asyncio.to_thread(_spelt, service, token_ids)
        return json_response(found)

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        service.model_name(body.model)
        tokens, vocab_size = body.tokens, engine.info.vocab_size
        most = max(MAX_TOKENS, engine.info.max_model_len)
        if len(tokens) > most:
            raise RequestError(f"tokens holds {len(tokens)} token ids, at most {most} are taken", param="tokens")
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            bad = next(token_id for token_id in tokens if not 0 <= token_id < vocab_size)
            raise RequestError(f"tokens: {bad} is outside 0 to {vocab_size - 1}", param="tokens")
        return json_response({"prompt": engine.front_end.decode(body.tokens, skip_special_tokens=False)})

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, object]:
        tokenizer = _tokenizer(service).transformers_tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "chat_template": engine.front_end.chat_template or tokenizer.chat_template,
        }

    return routes


def _spelt(service: Service, token_ids: list[int]) -> list[str | None]:
    """The tokens as the vocabulary spells them; None where it has none."""
    backend = _tokenizer(service).backend
    return [backend.id_to_token(token_id) for token_id in token_ids]


def _tokenizer(service: Service) -> Tokenizer:
    if service.engine.front_end.tokenizer is None:
        raise ApiError(400, "The model was loaded without a tokenizer.")
    return service.engine.front_end.tokenizer
