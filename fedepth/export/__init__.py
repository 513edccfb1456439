"""ONNX export and its parity with torch."""
