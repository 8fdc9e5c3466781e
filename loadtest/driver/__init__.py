"""The open-loop load: schedules, request bodies, driver processes and their results."""
