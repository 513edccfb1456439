"""fedepth: what to compute. Federated learning for devices with little and unequal memory.

Nothing here knows of sockets. Import the module you need; this package loads none by itself, so that an
idle agent never pays for torch.
"""

__version__ = "0.1.0"
