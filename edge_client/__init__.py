"""The agent of one device and the trainer it starts."""

import fedepth_wire  # noqa: F401 - before grpc
