from rlzoo.callbacks.checkpoint import Checkpoint
from rlzoo.callbacks.doctor import Doctor
from rlzoo.callbacks.export import Export
from rlzoo.callbacks.gvm import GVM
from rlzoo.callbacks.preemption import Preemption
from rlzoo.callbacks.rank_watch import RankWatch
from rlzoo.callbacks.replan import Replan
from rlzoo.callbacks.restore import Restore
from rlzoo.callbacks.rollout_log import RolloutLog
from rlzoo.callbacks.sft_log import SFTLog
from rlzoo.callbacks.validation import Validation
from rlzoo.callbacks.weight_sync import WeightSync

__all__ = [
    "GVM",
    "Checkpoint",
    "Doctor",
    "Export",
    "Preemption",
    "RankWatch",
    "Replan",
    "Restore",
    "RolloutLog",
    "SFTLog",
    "Validation",
    "WeightSync",
]
