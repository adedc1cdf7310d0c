"""A faster way through math-verify's LaTeX grammar, with the same results."""

from __future__ import annotations

from antlr4 import Parser, ParserRuleContext
from antlr4.atn.PredictionMode import PredictionMode
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy


def parse_in_two_stages() -> None:
    """Make this process parse LaTeX with SLL prediction, and with full LL where that fails.

    This is ANTLR's own advice (PredictionMode): SLL gives LL's parse tree or a syntax error.
    latex2sympy uses LL throughout, whose full-context look-ahead is not cached; symbolic answers
    cost about three times as much.
    """
    create_parser = _Latex2Sympy.create_parser

    def create_two_stage_parser(self: _Latex2Sympy, latex: str) -> Parser:
        parser = create_parser(self, latex)
        parse_all = parser.math

        def parse() -> ParserRuleContext:
            parser._interp.predictionMode = PredictionMode.SLL
            try:
                return parse_all()
            except Exception:  # latex2sympy raises syntax errors as bare Exceptions
                parser.reset()
                parser._interp.predictionMode = PredictionMode.LL
                return parse_all()

        parser.math = parse
        return parser

    _Latex2Sympy.create_parser = create_two_stage_parser
