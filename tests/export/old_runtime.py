"""Runs exported models in an environment of its own: python old_runtime.py FOLDER, for each NAME.onnx with NAME.npz.

Writes what the installed ONNX Runtime gives to NAME.found.npy. Nothing but onnxruntime and numpy is there.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

for path in sorted(Path(sys.argv[1]).glob("*.onnx")):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = np.load(path.with_suffix(".npz"))["inputs"]
    np.save(path.with_suffix(".found.npy"), session.run(None, {session.get_inputs()[0].name: inputs})[0])
print(onnxruntime.__version__)
