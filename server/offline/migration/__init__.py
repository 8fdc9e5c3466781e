"""Turns the config.properties of TorchServe and Multi Model Server into our settings (`fleetcast migrate`). No torch.

`properties` reads the file as Java does, `model_servers` knows both servers' keys, variables and defaults, `rules` says
what becomes of each key, `translation` applies them, and `rendering` writes the result as fleetcast.toml or flags.
"""
