"""``wanspec bench``: remote drafting beside what a user would run otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_wanspec.emulate.pacing import Pacing
from vllm_wanspec.lab.compare.arms import ARMS, named_arms, tree_arms
from vllm_wanspec.lab.compare.plan import (
    DEFAULT_ARMS,
    DEFAULT_COUNT,
    DEFAULT_GAMMAS,
    DEFAULT_NGRAMS,
    Options,
    read_setting,
    setting_text,
)
from vllm_wanspec.lab.harness.models import REPEAT_SPAN, find_models, read_prompts
from vllm_wanspec.lab.harness.options import DraftPace, JsonFile, LogFolder, MarkdownFile, TargetPace, parse_list
from vllm_wanspec.lab.harness.running import Outputs, check_needs, console_of_this_run, one_line_errors

__all__ = ["bench"]


def bench(
    target: Annotated[
        str | None, typer.Option(help="Target model: a folder, or a name.", show_default="the demo's")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="Draft model, with the target's tokenizer.", show_default="the demo's")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSON lines of {"prompt": …}, with a "module" or without.', show_default="the demo's"),
    ] = None,
    arms: Annotated[str, typer.Option(help=f"What to compare, of {', '.join(ARMS)}.")] = ",".join(DEFAULT_ARMS),
    trees: Annotated[
        str | None,
        typer.Option(
            metavar="ARMS",
            help='Tree settings as further arms, "name=key=value,key=value; name2=…": remote drafts without prompt '
            "lookup, all from one target, at every round trip of --rtt-ms, one request at a time.",
        ),
    ] = None,
    rtt_ms: Annotated[str, typer.Option(help="Emulated round trips to the drafter, ms.")] = "0,10,20,30,50,70,100",
    far_rtt_ms: Annotated[
        str | None, typer.Option(help="Further ones for remote drafts without lookup alone.", show_default="none")
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at a time.")] = "1",
    concurrent_arms: Annotated[
        str | None, typer.Option(help="What to compare above concurrency 1.", show_default="as --arms")
    ] = None,
    concurrent_rtt_ms: Annotated[
        str | None, typer.Option(help="Round trips above concurrency 1.", show_default="as --rtt-ms")
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(help="Requests per second at random times, for --concurrent-arms.", show_default="none"),
    ] = None,
    jitter_ms: Annotated[float, typer.Option(help="Jitter of the emulated WAN, ms.")] = 0.0,
    loss: Annotated[float, typer.Option(help="Share of the segments that the emulated WAN loses.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of sampling; above 0 outputs cannot be compared.")] = 0.0,
    count: Annotated[int, typer.Option(min=1, help="Prompts whose texts are long enough.")] = DEFAULT_COUNT,
    repeat: Annotated[int, typer.Option(min=1, help="How often each prompt goes through each arm.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=24, max=512, help="Tokens to generate per prompt.")] = 128,
    repeat_span: Annotated[
        int, typer.Option(help="A text is cut where so many tokens in a row have come before.")
    ] = REPEAT_SPAN,
    speculative_tokens: Annotated[int, typer.Option(min=1, max=64, help="Draft tokens verified per step at most.")] = 8,
    gammas: Annotated[
        str, typer.Option(help="Draft tokens per step that the pre-pass tries for co-located draft models.")
    ] = ",".join(map(str, DEFAULT_GAMMAS)),
    ngrams: Annotated[
        str,
        typer.Option(help="What it tries for vLLM's prompt lookup: draft tokens, shortest-longest n-gram."),
    ] = ",".join(map(setting_text, DEFAULT_NGRAMS)),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order and of the intervals.")] = 0,
    pace: Annotated[bool, typer.Option("--pace/--no-pace", help="Stretch forwards to the paces below.")] = True,
    target_pace: TargetPace = "35+0.1",
    draft_pace: DraftPace = "5+0.02",
    time_scale: Annotated[
        float, typer.Option(help="Make paces and round trips this many times as long, where a machine is too slow.")
    ] = 1.0,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
    keep_log: LogFolder = None,
    check: Annotated[bool, typer.Option("--check", help="Fail unless the figures are as good as they have to be.")] = (
        False
    ),
) -> None:
    """Compare remote drafting with plain vLLM, prompt lookup and a co-located draft model, arm by arm in one run.

    An interrupted run goes on when the same command is given again.

    Exit status: 0 when the figures are valid and all outputs right, 1 when not or when something failed, 2 when this
    machine lacks something or an option is wrong, 130 after Ctrl-C.
    """
    # Only here: what measures is slow to import, and every command imports this module.
    from vllm_wanspec.lab.compare.figures import figures
    from vllm_wanspec.lab.compare.report import bench_report
    from vllm_wanspec.lab.compare.run import run_compare

    with one_line_errors("wanspec bench"):
        given = target and draft and prompts
        check_needs(
            instead_of_demo_models=None if given else "--target, --draft and --prompts", plots=markdown_file is not None
        )
        compared = named_arms("--arms", parse_list("--arms", arms, str))
        trips = parse_list("--rtt-ms", rtt_ms, float)
        options = Options(
            target=_model(target) if target else str(find_models(None).target),
            draft=_model(draft) if draft else str(find_models(None).draft),
            prompts=(prompts or find_models(None).bench_prompts).resolve(),
            arms=(*compared, *(tree_arms("--trees", trees) if trees else ())),
            rtt_ms=trips,
            far_rtt_ms=parse_list("--far-rtt-ms", far_rtt_ms, float) if far_rtt_ms else (),
            concurrency=parse_list("--concurrency", concurrency, int),
            concurrent_arms=(
                named_arms("--concurrent-arms", parse_list("--concurrent-arms", concurrent_arms, str))
                if concurrent_arms
                else compared
            ),
            concurrent_rtt_ms=(
                parse_list("--concurrent-rtt-ms", concurrent_rtt_ms, float) if concurrent_rtt_ms else trips
            ),
            rates=parse_list("--rates", rates, float) if rates else (),
            jitter_ms=jitter_ms,
            loss=loss,
            temperature=temperature,
            count=count,
            repeats=repeat,
            max_tokens=max_tokens,
            repeat_span=repeat_span,
            speculative_tokens=speculative_tokens,
            gammas=parse_list("--gammas", gammas, int),
            ngrams=parse_list("--ngrams", ngrams, read_setting, "as in 8:2-4,4:1-3"),
            seed=seed,
            target_pace=Pacing.parse(target_pace, "--target-pace") if pace else None,
            draft_pace=Pacing.parse(draft_pace, "--draft-pace") if pace else None,
            time_scale=time_scale,
        )
        outputs, console = Outputs(json_file, markdown_file, keep_log), console_of_this_run()
        candidates = read_prompts(options.prompts, None)
        run = run_compare(options, candidates, outputs, console, name="bench", program="wanspec", report=bench_report)
    if run.faults() or run.wrong or (check and not figures(run).held):
        raise typer.Exit(1)


def _model(given: str) -> str:
    """A folder's whole path, so that a journal knows it again; anything else is a name."""
    return str(Path(given).resolve()) if Path(given).is_dir() else given
