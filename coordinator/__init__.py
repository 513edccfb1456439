"""The coordinator: a job, its rounds, the global weights and the record of every device."""

import fedepth_wire  # noqa: F401 - before grpc
