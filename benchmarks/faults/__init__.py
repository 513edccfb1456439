"""Faults injected into real processes, and a judge of what came of them: `python -m benchmarks.faults --json FILE`."""
