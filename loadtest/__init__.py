"""Load tests: fleets to test with, benchmarks, peers and dated records. A client: it never imports the server."""
