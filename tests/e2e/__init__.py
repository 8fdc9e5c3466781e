"""Fleetcast from outside: real processes, real sockets, a real S3 server, and the AWS client as users have it."""
