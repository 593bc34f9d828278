"""`lorry chat`: base and tuned side by side in the terminal, and `lorry-chat`, which does it in the container."""

import sys
from typing import Any

import click

from entrypoints.common import one_line_errors, print_lines
from entrypoints.options import as_arguments, card_options, option_group

chat_options = option_group(
    click.option("--adapter", metavar="NAME", help="Adapter to ask. Default: the first one."),
    click.option("--base-only", "only", flag_value="base", help="Ask the base only."),
    click.option("--tuned-only", "only", flag_value="tuned", help="Ask the adapter only."),
    click.option("--system", metavar="TEXT", help="System prompt. Default: the commonest of the training samples."),
    click.option("--max-tokens", type=click.IntRange(min=1), default=1024, help="Of an answer. Default: 1024."),
    click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="0: greedy. Default: 0."),
    click.option("--engine", metavar="NAME", help="vllm or transformers. Default: transformers, which starts fast."),
)
"""What `lorry chat` and `lorry-chat` share."""


@click.command()
@click.argument("run_name", metavar="RUN")
@chat_options
@card_options
@one_line_errors
def chat(run_name: str, gpus: str | None, target: str | None, only: str | None, **options: Any) -> None:
    """Chat with RUN: base and adapter answer side by side, each in its own conversation.

    In the chat: /reset, /adapter NAME, /quit. Ctrl-C stops an answer, Ctrl-D ends. Reads prompts from a pipe too, one a
    line.
    """
    from stages.host.serving import chat_here, chat_on_host

    arguments = [*as_arguments(options), *([f"--{only}-only"] if only else [])]
    sys.exit(
        print_lines(chat_on_host(run_name, arguments, lambda: chat_here(run_name, only=only, **options), gpus, target))
    )


@click.command(name="lorry-chat")
@click.option("--run", "run_name", metavar="NAME", envvar="LORRY_RUN", help="Run to chat with. [env: LORRY_RUN]")
@chat_options
@one_line_errors
def main(**options: Any) -> None:
    """Chat with a run in this process. `lorry chat --help` says how."""
    from stages.host.serving import chat_here

    sys.exit(chat_here(**options))


if __name__ == "__main__":
    main()
