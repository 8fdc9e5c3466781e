"""Calls for many models as tables: Arrow IPC streams and npy, read and written without numpy or pyarrow."""
