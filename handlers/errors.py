"""What can go wrong between a request's bytes and its answer's bytes: one class per situation."""


class RequestError(ValueError):
    """The request is wrong (400). The message says what was expected and what came.

    Attributes:
        instance: index of the wrong forecast instance, where there are several.
        field: the wrong place, such as `x[3]`, `dynamic_feat[0]`, `configuration.quantiles`.
    """

    def __init__(self, message: str, *, instance: int | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.instance = instance
        self.field = field


class UnsupportedMedia(RequestError):
    """The content type or the accepted types are none of ours; the message names ours."""


class RunFailed(Exception):
    """The model itself failed (424): a non-finite output, an output of the wrong shape, an error of its runtime."""


class Overran(RunFailed):
    """The model's run took longer than a run may, and was ended or came to its end too late."""
