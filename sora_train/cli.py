"""`sora COMMAND RECIPE [--section.key value …]`: the command line.

Each command imports what it needs when it runs, so `sora --help` is quick and `sora sample` needs no Ray. A user's
mistake ends as one message without a traceback. Exit codes: 2 for recipes and flags, 1 for other failures (the message
ends with the error's code), 75 for a run that was asked to stop and can be resumed (EX_TEMPFAIL of sysexits.h), 130
after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from sora_train import __version__
from sora_train.commands import COMMANDS, usage
from sora_train.errors import RecipeError, Stopped, UserError
from sora_train.flags import help_text, parse_flags
from sora_train.log import progress, set_verbosity
from sora_train.settings import build, keys
from sora_train.terminal import print_result, protect_streams

if TYPE_CHECKING:
    from sora_train.recipe import Recipe

EXIT_FAILED, EXIT_RECIPE, EXIT_RESUMABLE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 75, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        protect_streams()
        os.environ["PYTHONSAFEPATH"] = "1"  # no Python started from here looks for modules in the working folder
    verbose, quiet = {"-v", "--verbose"}, {"-q", "--quiet"}
    set_verbosity(bool(verbose & set(words)), bool(quiet & set(words)))
    words = [word for word in words if word not in verbose | quiet]
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
        said = cause if isinstance(cause, UserError) else error
        if isinstance(error, RecipeError):
            print(f"sora {verb}: {said}", file=sys.stderr)
            return EXIT_RECIPE
        print(f"sora {verb}: {said} (error code: {said.code})", file=sys.stderr)
        return EXIT_FAILED
    except Stopped as stopped:
        print(f"sora {verb}: {stopped}", file=sys.stderr)
        return EXIT_RESUMABLE
    except KeyboardInterrupt:
        print(f"\nsora {verb}: stopped. The same command continues from what is done", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:  # which Ray's handler raises
            raise
        print(f"sora {verb}: stopped by SIGTERM. The same command continues from what is done", file=sys.stderr)
        return EXIT_TERMINATED
    return 0


def run(verb: str, words: Sequence[str]) -> None:
    """Runs one command with its words."""
    match verb:
        case "download":
            recipe, options = recipe_of(verb, words)
            if not options.to:
                raise RecipeError(f"--to is missing: sora download {COMMANDS[verb].example}")
            from sora_train.codec.download import download

            download(recipe.codec, options.to, {"model.init_from": recipe.model.init_from})
        case "prep":
            recipe, options = recipe_of(verb, words)
            if options.plan and options.compact:
                raise RecipeError(
                    "--plan prints what encoding would cost, and --compact encodes nothing: use one of them"
                )
            if options.plan:
                from data_prep.estimate.table import show_plan

                show_plan(recipe)
            elif options.compact:
                from data_prep.compact import compact_shards

                compact_shards(recipe.data.output, recipe.prep.shard_mb * 10**6)
            else:
                from data_prep.pipeline import prep

                prep(recipe)
        case "inspect":
            (shards,), options = folders_of(verb, words)
            from data_prep.inspect.table import format_table, inspect

            if options.html:
                from data_prep.inspect.page import check_page

                check_page(options.html)
            if options.check:
                from data_prep.inspect.check import check_shards

                check_shards(shards)
            counts = inspect(shards)
            print_result(json.dumps(counts) if options.json else format_table(counts))
            if options.html:
                from data_prep.inspect.page import write_page

                progress(str(write_page(shards, options.html, options.clips, options.root, options.models)))
        case "preflight":
            recipe, options = recipe_of(verb, words)
            gpu = {
                name: value
                for name in ("gpu", "memory", "mfu", "mtbf")
                if (value := getattr(options, name)) is not None
            }
            if options.plan:
                from sora_train.plan.table import PlanOptions, show_plan

                show_plan(recipe, build(PlanOptions, {}, gpu, "sora preflight"))
            elif gpu:
                raise RecipeError(f"--{next(iter(gpu))} goes with --plan: without it the cluster's own GPUs count")
            else:
                from sora_train.launch.preflight.table import preflight

                preflight(recipe)
        case "train":
            recipe, options = recipe_of(verb, words)
            if options.overwrite and not options.fresh:
                raise RecipeError("--overwrite goes with --fresh: without it a run resumes from its newest checkpoint")
            if options.fresh and options.new_data:
                raise RecipeError("--new-data resumes a run and --fresh starts at step 0: use one of them")
            from sora_train.launch.trainer import launch_training

            launch_training(recipe, options.fresh, options.overwrite, not options.no_preflight, options.new_data)
        case "sample":
            (run_folder,), options = folders_of(verb, words)
            if not options.prompt and not options.prompts:
                raise RecipeError('--prompt is missing, for instance --prompt "a blue square moving up"')
            from data_prep.given import read_given
            from sora_train.sample import sample_prompts

            sample_prompts(run_folder, options, read_given)
        case "export":
            (run_folder, out), options = folders_of(verb, words, 2)
            from sora_train.export import export

            export(run_folder, out, **vars(options))
        case "eval":
            (run_folder,), options = folders_of(verb, words)
            from sora_train.evaluate import evaluate
            from sora_train.quickstart.measure import measure_prompt_accuracy

            evaluate(run_folder, options, measure_prompt_accuracy)
        case "demo":
            flags, options = demo_flags(words)
            if options.image:
                from sora_train.quickstart.image import demo_image

                demo_image(flags)
            elif options.lora:
                from sora_train.quickstart.lora import demo_lora

                demo_lora(flags)
            else:
                from sora_train.quickstart.run import demo

                demo(flags)
        case "report":
            runs, options = folders_of(verb, words, 0)
            from sora_train.report import write_report

            print_result(str(write_report(*runs, out=options.out)))
        case "bench":
            from sora_train.bench import command

            if words[:1] in (["-h"], ["--help"]):
                print_result(command.usage())
                raise SystemExit(0)
            if status := command.run(words):
                raise SystemExit(status)
        case _:
            raise RecipeError(f"there is no such command; the commands are {', '.join(COMMANDS)}")


def recipe_of(verb: str, words: Sequence[str]) -> tuple[Recipe, Any]:
    """The recipe that a command's words name, with their flags laid over it, and the command's own options.

    Shows the help and exits if the words ask for it.
    """
    from sora_train.recipe import Recipe, load_recipe

    options = COMMANDS[verb].options
    flags, files, wants_help = split(words, Recipe, options)
    own = {name: flags.pop(name) for name, _ in keys(options) if name in flags}
    chosen = build(options, {}, own, f"sora {verb}")
    if wants_help:
        show_help(verb, chosen, load_recipe(files[0], flags) if files else Recipe())
    check_words(verb, files, 1)
    return load_recipe(files[0], flags), chosen


def folders_of(verb: str, words: Sequence[str], count: int = 1) -> tuple[list[str], Any]:
    """The folders that a command's words name, `count` of them (0: one or more), and its options; or its help."""
    options = COMMANDS[verb].options
    flags, folders, wants_help = split(words, options)
    if wants_help:
        show_help(verb, options())
    check_words(verb, folders, count)
    return folders, build(options, {}, flags, f"sora {verb}")


