"""The wire format: messages, chunk streams, channels and status codes."""

import os

# All of this is decided when grpc is loaded, so both programs import this package first.
# Names are looked up as the system does, with /etc/hosts, mDNS and whatever else nsswitch.conf lists; gRPC's own
# resolver knows DNS only.
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")
# gRPC would write a line of its own to standard error for every stranger whose handshake fails.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
