from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.algos.cispo import CISPO
from rlzoo.algos.grpo import GRPO
from rlzoo.algos.gspo import GSPO
from rlzoo.algos.iterative_dpo import IterativeDPO
from rlzoo.algos.ppo import PPO
from rlzoo.algos.raft import RAFT
from rlzoo.algos.raft_pp import RAFTPlusPlus
from rlzoo.algos.reinforce import Reinforce
from rlzoo.algos.reinforce_pp_baseline import ReinforcePPBaseline
from rlzoo.algos.reinforce_rej import ReinforceRej
from rlzoo.algos.rloo import RLOO
from rlzoo.algos.sft import SFT

__all__ = [
    "CISPO",
    "GRPO",
    "GSPO",
    "IterativeDPO",
    "PPO",
    "PolicyAlgorithm",
    "RAFT",
    "RAFTPlusPlus",
    "RLOO",
    "Reinforce",
    "ReinforcePPBaseline",
    "ReinforceRej",
    "SFT",
]
