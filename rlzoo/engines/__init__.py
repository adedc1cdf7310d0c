from rlzoo.engines.base import Engine, Request, Response

__all__ = ["Engine", "Request", "Response"]
