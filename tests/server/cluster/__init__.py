"""Tests of `server.cluster`; those with Ray are in `tests.e2e.test_ray`."""
