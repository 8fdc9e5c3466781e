"""What clients have registered by TorchServe's and Multi Model Server's management APIs, as this front has it.

The supervisor keeps the table (`server.ipc.operations.SetRegistrations`). Dialects look names up here, and find which
part of a path is a name: names have slashes, and a version or more of a path may follow.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from model_store.names import ModelName
from server.ipc.operations import RegisteredModel, ServedVersion


@dataclass(frozen=True, slots=True)
class RegisteredPath:
    """The longest registered name that a path begins with. `rest`: the segments after it, joined; may be empty."""

    name: str
    model: RegisteredModel
    rest: str


class Registrations:
    """See the module."""

    def __init__(self) -> None:
        self.models: dict[str, RegisteredModel] = {}

    def __repr__(self) -> str:
        """For example `<Registrations of 3 models>`."""
        return f"<Registrations of {len(self.models)} models>"

    def follow(self, models: Mapping[str, RegisteredModel | None], *, whole: bool) -> None:
        """Take what the supervisor says of these names; of no others where it is `whole`."""
        if whole:
            self.models = {}
        for name, model in models.items():
            if model is None:
                self.models.pop(name, None)
            else:
                self.models[name] = model

    def find_longest(self, path: str) -> RegisteredPath | None:
        """The longest registered name that `path`, without a leading slash, is or begins with."""
        end = len(path)
        while end > 0:
            model = self.models.get(path[:end])
            if model is not None:
                return RegisteredPath(path[:end], model, path[end + 1 :])
            end = path.rfind("/", 0, end)
        return None


def find_version(model: RegisteredModel, version: str | None) -> ServedVersion | None:
    """This version of a model, or its default one."""
    return model.versions.get(model.default if version is None else version)


def key_of(version: ServedVersion) -> ModelName:
    """What workers call it."""
    return ModelName(version.key)
