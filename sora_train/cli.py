"""`sora VERB RECIPE [--section.key value …]`: what a person types.

A verb imports what it needs when it runs, so that `sora --help` answers at once and `sora sample` needs no Ray. The
person's own mistakes end as one message without a traceback: exit code 2 for recipes and flags, 1 for the rest. 75 says
that a run was asked to stop (SIGTERM) and can go on: what EX_TEMPFAIL of sysexits.h means to schedulers.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, TypeVar

from sora_train import __version__
from sora_train.commands import (
    EXAMPLES,
    MORE,
    READS,
    VERBS,
    DownloadOptions,
    EvalOptions,
    ExportOptions,
    InspectOptions,
    PreflightOptions,
    PrepOptions,
    ReportOptions,
    SampleOptions,
    TrainOptions,
    usage,
)
from sora_train.errors import RecipeError, Stopped, UserError
from sora_train.settings import build, keys, parse_flags
from sora_train.terminal import print_result, protect_streams

if TYPE_CHECKING:
    from sora_train.recipe import Recipe

S = TypeVar("S")

EXIT_FAILED, EXIT_RECIPE, EXIT_RESUMABLE, EXIT_INTERRUPTED = 1, 2, 75, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        protect_streams()
        os.environ["PYTHONSAFEPATH"] = "1"  # no Python started from here looks for modules in the working folder
    verb, words = (words[0], words[1:]) if words else ("--help", [])
    try:
        if verb in ("-h", "--help", "help"):
            print_result(usage())
        elif verb == "--version":
            print_result(f"sora_train {__version__}")
        else:
            run(verb, words)
    except UserError as error:
        # Ray hands a worker's error on as a subclass that prints the worker's traceback; its cause is the bare one.
        cause = getattr(error, "cause", None)
        print(f"sora {verb}: {cause if isinstance(cause, UserError) else error}", file=sys.stderr)
        return EXIT_RECIPE if isinstance(error, RecipeError) else EXIT_FAILED
    except Stopped as stopped:
        print(f"sora {verb}: {stopped}", file=sys.stderr)
        return EXIT_RESUMABLE
    except KeyboardInterrupt:
        print(f"\nsora {verb}: stopped. The same command continues from what is done", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def run(verb: str, words: Sequence[str]) -> None:
    """One verb: its words to its arguments, and the call."""
    match verb:
        case "download":
            recipe, where = recipe_of(verb, words, DownloadOptions)
            if not where.to:
                raise RecipeError(f"--to is missing: sora download {EXAMPLES[verb]}")
            from sora_train.codec.download import download

            download(recipe.codec, where.to, {"model.init_from": recipe.model.init_from})
        case "prep":
            recipe, how = recipe_of(verb, words, PrepOptions)
            if how.plan:
                from data_prep.estimate.command import show_plan

                show_plan(recipe)
            else:
                from data_prep.pipeline import prep

                prep(recipe)
        case "inspect":
            shards, options = target_of(verb, words, InspectOptions)
            from data_prep.inspect.table import check_shards, format_table, inspect

            if options.check:
                check_shards(shards)
            counts = inspect(shards)
            print_result(json.dumps(counts) if options.json else format_table(counts))
            if options.html:
                from data_prep.inspect.page import write_page

                print(write_page(shards, options.html, options.clips, options.root), file=sys.stderr)
        case "preflight":
            recipe, ask = recipe_of(verb, words, PreflightOptions)
            asked = {name: value for name in ("gpu", "memory", "mfu") if (value := getattr(ask, name)) is not None}
            if ask.plan:
                from sora_train.plan.table import PlanOptions, format_plan

                print_result(format_plan(recipe, build(PlanOptions, {}, asked, "sora preflight")))
            elif asked:
                raise RecipeError(f"--{next(iter(asked))} goes with --plan: without it the cluster's own GPUs count")
            else:
                from sora_train.launch.preflight.table import preflight

                preflight(recipe)
        case "train":
            recipe, how = recipe_of(verb, words, TrainOptions)
            if how.overwrite and not how.fresh:
                raise RecipeError("--overwrite goes with --fresh: without it a run goes on from its newest checkpoint")
            if how.fresh and how.new_data:
                raise RecipeError("--new-data goes on with a run, and --fresh begins at step 0: leave one of them out")
            from sora_train.launch.trainer import launch_training

            launch_training(recipe, how.fresh, how.overwrite, not how.no_preflight, how.new_data)
        case "sample":
            run_folder, how = target_of(verb, words, SampleOptions)
            if not how.prompt and not how.prompts:
                raise RecipeError('--prompt is missing, for instance --prompt "a blue square moving up"')
            from sora_train.sample import sample_prompts

            sample_prompts(run_folder, how)
        case "export":
            folders, what = targets_of(verb, words, ExportOptions)
            if len(folders) != 2:
                raise RecipeError(f"takes {VERBS[verb][0]}, but got {' '.join(folders)}: sora {verb} {EXAMPLES[verb]}")
            from sora_train.export import export

            export(*folders, weights_only=what.weights_only, weights=what.weights)
        case "eval":
            run_folder, ask = target_of(verb, words, EvalOptions)
            from sora_train.evaluate import evaluate
            from sora_train.quickstart.measure import obey

            evaluate(run_folder, ask, obey)
        case "demo":
            overrides = demo_overrides(words)
            from sora_train.quickstart.run import demo

            demo(overrides=overrides)
        case "report":
            runs, options = targets_of(verb, words, ReportOptions)
            from sora_train.report import write_report

            print(write_report(*runs, out=options.out))
        case "bench":
            from sora_train.bench import command

            if words[:1] in (["-h"], ["--help"]):
                print_result(command.usage())
                raise SystemExit(0)
            if status := command.run(words):
                raise SystemExit(status)
        case _:
            raise RecipeError(f"there is no such verb; the verbs are {', '.join(VERBS)}")


def recipe_of(verb: str, words: Sequence[str], options: type[S]) -> tuple[Recipe, S]:
    """The recipe that a verb's words name, with their flags laid over it, and the verb's own options; or its help,
    where they ask for that.
    """
    from sora_train.recipe import Recipe, load_recipe

    words, wants_help = without_help(words)
    flags, files = parse_flags(words, Recipe, options)
    own = {name for name, _ in keys(options)}
    overrides = {key: value for key, value in flags.items() if key not in own}
    chosen = build(options, {}, {key: value for key, value in flags.items() if key in own}, f"sora {verb}")
    if wants_help:
        show_help(verb, load_recipe(files[0], overrides) if files else Recipe(), chosen)
    return load_recipe(the_one(verb, files), overrides), chosen


def target_of(verb: str, words: Sequence[str], options: type[S]) -> tuple[str, S]:
    """The folder that a verb's words name, and its options; or its help."""
    folders, chosen = targets_of(verb, words, options)
    return the_one(verb, folders), chosen


