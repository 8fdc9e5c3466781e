"""Errors between the bytes of a request and those of its answer: one class per situation."""


class RequestError(ValueError):
    """The request is wrong (400). The message says what was expected and what was received.

    Attributes:
        instance: index of the wrong forecast instance, if there are several.
        field: the wrong place, such as `x[3]`, `dynamic_feat[0]`, `configuration.quantiles`.
    """

    def __init__(self, message: str, *, instance: int | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.instance = instance
        self.field = field


class UnsupportedMedia(RequestError):
    """The content type or the accepted types are not supported; the message names the supported ones."""


class RunFailed(Exception):
    """The model itself failed (424): a non-finite output, an output of the wrong shape, an error of its runtime."""


class DeviceFailed(Exception):
    """The device failed, not the model: no run in this process succeeds any more."""


class Overran(RunFailed):
    """A run of the model exceeded its time limit, and was aborted or ended too late."""
