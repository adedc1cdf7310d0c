from rlzoo.allocators.base import Allocator
from rlzoo.allocators.dynamic import Dynamic
from rlzoo.allocators.gvm import GVMBudgets
from rlzoo.allocators.uniform import Uniform

__all__ = ["GVMBudgets", "Allocator", "Dynamic", "Uniform"]
