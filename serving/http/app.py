"""The routes of the HTTP API, each also under `/m/<model>/`, for clients that can only be given an
address."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from serving.changes import Changes
from serving.chat.renderer import Renderer
from serving.http.adapters import Adapters
from serving.http.calls import Calls, Handler
from serving.http.chat import ChatCompletions
from serving.http.completions import Completions
from serving.http.embeddings import Embeddings
from serving.http.errors import HTTPError, body_of
from serving.http.models import Models


def make_app(calls: Calls, renderer: Renderer, changes: Changes, open_health: bool) -> Starlette:
    """The application.

    Args:
      calls: what generations go through.
      renderer: of chat templates.
      changes: of what is served.
      open_health: health checks need no key.
    """
    models = Models(calls.dispatcher, renderer)
    adapters = Adapters(changes)

    def get(path: str, handler: Handler, open_: bool = False) -> Route:
        endpoint = calls.endpoint(handler, counted=False, open_=open_)
        return Route(path, endpoint, methods=["GET"])

    def post(path: str, handler: Handler, counted: bool = False) -> Route:
        return Route(path, calls.endpoint(handler, counted=counted), methods=["POST"])

    routes = [
        post("/v1/completions", Completions(calls), counted=True),
        post("/v1/chat/completions", ChatCompletions(calls), counted=True),
        post("/v1/embeddings", Embeddings(calls), counted=True),
        get("/v1/models", models.list),
        post("/tokenize", models.tokenize),
        post("/detokenize", models.detokenize),
        get("/tokenizer_info", models.tokenizer_info),
        get("/health", models.health, open_health),
        get("/ping", models.health, open_health),
        get("/version", models.version),
    ]
    return Starlette(
        routes=[
            *routes,
            post("/v1/load_lora_adapter", adapters.load),
            post("/v1/unload_lora_adapter", adapters.unload),
            # Not under a model: its own name would be in the way.
            get("/v1/models/{model:path}", models.get),
            Mount("/m/{model}", routes=routes),
        ],
        exception_handlers={HTTPException: _no_route},
    )


async def _no_route(request: Request, error: Exception) -> Response:
    """No such route, or not by this method, in the form of all other errors."""
    assert isinstance(error, HTTPException)
    words = {
        404: f"{request.url.path[:80]!r} is no route of this server; docs/openai.md lists them",
        405: f"{request.method} is no method of {request.url.path[:80]!r}; the header Allow names its own",
    }
    found = HTTPError(error.status_code, words.get(error.status_code, str(error.detail)))
    return Response(
        body_of(found, found.status),
        found.status,
        headers=dict(error.headers or {}),
        media_type="application/json",
    )
