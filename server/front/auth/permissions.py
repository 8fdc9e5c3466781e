"""Who may ask for which model: bearer tokens and signatures, whichever the operator configures. Runs in a front.

Where both are configured either one suffices: a request with a SigV4 Authorization header is judged by its signature,
any other by its token. A signature allows all models, a token those of its prefixes.
"""

from collections.abc import Mapping, Sequence

import msgspec

from model_store.names import ModelName
from server.access.tokens import Forbidden, Scope, Token, TokenFile, Unauthorized
from server.errors import Refused, Situation
from server.front.auth.sigv4 import Signatures
from server.front.inference import InferRequest, InferResponse, TogetherAnswer, TogetherRequest
from server.front.inference_plane import InferencePlane, PlaneInFront
from server.ipc.operations import (
    ActualsReply,
    KnownModel,
    ListKnownModels,
    LoadForClient,
    ManagementReply,
    ManageModels,
    ObservedPrices,
    UnloadForClient,
)
from server.settings import Settings

MOST_PREFIXES = 32  #: of a token that a list of models asks for
_SIGV4 = b"AWS4-HMAC-SHA256"


class PermittedPlane(PlaneInFront):
    """The data plane as the holder of one token sees it: models that the token does not allow are refused.

    INVARIANT: a dialect has no other way to a model, so that none can forget the check.
    """

    def __init__(self, plane: InferencePlane, token: Token) -> None:
        super().__init__(plane)
        self._token, self.token_name = token, token.name

    def __repr__(self) -> str:
        """For example `<PermittedPlane <Token desk-au: invoke of au/> over <DataPlane ...>>`."""
        return f"<PermittedPlane {self._token!r} over {self._plane!r}>"

    async def infer(self, request: InferRequest) -> InferResponse:
        """The model's answer. Raises Refused(FORBIDDEN), and what the plane raises."""
        require(self._token, request.model)
        return await self._plane.infer(request)

    def select_together(self, models: Sequence[ModelName]) -> list[bool]:
        """Say which of these models can be asked together: those that the token does not allow are refused alone."""
        found = self._plane.select_together(models)
        return [can and self.permits(model) for can, model in zip(found, models, strict=True)]

    async def infer_together(self, request: TogetherRequest) -> list[TogetherAnswer | Refused | None]:
        """What came of each item. Raises Refused(FORBIDDEN), and what the plane raises."""
        for model in request.models:
            require(self._token, model)
        return await self._plane.infer_together(request)

    def permits(self, model: ModelName) -> bool:
        """Whether the token allows this model."""
        try:
            self._token.require(Scope.INVOKE, model)
        except Forbidden:
            return False
        return self._plane.permits(model)

    def list_near(self, model: ModelName) -> list[str]:
        """Names of models that the token allows."""
        near = self._plane.list_near(model)
        return [name for name in near if not self._token.models or name.startswith(self._token.models)]

    async def list_known(self, asked: ListKnownModels, deadline: float) -> list[KnownModel]:
        """The models that the workers know, of those that the token allows. Raises what the plane raises.

        Each of the token's prefixes is asked by itself, so that other models neither show nor take up the limit.
        """
        prefixes = _narrow(self._token.models, asked.prefix)
        found = dict[str, KnownModel]()
        for prefix in prefixes:
            page = await self._plane.list_known(msgspec.structs.replace(asked, prefix=prefix), deadline)
            found |= {each.model: each for each in page}
        return [found[model] for model in sorted(found)[: asked.limit]]

    async def control(self, asked: LoadForClient | UnloadForClient, deadline: float, *, permitted: bool = False) -> str:
        """Load or unload a model that the token manages. Raises Refused(FORBIDDEN), and what the plane raises."""
        del permitted
        try:
            self._token.require(Scope.MANAGE, asked.model)
        except Forbidden as error:
            raise Refused(Situation.FORBIDDEN, str(error)) from None
        return await self._plane.control(asked, deadline, permitted=True)

    async def record_actuals(self, items: Sequence[ObservedPrices], deadline: float) -> ActualsReply:
        """Record observed prices of models of which the token may send them. Raises Refused(FORBIDDEN)."""
        try:
            for item in items:
                self._token.require(Scope.ACTUALS, item.model)
        except Forbidden as error:
            raise Refused(Situation.FORBIDDEN, str(error)) from None
        return await super().record_actuals(items, deadline)

    async def manage(self, request: ManageModels, deadline: float) -> ManagementReply:
        """The supervisor's answer. Raises Refused(FORBIDDEN) for a token that does not manage all models."""
        try:
            self._token.require(Scope.MANAGE, None)
            self._token.require_all_models(request.path[:80])
        except Forbidden as error:
            raise Refused(Situation.FORBIDDEN, str(error)) from None
        return await super().manage(request, deadline)


