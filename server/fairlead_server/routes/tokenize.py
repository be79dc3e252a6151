"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from fastapi import APIRouter

from fairlead.errors import RequestError
from fairlead.tokenization.tokenizer import Tokenizer
from fairlead_server.errors import ApiError
from fairlead_server.json_route import JsonRoute
from fairlead_server.protocol import DetokenizeBody, TokenizeBody
from fairlead_server.service import Service


def router(service: Service) -> APIRouter:
    """The routes that show how text and token ids go together."""
    routes = APIRouter(route_class=JsonRoute)
    engine = service.engine

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, object]:
        service.model_name(body.model)
        body.check()
        if body.prompt is None:
            messages = [message.for_template() for message in body.messages]
            options = body.chat_options(trusts_template=service.config.trust_request_chat_template)
            token_ids = (await engine.encode_chat(messages, options)).token_ids
        else:
            token_ids = await engine.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        found: dict[str, object] = {
            "count": len(token_ids),
            "max_model_len": engine.info.max_model_len,
            "tokens": token_ids,
        }
        if body.return_token_strs:
            found["token_strs"] = [_tokenizer(service).backend.id_to_token(token_id) for token_id in token_ids]
        return found

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        service.model_name(body.model)
        vocab_size = engine.info.vocab_size
        for token_id in body.tokens:
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"tokens: {token_id} is outside 0 to {vocab_size - 1}", param="tokens")
        return {"prompt": engine.front_end.decode(body.tokens, skip_special_tokens=False)}

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


def _tokenizer(service: Service) -> Tokenizer:
    if service.engine.front_end.tokenizer is None:
        raise ApiError(400, "The model was loaded without a tokenizer.")
    return service.engine.front_end.tokenizer
