"""The door of a node: decides by the head of a request, before anything of its body is read."""

from urllib.parse import quote

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from llumnix.server.door.callers import ASKS_FOR_LOAD, CALLER, SEES_LOAD, Caller, Callers
from llumnix.server.door.csrf import Pages, is_preflight
from llumnix.server.door.routes import METRICS, Access, RouteTable
from llumnix.server.errors import Handler, error_response

_CHALLENGE = {"WWW-Authenticate": "Bearer"}


def _bodiless() -> web.Response:
    """Anybody may call these routes, so nothing is read or kept of what anybody sends."""
    response = error_response(413, "this route takes no body")
    response.force_close()
    return response


def _moved(path: str) -> web.Response:
    """As vLLM has it, but for the query, with which a stranger would get long answers."""
    return web.Response(status=307, headers={hdrs.LOCATION: quote(path)})


class Guard:
    """Lets through what the table of routes and the caller allow. What nobody knows is closed."""

    def __init__(self, routes: RouteTable, callers: Callers, pages: Pages) -> None:
        self.routes = routes
        self._callers = callers
        self._pages = pages

    def refusal(self, request: web.Request) -> web.Response | None:
        """The answer to one who may not; None, and the caller kept in the request, if it may."""
        access = self.routes.access(request.path)
        if access in (Access.PUBLIC, Access.PEER):
            if request.body_exists:
                return _bodiless()
            bare = request.path.rstrip("/")
            return _moved(bare) if access is Access.PUBLIC and bare != request.path else None
        if is_preflight(request):
            return self._preflight(access, request)
        caller = self._callers.caller(request)
        if access is Access.INFERENCE:
            if caller is None:
                return error_response(401, "wrong or missing API key", _CHALLENGE)
            if caller.by_place and (problem := self._pages.foreign(request, caller)) is not None:
                return error_response(*problem)
            request[CALLER] = caller
            if ASKS_FOR_LOAD in request.headers:
                public = self.routes.access(METRICS) is Access.PUBLIC
                operator = self._callers.operator(request, caller)
                request[SEES_LOAD] = public or operator is not None
            return None
        return self._operators_only(request, caller, known=access is not None)

    def _operators_only(
        self, request: web.Request, caller: Caller | None, known: bool
    ) -> web.Response | None:
        operator = self._callers.operator(request, caller)
        if operator is None:
            if not known:
                return error_response(404, "Not Found")
            status, text = self._callers.why_not(request, caller)
            return error_response(status, text, _CHALLENGE if status == 401 else None)
        if (problem := self._pages.refusal(request, operator)) is not None:
            return error_response(*problem)
        request[CALLER] = operator
        return None

    def _preflight(self, access: Access | None, request: web.Request) -> web.Response | None:
        if access is Access.INFERENCE:
            return None  # as its application has it
        if access is None:
            return error_response(404, "Not Found")
        if not self._pages.named(request):
            return error_response(403, "pages of this Origin may not call operators' routes")
        allowed = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST",
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: "Authorization, Content-Type",
        }
        return web.Response(status=204, headers=allowed)

    @property
    def middleware(self) -> Middleware:
        """It, in front of every handler."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            refused = self.refusal(request)
            return await handler(request) if refused is None else refused

        return check
