"""What clients have registered by TorchServe's and Multi Model Server's management APIs, as this front has it.

The supervisor keeps the table (`server.ipc.operations.SetRegistrations`). Dialects look names up here, and find which
part of a path is a name: names have slashes, and a version or more of a path may follow. Each version has counts of its
own here, which go when it does: `server.front.torchserve_metrics` shows them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from model_store.names import ModelName
from server.ipc.operations import RegisteredModel, ServedVersion

MOST_COUNTED = 1000  #: versions that have counts of their own


@dataclass(frozen=True, slots=True)
class RegisteredPath:
    """The longest registered name that a path begins with. `rest`: the segments after it, joined; may be empty."""

    name: str
    model: RegisteredModel
    rest: str


@dataclass(slots=True)
class Served:
    """What this front has counted of one version. Times in microseconds."""

    requests: int = 0
    latency_us: float = 0.0
    queue_us: float = 0.0

    def count(self, seconds: float, queue_us: int = 0) -> None:
        """A request that took so long, and waited so long."""
        self.requests += 1
        self.latency_us += seconds * 1e6
        self.queue_us += queue_us


@dataclass(slots=True)
class Registrations:
    """See the module. `served`: counts by name and version."""

    models: dict[str, RegisteredModel] = field(default_factory=dict)
    served: dict[tuple[str, str], Served] = field(default_factory=dict)

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
        for name, version in list(self.served):
            if name not in self.models or version not in self.models[name].versions:
                del self.served[name, version]

    def find_longest(self, path: str) -> RegisteredPath | None:
        """The longest registered name that `path`, without a leading slash, is or begins with."""
        end = len(path)
        while end > 0:
            model = self.models.get(path[:end])
            if model is not None:
                return RegisteredPath(path[:end], model, path[end + 1 :])
            end = path.rfind("/", 0, end)
        return None

    def count_for(self, name: str, version: str) -> Served | None:
        """The counts of a version; None where as many as may be have some already."""
        found = self.served.get((name, version))
        if found is None and len(self.served) < MOST_COUNTED:
            found = self.served[name, version] = Served()
        return found


def find_version(model: RegisteredModel, version: str | None) -> ServedVersion | None:
    """This version of a model, or its default one."""
    return model.versions.get(model.default if version is None else version)


def key_of(version: ServedVersion) -> ModelName:
    """What workers call it."""
    return ModelName(version.key)
