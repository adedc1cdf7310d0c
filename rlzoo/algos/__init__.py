from rlzoo.algos.base import PolicyAlgorithm
from rlzoo.algos.grpo import GRPO
from rlzoo.algos.raft import RAFT
from rlzoo.algos.raft_pp import RAFTPlusPlus
from rlzoo.algos.reinforce_rej import ReinforceRej
from rlzoo.algos.sft import SFT

__all__ = ["GRPO", "RAFT", "SFT", "PolicyAlgorithm", "RAFTPlusPlus", "ReinforceRej"]
