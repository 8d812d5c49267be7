"""``lint`` and ``bisect``: what is wrong with a quantized graph, and where."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import click

from internvl_edge.cli.console import Output
from internvl_edge.cli.options import CHECKPOINT, DIRECTORY, answers, no_backend, on_hardware
from internvl_edge.errors import VerificationError
from internvl_edge.export import require_packages

BLOCK_COLUMNS = ("block", "isolated", "accumulated", "unrounded", "worst tensor", "")
EXAMPLES = 3  # of each rule, in the answer for people


@click.command()
@click.argument("file", type=DIRECTORY)
@click.option("--gpu", help="The GPU it shall run on, as sm86; default: any.")
@no_backend
@answers
def lint(output: Output, backend: str, file: Path, gpu: str | None) -> None:
    """Explain every violation of the Q/DQ placement rules in FILE.onnx, ours or another tool's.

    Exit code 0 where there is none (notes do not count), 6 where there are.
    """
    require_packages()
    from internvl_edge.quantize.lint import RULES, is_clean
    from internvl_edge.quantize.lint import lint as lint_file

    findings = sorted(lint_file(file, gpu), key=lambda finding: finding.rule)
    clean = is_clean(findings)
    counts: dict[str, int] = {}
    for rule, group in groupby(findings, key=lambda finding: finding.rule):
        places = list(group)
        counts[rule] = len(places)
        output.lines([f"{places[0].severity} {rule}: {len(places)} place(s)"])
        output.lines([f"    {place.node}: {place.found}" for place in places[:EXAMPLES]])
        output.lines([f"    … and {len(places) - EXAMPLES} more"] * (len(places) > EXAMPLES))
        output.lines([f"  {RULES[rule].says}", f"  → {RULES[rule].fix}"])
    output.lines([f"{file}: {_verdict(counts, clean)}"])
    shown: list[dict[str, Any]] = [finding.to_json() for finding in findings]
    output.result({"file": file, "clean": clean, "counts": counts, "findings": shown})
    if not clean:
        raise click.exceptions.Exit(VerificationError.exit_code)


def _verdict(counts: dict[str, int], clean: bool) -> str:
    if "not-quantized" in counts:
        return "nothing was judged: no QuantizeLinear or DequantizeLinear"
    if not counts:
        return "every rule of Q/DQ placement is kept"
    kinds = f"{sum(counts.values())} finding(s) of {len(counts)} rule(s)"
    return f"clean, with notes: {kinds}" if clean else kinds


@click.command()
@click.argument("out", type=DIRECTORY)
@click.option("--checkpoint", type=CHECKPOINT, help="What OUT was made from; default: the demo's.")
@click.option("--component", help="One of OUT's; default: all that run through a tower.")
@click.option("--min-sqnr", type=float, help="In dB, of every tensor; default: by precision.")
@on_hardware
@no_backend
@answers
def bisect(
    output: Output,
    backend: str,
    out: Path,
    checkpoint: Path | None,
    component: str | None,
    min_sqnr: float | None,
    device: str,
    threads: int | None,
) -> None:
    """Name the first tensor of OUT that is not what PyTorch or the simulated quantization has.

    Every block is run on its own, one in memory at a time. Exit code 6 where a tensor is bad.
    """
    require_packages()
    from internvl_edge.compiler.oracle.bisect import bisect as bisect_graphs
    from internvl_edge.compiler.plan import Hardware, demo_checkpoint

    hardware = Hardware(device=device, num_threads=threads)
    with output.progress() as report:
        graphs = bisect_graphs(
            out, checkpoint or demo_checkpoint(), component, min_sqnr, report, hardware
        )
    for graph in graphs:
        output.lines(
            [f"{graph.file}: SQNR in dB against PyTorch; of tensors, against {graph.against}"]
        )
        output.table(BLOCK_COLUMNS, [_block_row(block) for block in graph.blocks])
        bad = graph.first_bad
        output.lines(
            [f"every tensor is above {graph.bound_db:g} dB"]
            if bad is None
            else [
                f"first bad tensor: {bad.name}, {bad.sqnr_db:.1f} dB of {graph.bound_db:g}, "
                f"its worst channel {bad.channel_db:.1f} dB"
            ]
        )
    ok = all(graph.first_bad is None for graph in graphs)
    output.result({"out": out, "ok": ok, "graphs": [graph.to_json() for graph in graphs]})
    if not ok:
        raise click.exceptions.Exit(VerificationError.exit_code)


def _block_row(block: Any) -> tuple[str, ...]:
    worst = min(block.tensors, key=lambda tensor: float(tensor.sqnr_db))
    unrounded = "" if block.unrounded_db is None else f"{block.unrounded_db:.1f}"
    figures = f"{block.isolated_db:.1f}", f"{block.accumulated_db:.1f}", unrounded
    return str(block.index), *figures, f"{worst.sqnr_db:.1f}", worst.name
