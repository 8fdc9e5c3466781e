"""The Ray Serve application: the deployment of `replica`, made of options. A Serve config file names `build` here."""

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.deployment import Application

from server.cluster.options import MAX_ONGOING, ReplicaOptions, read_arguments
from server.cluster.replica import EngineReplica, make_app
from server.sdk import __version__
from server.settings import Settings

DEPLOYMENT = "engine"
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 5.0, 10.0
STATS_PERIOD_S = 1.0  #: between two times that a replica says which node it is
END_S = 15.0  #: beyond `drain_s`, within which a replica has ended


def build_application(
    options: ReplicaOptions, replicas: int = 1, most_replicas: int = 0, target_ongoing: int = 64
) -> Application:
    """`replicas` of the engine; Ray scales up to `most_replicas` by the requests that its proxies have under way."""
    settings = Settings.from_wire(options.settings)
    scale: dict[str, Any] = {"num_replicas": replicas}
    if most_replicas > replicas:
        scaling = AutoscalingConfig(
            min_replicas=replicas, max_replicas=most_replicas, target_ongoing_requests=target_ongoing
        )
        scale = {"num_replicas": None, "autoscaling_config": scaling}
    deployment = serve.deployment(
        serve.ingress(make_app)(EngineReplica),
        name=DEPLOYMENT,
        user_config=options.to_config(),
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=settings.drain_s + END_S,
        graceful_shutdown_wait_loop_s=0.5,
        request_router_config=RequestRouterConfig(
            request_router_class="server.cluster.request_router:OwnerRouter",
            request_routing_stats_period_s=STATS_PERIOD_S,
        ),
        **scale,
    )
    # Without a version of ours each deployment is new code to Ray, which then starts all replicas anew; with it other
    # settings are a call of `reconfigure`, in place.
    deployment = deployment.options(version=f"fleetcast-{__version__}", _internal=True)
    application: Application = deployment.bind()
    return application


def build(arguments: dict[str, Any]) -> Application:
    """For a Serve config file: `import_path: server.cluster.application:build`, with the options as `args`.

    `args` are the fields of `ReplicaOptions`, where `settings` may leave out what has a default, and beside them
    `replicas` and `most_replicas`. Raises ValueError that says what is wrong.
    """
    options, counts = read_arguments(arguments)
    return build_application(options, **counts)