def demo_flags(words: Sequence[str]) -> tuple[dict[str, object], Any]:
    """The flags of `sora demo` for the recipe, which it has itself, and its own options."""
    from sora_train.quickstart import image, lora
    from sora_train.quickstart.run import find_recipe
    from sora_train.recipe import Recipe, load_recipe

    options = COMMANDS["demo"].options
    flags, rest, wants_help = split(words, Recipe, options)
    own = {name: flags.pop(name) for name, _ in keys(options) if name in flags}
    chosen = build(options, {}, own, "sora demo")
    if wants_help:
        name = image.RECIPE if chosen.image else lora.RECIPE if chosen.lora else "jobs/quickstart.yaml"
        show_help("demo", chosen, load_recipe(find_recipe(name), flags))
    if chosen.image and chosen.lora:
        raise RecipeError("--image and --lora are two demos; run one after the other")
    if rest:
        raise RecipeError(f"the demo has its own recipe and takes only flags, but got {' '.join(rest)}")
    return flags, chosen


def split(words: Sequence[str], *sections: type) -> tuple[dict[str, object], list[str], bool]:
    """A command's flags, its other words, and whether -h or --help is among them."""
    rest = [word for word in words if word not in ("-h", "--help")]
    return *parse_flags(rest, *sections), len(rest) < len(words)


def check_words(verb: str, words: Sequence[str], count: int) -> None:
    """Raises RecipeError unless a command got `count` words besides its flags (0: one or more)."""
    command = COMMANDS[verb]
    takes = command.takes.removesuffix(" …")
    if not words:
        raise RecipeError(f"{takes} is missing: sora {verb} {command.example}")
    if count and len(words) != count:
        raise RecipeError(
            f"takes {'one ' if count == 1 else ''}{takes} and flags, but got {' '.join(words)}: "
            f"sora {verb} {command.example}"
        )


def show_help(verb: str, *sections: object) -> NoReturn:
    """Prints every flag of the sections with its sentence and its value there, and exits."""
    command = COMMANDS[verb]
    example = f"For instance: sora {verb} {command.example}".rstrip()
    usage = f"sora {verb} {command.takes}".rstrip() + " [flags]"
    print_result(help_text(usage, (command.does, command.more, example), sections, command.reads))
    raise SystemExit(0)


def command() -> NoReturn:
    """`main` as a process. One that a signal ended waits for none of its threads.

    Ray's own SIGTERM handler, in force while Ray starts, raises wherever Python is: also where `logging` releases its
    lock. A thread that logs then waits for ever, and the process would wait for that thread.
    """
    code = main()
    if code in (EXIT_RESUMABLE, EXIT_INTERRUPTED, EXIT_TERMINATED):
        atexit._run_exitfuncs()  # Ray ends the processes that it started
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
