"""``lint`` and ``bisect``: what is wrong with a quantized graph, and where."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import click

from internvl_edge.cli.compile import require_export
from internvl_edge.cli.console import Output
from internvl_edge.cli.options import DIRECTORY, answers, backend
from internvl_edge.errors import VerificationError

EXAMPLES = 3  # of each rule, in the answer for people


@click.command()
@click.argument("file", type=DIRECTORY)
@backend
@answers
def lint(output: Output, backend: str, file: Path) -> None:
    """Explain every violation of the Q/DQ placement rules in FILE.onnx, ours or another tool's.

    Exit code 0 where there is none (notes do not count), 6 where there are.
    """
    require_export()
    from internvl_edge.quantize.lint import RULES, is_clean
    from internvl_edge.quantize.lint import lint as lint_file

    findings = sorted(lint_file(file), key=lambda found: found.rule)
    clean = is_clean(findings)
    counts: dict[str, int] = {}
    for rule, group in groupby(findings, key=lambda found: found.rule):
        places = list(group)
        counts[rule] = len(places)
        output.lines([f"{places[0].severity} {rule}: {len(places)} place(s)"])
        output.lines([f"    {place.node}: {place.found}" for place in places[:EXAMPLES]])
        output.lines([f"    … and {len(places) - EXAMPLES} more"] * (len(places) > EXAMPLES))
        output.lines([f"  {RULES[rule].says}", f"  → {RULES[rule].fix}"])
    output.lines([f"{file}: {_verdict(counts, clean)}"])
    shown: list[dict[str, Any]] = [found.to_json() for found in findings]
    output.result({"file": file, "clean": clean, "counts": counts, "findings": shown})
    if not clean:
        raise click.exceptions.Exit(VerificationError.exit_code)


def _verdict(counts: dict[str, int], clean: bool) -> str:
    if not counts:
        return "every rule of Q/DQ placement is kept"
    kinds = f"{sum(counts.values())} finding(s) of {len(counts)} rule(s)"
    return f"clean, with notes: {kinds}" if clean else kinds
