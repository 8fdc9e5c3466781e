"""The Ray Serve application: the deployment of `replica`, made of options. A Serve config file names `build` here."""

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.deployment import Application

from server.cluster.autoscaling import POLICY, Scaling
from server.cluster.options import MAX_ONGOING, ReplicaOptions, read_arguments
from server.cluster.replica import EngineReplica, make_app
from server.sdk import __version__
from server.settings import Settings

DEPLOYMENT = "engine"
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 5.0, 10.0
STATS_PERIOD_S = 1.0  #: between two times that a replica says which node it is
END_S = 15.0  #: beyond `drain_s`, within which a replica has ended
#: Ray takes the mean of what replicas report over `up_after_s`, within these; it sends reports every ten seconds.
SHORTEST_WINDOW_S, LONGEST_WINDOW_S = 12.0, 30.0


def build_application(options: ReplicaOptions, scaling: Scaling) -> Application:
    """Replicas of the engine, as many as `scaling` says."""
    settings = Settings.from_wire(options.settings)
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
        **_make_scaling_options(scaling),
    )
    # Without a version of ours each deployment is new code to Ray, which then starts all replicas anew; with it other
    # settings are a call of `reconfigure`, in place.
    deployment = deployment.options(version=f"fleetcast-{__version__}", _internal=True)
    application: Application = deployment.bind()
    return application


def _make_scaling_options(scaling: Scaling) -> dict[str, Any]:
    if scaling.most_replicas <= scaling.replicas:
        return {"num_replicas": scaling.replicas}
    config = AutoscalingConfig(
        min_replicas=scaling.replicas,
        max_replicas=scaling.most_replicas,
        target_ongoing_requests=scaling.requests_per_replica,
        upscale_delay_s=scaling.up_after_s,
        downscale_delay_s=scaling.down_after_s,
        look_back_period_s=min(LONGEST_WINDOW_S, max(SHORTEST_WINDOW_S, scaling.up_after_s)),
        policy=AutoscalingPolicy(policy_function=POLICY),
    )
    return {"num_replicas": None, "autoscaling_config": config}


def build(arguments: dict[str, Any]) -> Application:
    """For a Serve config file: `import_path: server.cluster.application:build`, with the options as `args`.

    `args` are the fields of `ReplicaOptions`, where `settings` may leave out what has a default, and beside them those
    of `Scaling`. Raises ValueError that says what is wrong.
    """
    return build_application(*read_arguments(arguments))
