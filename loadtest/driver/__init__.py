"""The open-loop load: schedules, bodies, processes that send, and what came of it."""
