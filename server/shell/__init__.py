"""How both commands, `fleetcast` and `fleetcast-load`, look in a shell: help, completion, progress, text that is shown.

It imports the standard library and typer, and rich only where a bar is drawn.
"""
