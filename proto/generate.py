"""Generates the protobuf code: `python proto/generate.py [OUTPUT_ROOT]` (default: this folder)."""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent


def generate(output: Path) -> int:
    return int(
        protoc.main(
            [
                "protoc",
                f"--proto_path={ROOT}",
                f"--python_out={output}",
                f"--grpc_python_out={output}",
                f"--mypy_out={output}",
                f"--mypy_grpc_out={output}",
                "fedepth_wire/v1/federation.proto",
                "fedepth_wire/v1/trust.proto",
            ]
        )
    )


if __name__ == "__main__":
    sys.exit(generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
