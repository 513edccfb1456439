"""Version 1 of the protocol; the _pb2 modules are generated from federation.proto (`make proto`)."""
