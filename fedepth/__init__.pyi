from fedepth.aggregation.aggregate import aggregate
from fedepth.aggregation.rules import Krum, Median, NormClipping, TrimmedMean, WeightedMean
from fedepth.aggregation.updates import ClientUpdate
from fedepth.costs import Calibration, ModelCosts
from fedepth.errors import FedepthError
from fedepth.export.onnx import ExportReport, random_samples
from fedepth.export.onnx import export as export_onnx
from fedepth.job_sections import ExportSection
from fedepth.local import LocalUpdate, save_prepared, train_task
from fedepth.models.catalog import named_spec
from fedepth.plan import Plan, Policy, Stage
from fedepth.planning.explain import explain
from fedepth.planning.planner import make_plan
from fedepth.prepare import PreparedModel, prepare_model
from fedepth.simulation.setup import Options
from fedepth.simulation.simulate import simulate
from fedepth.task import ModelSpec, Result, TrainingSpec

__version__: str
__all__ = [
    "Calibration",
    "ClientUpdate",
    "ExportReport",
    "ExportSection",
    "FedepthError",
    "Krum",
    "LocalUpdate",
    "Median",
    "ModelCosts",
    "ModelSpec",
    "NormClipping",
    "Options",
    "Plan",
    "Policy",
    "PreparedModel",
    "Result",
    "Stage",
    "TrainingSpec",
    "TrimmedMean",
    "WeightedMean",
    "aggregate",
    "explain",
    "export_onnx",
    "make_plan",
    "named_spec",
    "prepare_model",
    "random_samples",
    "save_prepared",
    "simulate",
    "train_task",
]
