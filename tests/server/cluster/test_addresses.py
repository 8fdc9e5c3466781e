"""What a node says of its addresses leads other hosts to it, and not to themselves."""

from server.cluster.addresses import describe_node


def test_a_listener_on_all_addresses_is_named_by_the_host() -> None:
    """Wildcards of either family become the host; an address of its own stays, such as loopback's."""
    announced = {
        "node": "https://[2001:db8::7]:7000",
        "inference": "https://0.0.0.0:8080",
        "management": "https://127.0.0.1:8081",
        "metrics": "https://[::]:8082",
    }
    node = describe_node("a", announced)
    assert node.address == "[2001:db8::7]:7000"
    assert node.inference == "https://[2001:db8::7]:8080"
    assert node.management == "https://127.0.0.1:8081"
    assert node.metrics == "[2001:db8::7]:8082"
