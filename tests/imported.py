"""What runs import, for the server of forked.py to have behind it."""

import gc

import deepspeed  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch.utils.tensorboard
import transformers.trainer_utils  # noqa: F401
from transformers.models.qwen2 import modeling_qwen2, tokenization_qwen2  # noqa: F401

import rlzoo.algos
import rlzoo.allocators
import rlzoo.data.datamodule
import rlzoo.launch.training
import rlzoo.rewards.verifier
import rlzoo.strategies  # noqa: F401

torch.set_num_threads(1)
gc.freeze()  # DeepSpeed collects garbage at every start, which would look at all of this