class Permissions:
    """What the operator configured: `tokens`, `access_keys`, or both."""

    def __init__(self, tokens: TokenFile | None, signatures: Signatures | None) -> None:
        self._tokens, self._signatures = tokens, signatures

    def __repr__(self) -> str:
        """For example `<Permissions by <TokenFile ...>, <Signatures of 2 keys>>`."""
        return f"<Permissions by {self._tokens!r}, {self._signatures!r}>"

    def find_token(self, headers: Mapping[bytes, bytes]) -> Token | None:
        """The token of a request whose body has not been read; None where its signature is to be checked.

        Raises Refused(UNAUTHORIZED) for a request that shows neither, Refused(FORBIDDEN) for a token of another scope.
        """
        authorization = headers.get(b"authorization")
        signed = authorization is not None and authorization.startswith(_SIGV4)
        if self._tokens is None or (signed and self._signatures is not None):
            return None
        if signed:
            message = "this server takes bearer tokens, not signatures: send the header Authorization: Bearer TOKEN"
            raise Refused(Situation.UNAUTHORIZED, f"{message} in the place of boto3's (docs/security.md)")
        try:
            token = self._tokens.current.find(authorization)
        except Unauthorized as error:
            either = ", or sign the request with an access key" if self._signatures is not None else ""
            raise Refused(Situation.UNAUTHORIZED, f"{error}{either}") from None
        require(token, None)
        return token

    def find_named(self, name: str) -> Token:
        """The token of this name, by which a request has come before. Raises Refused(FORBIDDEN) if it has gone."""
        token = None if self._tokens is None else self._tokens.current.find_named(name)
        if token is None:
            raise Refused(Situation.FORBIDDEN, f"the token {name} is not one of this server's any more")
        require(token, None)
        return token

    def check_signature(self, method: str, path: str, query: bytes, headers: Mapping[bytes, bytes], body: bytes) -> str:
        """Check a request without a token, as it was sent. Its access key. Raises Refused(BAD_SIGNATURE)."""
        return "" if self._signatures is None else self._signatures.check(method, path, query, headers, body)


def _narrow(allowed: Sequence[str], prefix: str) -> list[str]:
    """The prefixes of names that begin with `prefix` and are allowed; all are where `allowed` is empty."""
    if not allowed or prefix.startswith(tuple(allowed)):
        return [prefix]
    return [each for each in allowed if each.startswith(prefix)][:MOST_PREFIXES]


def require(token: Token, model: ModelName | None) -> None:
    """Raises Refused(FORBIDDEN) unless the token allows requests, for this model where one is named."""
    try:
        token.require(Scope.INVOKE, model)
    except Forbidden as error:
        raise Refused(Situation.FORBIDDEN, str(error)) from None


def open_permissions(settings: Settings) -> Permissions | None:
    """None where neither tokens nor keys are configured. Raises ValueError for a file of tokens that is wrong."""
    if settings.tokens is None and not settings.access_keys:
        return None
    keys = {key: secret.get_secret_value() for key, secret in settings.access_keys.items()}
    return Permissions(
        None if settings.tokens is None else TokenFile(settings.tokens),
        Signatures(keys, settings.access_region) if keys else None,
    )
