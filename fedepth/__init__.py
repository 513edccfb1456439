"""fedepth: what to compute. Federated learning for devices with little and unequal memory.

Nothing here knows of sockets. The names in `__all__` are fedepth as a library (docs/library.md): they are loaded when
they are first used, so that an idle agent, which imports this package too, never pays for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "Calibration": "fedepth.costs",
    "ClientUpdate": "fedepth.aggregation.updates",
    "ExportReport": "fedepth.export.onnx",
    "ExportSection": "fedepth.job_sections",
    "FedepthError": "fedepth.errors",
    "Krum": "fedepth.aggregation.rules",
    "LocalUpdate": "fedepth.local",
    "Median": "fedepth.aggregation.rules",
    "ModelCosts": "fedepth.costs",
    "ModelSpec": "fedepth.task",
    "NormClipping": "fedepth.aggregation.rules",
    "Options": "fedepth.simulation.setup",
    "Plan": "fedepth.plan",
    "Policy": "fedepth.plan",
    "PreparedModel": "fedepth.prepare",
    "Result": "fedepth.task",
    "Stage": "fedepth.plan",
    "TrainingSpec": "fedepth.task",
    "TrimmedMean": "fedepth.aggregation.rules",
    "WeightedMean": "fedepth.aggregation.rules",
    "aggregate": "fedepth.aggregation.aggregate",
    "explain": "fedepth.planning.explain",
    "export_onnx": "fedepth.export.onnx",
    "make_plan": "fedepth.planning.planner",
    "named_spec": "fedepth.models.catalog",
    "prepare_model": "fedepth.prepare",
    "random_samples": "fedepth.export.onnx",
    "save_prepared": "fedepth.local",
    "simulate": "fedepth.simulation.simulate",
    "train_task": "fedepth.local",
}

_OTHERWISE_CALLED = {"export_onnx": "export"}  # which is a package of fedepth

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), _OTHERWISE_CALLED.get(name, name))
    globals()[name] = value  # from now on found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
