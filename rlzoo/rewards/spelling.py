r"""One spelling for answers that mean the same, before they are compared as text and parsed.

Every rule keeps the meaning: `\tfrac12`, full-width digits, `28 percent` and `1.5e-5` are other
ways to write what math-verify reads as `\frac12`, digits, `28\%` and `1.5 \cdot 10^{-5}`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n", strict=True))
_NAMES = "times cdot cdot infty le ge ne approx cup cap emptyset pm in".split()
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("−–‒‐‑﹣－", "-"),
        **dict.fromkeys("‘’′`", "'"),
        **dict.fromkeys("“”", '"'),
        **dict.fromkeys("£€¥₹₽₩¢", ""),
        **dict.fromkeys("°º˚", r"^\circ "),
        **dict.fromkeys("⟨〈", r"\langle "),
        **dict.fromkeys("⟩〉", r"\rangle "),
        **dict.fromkeys("⁄÷", "/"),
        **{sign: rf"\{name} " for sign, name in zip("×·⋅∞≤≥≠≈∪∩∅±∈", _NAMES, strict=True)},
    }
)
_GREEK = "alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi psi omega".split()
_GREEK_SIGNS = str.maketrans(
    {sign: rf"\{name} " for sign, name in zip("αβγδεθλμπρστφψω", _GREEK, strict=True)}
)

_TEXT = r"\\(?:text(?:rm|bf|it|normal)?|mbox|mathrm|operatorname)\s*"
_WRAPPERS = re.compile(
    r"(?:^|\\(?:boldsymbol|bm|mathbf|mathit|mathsf|mathtt|mathnormal|underline|ensuremath|num"
    r"|textcolor\{\w*\}|color\{\w*\}|colorbox\{\w*\}))\s*\{"
)
_PERCENT = re.compile(
    rf"(?:\\[ ,;!]|~|\s)*(?:{_TEXT}\{{\s*)?"
    r"(?:\\?%|\bper\s?cent\b|\bpct\b|\bpercentage\b(?:\s+points?)?)(?:\s*\})?",
    re.IGNORECASE,
)
_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_FUNCTIONS = (
    "sin|cos|tan|cot|sec|csc|log|exp|sqrt|max|min|mod|det|and|infinity|frac|theta|alpha|beta"
)

_RULES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Layout
        (r"\\left(?![a-z])|\\right(?![a-z])|\\[bB]igg?[lrm]?(?![a-zA-Z])", ""),
        (r"\\(?:display|text)style(?![a-z])|\\(?:large|Large|LARGE|huge|bf|rm|it)(?![a-zA-Z])", ""),
        (r"\\color\{\w*\}|\\mathdollar(?![a-z])|\\pounds(?![a-z])|\\?\$", ""),
        (r"\*\*|\\?\"|(?<!\\)\\[()\[\]]", ""),
        (r"^\s*(?:\\approx|\\sim)(?![a-z])", ""),
        # Numbers. math-verify adds what a space separates: 1\,234 would be 235.
        (r"(?<=[0-9])\.(?![0-9.]|\\overline|\\bar|\\dot)", ""),  # "7." and "1./3" do not parse
        (r"(?<=[0-9])(?:\\[,;:! ]|,\\!\s?|\{,\}\s?|\\text\{,\}|~)(?=[0-9]{3}(?![0-9]))", ""),
        (r"\\hspace\s*\{[^{}]*\}|(?<!\\)\\[,;: ]|(?<!\\)~(?!=)|\\q?quad(?![a-z])", " "),
        (r"(?<!\\)\\!", ""),
        (rf"{_TEXT}\{{\s*(-?[0-9][0-9.,/]*)\s*\}}", r"\1"),
        (rf"{_TEXT}\{{\s*(-?[0-9][0-9.,/]*)\s+([A-Za-z%(][^{{}}]*)\}}", r"\1\\text{ \2}"),
        # \text{3, 5}, and 12\text{ to 15} or 12\text{ feet 3} in words are no 3 or 12 with a unit.
        (rf"{_TEXT}\{{\s*([,;]?)\s*(-?[0-9][^{{}}]*)\}}", r"\1 \2"),
        (rf"(?<=[0-9])(\s*{_TEXT}\{{[,;\s]*[A-Za-z ]+\s)(-?[0-9][^{{}}]*)\}}", r"\1}\2"),
        (r"\\mathrm\s*\{([eid])\}", r"\1"),
        (r"\\(?:nice|s|flat)frac(?![a-z])|(?<![\\a-z])frac(?=\{)", r"\\frac"),
        (r"\\(?:varnothing)(?![a-z])", r"\\emptyset"),
        (r"(?<=[0-9])\s*\\(?:cdot|times)\s*(?=[a-z]{1,2}$)", ""),
        (r"\\langle(?![a-z])", "("),
        (r"\\rangle(?![a-z])", ")"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"^([-+]?)infinity$", r"\1\\infty"),
        (r"\^\s*(-\s*[0-9]+)", r"^{\1}"),
        # Degrees, whatever the angle; not in the argument of a function, where they mean pi/180.
        (
            r"\s*(?:\^\s*\{?\s*(?:\\circ|\\degree|o)(?![a-z])\s*\}?|\\degree(?![a-z]))\s*"
            rf"(?:(?:{_TEXT}\{{\s*)?[CF]\}}?)?\s*(?=$|[,;)\]}}])",
            "",
        ),
        (rf"(?<=[0-9])\^\s*\{{?\s*(?:{_TEXT}\{{)?\s*(?:st|nd|rd|th)\s*\}}?\s*\}}?$", ""),
        (r"(?<=[0-9])\s+(?:[cmkd]?m|ft|in|yd|mi)\s*\^\s*\{?[23]\}?$", ""),
        # An answer that is said in words or signs around a number
        (r"\\equiv(?![a-z])", "="),
        (r"^\s*=\s*", ""),
        (r"^(-?[0-9./]+)\s*=\s*([A-Za-z])$", r"\2=\1"),
        (rf"^{_TEXT}\{{\s*(?i:(?:the )?(?:final )?answer(?: is)?)\s*:?\s*\}}\s*(?=\S)", ""),
        (rf"^(?:{_TEXT}\{{\s*)?(?:USD|EUR|GBP|Rs\.?)(?:\s*\}})?\s*(?=[0-9])", ""),
    )
]
_UNIT = (
    rf"(?:{_TEXT}\{{(?!\s*[apAP]\.?[mM]\b)[^{{}}]*\}}|\\Omega|\\mu(?=\s*\\))"
    r"(?:\^\s*(?:-?\d|\{-?\d+\}))?"
)
_UNITS_AFTER = re.compile(rf"(?<=[0-9}})\]%])\s*{_UNIT}(?:\s*(?:\\cdot|\\times|/)?\s*{_UNIT})*$")
_WORDS_AFTER = re.compile(
    rf"^(-?{_NUMBER})\s+(?!(?:{_FUNCTIONS})\b)[A-Za-z]{{3,}}"
    rf"(?:\s+(?!(?:{_FUNCTIONS})\b)[A-Za-z]{{2,}})*$"
)


def normalise(answer: str) -> str:
    """`answer` in the spelling compared as text and parsed; it means the same."""
    if not answer.isascii():
        answer = _ascii(answer)
    answer = _unwrapped(answer)
    for pattern, replacement in _RULES:
        answer = pattern.sub(replacement, answer)
    if "%" in answer or "p" in answer or "P" in answer:
        answer = _PERCENT.sub(r"\\%", answer)
        answer = re.sub(rf"(?<=%)\s*{_TEXT}\{{[^{{}}]*\}}$", "", answer)  # 5% increase
    answer = re.sub(r"\s+", " ", answer).strip(" `'\"")
    answer = answer.rstrip(".,;: ").rstrip("\\ ").rstrip()
    if whole := re.fullmatch(rf"{_TEXT}\{{([^{{}}]*)\}}", answer):
        answer = whole[1].strip()
    if answer[:1] not in "\\(" and "and" not in answer and "or" not in answer:
        answer = _UNITS_AFTER.sub("", answer)
        answer = _WORDS_AFTER.sub(r"\1", answer)
    return _number_spelling(answer)


def number(text: str) -> Fraction | None:
    r"""The value of 12, -0.5, 1/2, \frac{1}{2}, 1\frac{1}{2}, 1.5 \cdot 10^{-5}; else None."""
    if len(text) > 120 or re.search(r"\d\s+\d", text):
        return None
    text = text.replace(" ", "")
    if found := re.fullmatch(r"([-+]?)(\d*)\\[dtc]?frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))", text):
        sign, whole, *parts = found.groups()
        top, bottom = [int(p) for p in parts if p]
        value = int(whole or 0) + Fraction(top, bottom) if bottom else None
        return -value if value is not None and sign == "-" else value
    power = r"\\(?:cdot|times)10\^(?:\{(-?\d{1,3})\}|(\d))"
    if found := re.fullmatch(rf"([-+]?{_NUMBER}){power}", text):
        return Fraction(found[1]) * Fraction(10) ** int(found[2] or found[3])
    if re.fullmatch(rf"[-+]?(?:{_NUMBER}|\d+/0*[1-9]\d*)", text):
        return Fraction(text)
    return None


def _number_spelling(answer: str) -> str:
    """A whole answer that is a number in a spelling that math-verify does not read."""
    if not re.match(r"[-+]?[\d.(]", answer) or len(answer) > 120:
        return answer
    if re.fullmatch(r"[-+]?[1-9]\d{0,2}(?:[ '_]\d{3})+(?:\.\d+)?", answer):
        return re.sub(r"[ '_]", "", answer)
    answer = re.sub(r"^(-?\d+)\s+(\d+)\s*/\s*(\d+)$", r"\1\\frac{\2}{\3}", answer)
    power = r"[eE]([-+]?)0*(\d{1,3})(?![\w.])"
    answer = re.sub(rf"(?<![\w.\\])({_NUMBER}){power}", _scientific, answer)
    return re.sub(r"(\d+)?\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))$", _repeating, answer)


def _scientific(found: re.Match[str]) -> str:
    return rf"{found[1]} \cdot 10^{{{'-' * (found[2] == '-')}{found[3]}}}"


def _repeating(found: re.Match[str]) -> str:
    r"""0.1\overline{6} as \frac{15}{90}."""
    whole, fixed, period = found[1] or "0", found[2], found[3] or found[4]
    value = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{value}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


def _unwrapped(answer: str) -> str:
    r"""Without commands that only dress what they hold: \mathbf{x}, \textcolor{red}{5}, {(1)}."""
    start = 0
    while found := _WRAPPERS.search(answer, start):
        depth, end = 1, found.end()
        for token in re.finditer(r"\\.|[{}]", answer[found.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(token[0], 0)
            if depth == 0:
                end = found.end() + token.start()
                break
        if depth:
            return answer
        if found[0].lstrip().startswith("{") and answer[end + 1 :].strip():
            start = found.end()  # braces around the first part alone, as in {3 \over 4}{5}
            continue
        answer = answer[: found.start()] + answer[found.end() : end] + answer[end + 1 :]
    return answer


def _ascii(answer: str) -> str:
    """With LaTeX's commands for signs, and with ASCII for other forms of digits and letters."""
    for sign, names in (("^", _SUPERSCRIPTS), ("_", _SUBSCRIPTS)):
        for run in set(re.findall(f"[{''.join(names)}]+", answer)):
            answer = answer.replace(run, f"{sign}{{{''.join(map(names.__getitem__, run))}}}")
    answer = re.sub("[¼½¾⅐-⅞]", _vulgar, answer)
    answer = re.sub(rf"{_TEXT}\{{\s*([°º˚])\s*\}}", r"\1", answer)
    answer = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", answer).replace("√", r"\sqrt")
    answer = unicodedata.normalize("NFKC", answer.translate(_SIGNS))
    return answer.translate(_SIGNS).translate(_GREEK_SIGNS)


def _vulgar(found: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", found[0]).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}" if bottom else found[0]