def targets_of(verb: str, words: Sequence[str], options: type[S]) -> tuple[list[str], S]:
    """The folders that a verb's words name, one at least, and its options; or its help."""
    words, wants_help = without_help(words)
    overrides, folders = parse_flags(words, options)
    if wants_help:
        show_help(verb, options())
    if not folders:
        the_one(verb, folders)
    return folders, build(options, {}, overrides, f"sora {verb}")


def demo_overrides(words: Sequence[str]) -> dict[str, object]:
    """The demo has a recipe of its own, which takes flags like any other."""
    from sora_train.recipe import Recipe, load_recipe

    words, wants_help = without_help(words)
    overrides, rest = parse_flags(words, Recipe)
    if wants_help:
        from sora_train.quickstart.run import find_recipe

        show_help("demo", load_recipe(find_recipe("jobs/quickstart.yaml"), overrides))
    if rest:
        raise RecipeError(f"the demo has its own recipe and takes only flags, but got {' '.join(rest)}")
    return overrides


def without_help(words: Sequence[str]) -> tuple[list[str], bool]:
    """The words without -h and --help, and whether these were among them."""
    rest = [word for word in words if word not in ("-h", "--help")]
    return rest, len(rest) < len(words)


def the_one(verb: str, words: Sequence[str]) -> str:
    """The one word a verb takes beside its flags."""
    what = VERBS[verb][0].removesuffix(" …")
    if not words:
        raise RecipeError(f"{what} is missing: sora {verb} {EXAMPLES[verb]}")
    if len(words) > 1:
        raise RecipeError(f"takes one {what} and flags such as --name again, but got {' '.join(words)}")
    return words[0]


def show_help(verb: str, settings: object, options: object = None) -> NoReturn:
    """Prints every flag that the verb reads, its own `options` first, with its sentence and its value, and exits."""
    import tyro

    from sora_train.help import shown

    if options is not None:
        settings = shown(settings, options, READS.get(verb, ()))

    what, sentence = VERBS[verb]
    paragraphs = (sentence, MORE.get(verb, ""), f"For instance: sora {verb} {EXAMPLES[verb]}".rstrip())
    tyro.cli(
        type(settings),
        prog=f"sora {verb} {what}".rstrip(),
        description="\n\n".join(filter(None, paragraphs)),
        default=settings,
        args=["--help"],
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
    raise SystemExit(0)


def command() -> NoReturn:
    """`main` as a process. One that a signal ended waits for none of its threads.

    Ray's own SIGTERM handler, in force while Ray starts, raises wherever Python is: also where `logging` releases its
    lock. A thread that logs then waits for ever, and the process would wait for that thread.
    """
    code = main()
    if code in (EXIT_RESUMABLE, EXIT_INTERRUPTED):
        atexit._run_exitfuncs()  # Ray ends the processes that it started
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
