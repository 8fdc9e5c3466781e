"""Management APIs of archived model servers, on the management listener: one file a server, and what they share."""
