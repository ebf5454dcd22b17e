"""What a run is asked: Config and its sections, handed on here.

Presets, hardware and the command line are files of their own. May import disk. No torch.
"""

from glassloop.config.config import (
    BatchConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    as_dict,
    settled,
)
from glassloop.config.data import Columns, DataConfig
from glassloop.config.lora import ALL_LINEAR, PROJECTIONS, LoraConfig
from glassloop.config.sections import (
    ENGINES,
    CheckpointConfig,
    EvaluationConfig,
    ExecutionConfig,
    MemoryConfig,
    RecordConfig,
    ResumeConfig,
    RunConfig,
    Section,
    StabilityConfig,
    TrackingConfig,
)

__all__ = [
    "ALL_LINEAR",
    "ENGINES",
    "PROJECTIONS",
    "BatchConfig",
    "CheckpointConfig",
    "Columns",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "ExecutionConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RecordConfig",
    "ResumeConfig",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "StabilityConfig",
    "TrackingConfig",
    "as_dict",
    "settled",
]
