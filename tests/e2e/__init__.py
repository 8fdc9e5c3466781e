"""Tests of Fleetcast from outside: real processes, sockets and S3 server, and an unmodified AWS client."""
