"""What a round costs beyond training, against Flower and against a bare loop over gRPC."""
