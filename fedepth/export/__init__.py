"""ONNX export and its parity with torch."""

import os

# From 1.29 on, ONNX Runtime sends the names of models and hashes of their weights to its makers unless it is told not
# to before it is loaded (microsoft/onnxruntime#27379), and complains where it cannot keep the number of this machine.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
