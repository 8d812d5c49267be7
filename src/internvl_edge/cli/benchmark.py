"""``benchmark``: how fast, compared with what, and how far from what the machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from internvl_edge.benchmark import chat, table
from internvl_edge.benchmark.load import MOST_CALLERS, SCENARIOS
from internvl_edge.benchmark.machine import load_warning
from internvl_edge.benchmark.run import Benchmark, run_benchmark
from internvl_edge.benchmark.settings import (
    AGAINST,
    Settings,
    choose_components,
    open_artifacts,
    read_picture,
    reference_of,
)
from internvl_edge.cli.console import Output
from internvl_edge.cli.options import (
    CHECKPOINT,
    DIRECTORY,
    NEW_FILE,
    Finite,
    allow_slow,
    answers,
    backend,
    device,
    names,
    one_of,
    threads,
)
from internvl_edge.errors import UsageError, did_you_mean
from internvl_edge.files.disk import write_atomically
from internvl_edge.runtime.session import BACKENDS, options_for, require_device

MAX_SECONDS = 86_400.0  # of one measurement
TASKS = ("components", "chat")
OF_CHAT = ("tiles", "prompt", "answer", "callers", "slots")  # options of that task alone
# And of the other one.
OF_COMPONENTS = (
    *("against", "checkpoint", "scenario", "streams", "p99_ms", "components", "image", "batch"),
    *("roofline", "memory", "forecast_gpu"),
)
STREAMS = 2  # calls at once, unless asked otherwise


@click.command()
@click.argument("outs", type=DIRECTORY, nargs=-1, required=True)
@click.option(
    "--task",
    type=one_of(*TASKS),
    default="components",
    show_default=True,
    help="What is timed: each component, or answers from the question to the last token.",
)
@click.option(
    "--tiles",
    type=click.IntRange(0, 40),
    default=1,
    show_default=True,
    help="Of chat: tiles of a picture; 0: no picture.",
)
@click.option(
    "--prompt",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Of chat: tokens of text that a question has.",
)
@click.option(
    "--answer",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Of chat: tokens of an answer.",
)
@click.option(
    "--callers",
    default="1,4,16",
    show_default=True,
    help="Of chat: numbers of callers at once, comma-separated.",
)
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Of chat: answers that share a decoder with a cache of fixed capacity, on a CPU.",
)
@click.option(
    "--against",
    callback=lambda _, __, value: _rival(value),
    help="Time this too, in turns: pytorch, torch-compile, openvino, or another OUT.",
)
@click.option(
    "--checkpoint",
    type=CHECKPOINT,
    help="The checkpoint that PyTorch runs; default: the bundled demo.",
)
@click.option(
    "--scenario",
    type=one_of(*SCENARIOS),
    default="single-stream",
    show_default=True,
    help="How calls come in; all but the first measure each contender by itself.",
)
@click.option(
    "--streams",
    type=click.IntRange(1, MOST_CALLERS),
    help=f"Calls at once, of every scenario but the first; {STREAMS} by default.",
)
@click.option(
    "--p99",
    "p99_ms",
    type=Finite(min=0, min_open=True),
    help="Of the server, in ms: the bound that its rate keeps; default: 5 times a single call.",
)
@click.option("--components", callback=names, help="Comma-separated; default: all there are.")
@click.option(
    "--image",
    type=DIRECTORY,
    help="The picture that is timed from its file's bytes to its embedding; default: a JPEG of "
    "640 by 480.",
)
@click.option("--batch", default="1", show_default=True, help="Batch sizes, comma-separated.")
@click.option(
    "--seconds",
    type=Finite(min=0, max=MAX_SECONDS),
    default=3.0,
    show_default=True,
    help="Least time for each measurement; of the server, the time of each rate.",
)
@click.option(
    "--roofline/--no-roofline",
    default=True,
    help="Measure this machine's peaks too, and say what share of them each component reaches.",
)
@click.option(
    "--memory/--no-memory",
    default=True,
    help="Open each component in a process of its own too, and say what memory that took.",
)
@click.option(
    "--forecast-gpu",
    help="Run nothing; estimate each component on a GPU that is not there: h100, h200, l40s, "
    "rtx4090, orin.",
)
@click.option("--markdown", type=NEW_FILE, help="Write the table to this file too.")
@click.option(
    "--report",
    type=NEW_FILE,
    help="Write the first OUT's report to this file, with plots of speed.",
)
@backend
@device
@threads
@allow_slow
@answers
@click.pass_context
def benchmark(
    context: click.Context,
    output: Output,
    outs: tuple[Path, ...],
    task: str,
    tiles: int,
    prompt: int,
    answer: int,
    callers: str,
    slots: int,
    against: str | Path | None,
    checkpoint: Path | None,
    components: tuple[str, ...] | None,
    image: Path | None,
    batch: str,
    seconds: float,
    backend: str,
    device: str,
    threads: int | None,
    allow_slow: bool,
    scenario: str,
    streams: int | None,
    p99_ms: float | None,
    roofline: bool,
    memory: bool,
    forecast_gpu: str | None,
    markdown: Path | None,
    report: Path | None,
) -> None:
    """Time every component of each OUT, all contenders taking turns.

    Latency is that of one call on the host: p50, p90 and p99 of the raw samples, after a warm-up
    that ends when the latency is steady. What embeds a picture is timed from arrays, and from the
    file's bytes too: decode, resize, normalise, run. Ratios of latencies come with their 95 %
    interval. Memory is that of a process that opens the component alone. MFU and MBU are the shares
    of the operations and bytes per second that this machine reached when it was asked for nothing
    else. Of engines, the GPU's part is shown by trtexec's names.

    --task chat times conversations of two turns about a picture: the time to the first token with
    its parts (preprocessing, vision, prefill), from token to token, tokens per second of all
    callers, and how much of the prompts was not read again.
    """
    _require_options_of(context, task)
    if task == "chat":
        load = chat.ChatLoad(
            tiles=tiles,
            prompt_tokens=prompt,
            answer_tokens=answer,
            callers=_numbers("--callers", callers),
            slots=slots,
            seconds=seconds,
        )
        options = options_for(backend, threads, allow_slow=allow_slow)
        device = require_device(device)
        _time_chats(output, outs, load, backend, device, options, markdown, report)
        return
    if isinstance(against, Path):
        outs, against = (*outs, against), None
    _require_together(against, checkpoint, scenario, streams, p99_ms)
    if forecast_gpu is None:
        device = require_device(device)
    if device == "auto" and backend in BACKENDS:
        device = BACKENDS[backend].device  # of what it is compared with, too
    artifacts = open_artifacts(outs)
    chosen = choose_components(artifacts, components)
    settings = Settings(
        artifacts=artifacts,
        components=chosen,
        batch_sizes=_numbers("--batch", batch),
        picture=read_picture(image, chosen),
        against=against,
        reference=reference_of(against, checkpoint, artifacts, backend, device),
        backend=backend,
        device=device,
        options=options_for(backend, threads, allow_slow=allow_slow),
        scenario=scenario,
        streams=streams or STREAMS,
        seconds=seconds,
        p99_ms=p99_ms,
        has_memory=memory,
        has_roofline=roofline,
    )
    if forecast_gpu is None:
        _time_components(output, settings, markdown, report)
    else:
        _forecast(output, settings, forecast_gpu)


def _require_together(
    against: str | None,
    checkpoint: Path | None,
    scenario: str,
    streams: int | None,
    p99_ms: float | None,
) -> None:
    """Refuse options without those that they are about."""
    if checkpoint is not None and against in (None, "openvino"):
        raise UsageError(f"--checkpoint {checkpoint} requires --against pytorch or torch-compile")
    if p99_ms is not None and scenario != "server":
        raise UsageError(f"--p99 requires --scenario server (got --scenario {scenario})")
    if streams is not None and scenario == SCENARIOS[0]:
        raise UsageError(
            f"--streams {streams}: --scenario {scenario} makes one call at a time; choose "
            f"{', '.join(SCENARIOS[1:])}, or leave --streams out"
        )


def _time_chats(
    output: Output,
    outs: tuple[Path, ...],
    load: chat.ChatLoad,
    backend: str,
    device: str,
    options: Any,
    markdown: Path | None,
    report: Path | None,
) -> None:
    """Time conversations, and show them."""
    artifacts = open_artifacts(outs)
    if (warning := load_warning()) is not None:
        output.say(warning)
    chats = chat.run_chats(artifacts, load, backend, device, options)
    output.table(chat.COLUMNS, chat.rows_of(chats))
    output.lines([chat.load_words(load)])
    if markdown is not None:
        write_atomically(markdown, chat.markdown(chats).encode())
    if report is not None:
        from internvl_edge.compiler.report.report import chat_figures, report_with

        first = next(iter(artifacts.values()))
        figures = chat_figures(
            chats.to_json(),
            columns=chat.COLUMNS,
            rows=chat.rows_of(chats),
            load=chat.load_words(load),
            environment=table.environment_words(chats.environment),
        )
        drawn = report_with(first.path, first.manifest, speed=figures)
        write_atomically(report, drawn.encode())
    output.result(chats.to_json())


def _time_components(
    output: Output, settings: Settings, markdown: Path | None, report: Path | None
) -> None:
    """Time every component, and show them."""
    if (warning := load_warning()) is not None:
        output.say(warning)
    measured = run_benchmark(settings)
    _show(output, measured)
    if markdown is not None:
        write_atomically(markdown, table.markdown(measured).encode())
    if report is not None:
        write_atomically(report, _report(settings, measured).encode())
    output.result(measured.to_json())


def _forecast(output: Output, settings: Settings, gpu: str) -> None:
    """Estimate every component on a GPU that is not there, and show them."""
    from internvl_edge.benchmark.limits.forecast import COLUMNS, run_forecast

    rows = run_forecast(settings, gpu)
    output.table(COLUMNS, [row.texts() for row in rows])
    output.lines(
        [
            f"an estimate for {gpu}, from shapes and its data sheet; nothing was run. roof: the "
            "least that the products take at the data sheet's peaks"
        ]
    )
    output.result({"gpu": gpu, "is_estimate": True, "results": [row.to_json() for row in rows]})


def _show(output: Output, measured: Benchmark) -> None:
    names = table.columns(measured.measurements)
    output.table(names, [table.row(measurement, names) for measurement in measured.measurements])
    words = table.environment_words(measured.environment)
    output.lines(["  ".join(f"{key}: {value}" for key, value in words.items())])
    output.lines([table.peaks_line(measured.peaks)] if measured.peaks else [])
    output.lines([table.comparison_line(comparison) for comparison in measured.comparisons])
    for warning in table.warnings(measured.measurements):
        output.say(warning)


def _report(settings: Settings, measured: Benchmark) -> str:
    """Render the first directory's report with a section on speed."""
    from internvl_edge.compiler.report.report import report_with, speed_figures

    names = table.columns(measured.measurements)
    figures = speed_figures(
        measured.to_json(),
        columns=names,
        rows=[table.row(measurement, names) for measurement in measured.measurements],
        ratios=[table.comparison_line(comparison) for comparison in measured.comparisons],
        environment=table.environment_words(measured.environment),
    )
    first = next(iter(settings.artifacts.values()))
    return report_with(first.path, first.manifest, speed=figures)


def _rival(name: str | None) -> str | Path | None:
    """Read --against: one of ``AGAINST``, in whatever case, or another compiled directory."""
    if name is None or name.lower() in AGAINST:
        return name and name.lower()
    if not Path(name).is_dir():
        raise UsageError(
            f"--against {name!r}: expected {', '.join(AGAINST)} or another compiled directory"
            f"{did_you_mean(name, AGAINST)}"
        )
    return Path(name)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise UsageError(f"{option}: expected positive numbers such as 1,8, found {text!r}")
    return numbers


def _require_options_of(context: click.Context, task: str) -> None:
    """Refuse options of another task."""
    for name in OF_COMPONENTS if task == "chat" else OF_CHAT:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = "--" + name.removesuffix("_ms")
            raise UsageError(f"{option} is no option of --task {task}; leave it out")
