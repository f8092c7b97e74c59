"""All settings: what they are, where they come from, and a run's folder that keeps them."""

from momatch.config.schema import (
    AdapterConfig,
    Clip,
    DistillConfig,
    EmaConfig,
    GuidanceConfig,
    MonitorConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    StoppingConfig,
    TeacherConfig,
    TrainConfig,
    WeightingConfig,
    to_json,
)
from momatch.data.reading import Reading
from momatch.methods.alternating import AlternatingConfig
from momatch.methods.discrete import DiscreteConfig
from momatch.methods.instant import InstantConfig
from momatch.utils.errors import ConfigError

__all__ = [
    "AdapterConfig",
    "AlternatingConfig",
    "Clip",
    "ConfigError",
    "DiscreteConfig",
    "DistillConfig",
    "EmaConfig",
    "GuidanceConfig",
    "InstantConfig",
    "MonitorConfig",
    "OptimConfig",
    "Reading",
    "RunConfig",
    "ScheduleConfig",
    "StoppingConfig",
    "TeacherConfig",
    "TrainConfig",
    "WeightingConfig",
    "to_json",
]
