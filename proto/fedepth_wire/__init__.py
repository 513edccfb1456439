"""The wire format: messages, chunk streams, channels and status codes."""

import os

# Names are looked up as the system does, with /etc/hosts, mDNS and whatever else nsswitch.conf lists; gRPC's own
# resolver knows DNS only. It is decided when grpc is loaded, so both programs import this package first.
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")
