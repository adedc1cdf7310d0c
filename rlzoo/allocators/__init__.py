from rlzoo.allocators.base import Allocator
from rlzoo.allocators.dynamic import Dynamic
from rlzoo.allocators.gvm import GVM
from rlzoo.allocators.uniform import Uniform

__all__ = ["GVM", "Allocator", "Dynamic", "Uniform"]
