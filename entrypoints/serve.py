"""`lorry serve`: a run behind OpenAI's interface, and `lorry-serve`, which does it in the container."""

import os
import sys
from typing import Any

import click

from entrypoints.common import one_line_errors, print_lines
from entrypoints.options import as_arguments, card_options, option_group

HOST, PORT = "127.0.0.1", 8000


server_options = option_group(
    click.option("--host", default=HOST, metavar="ADDRESS", help=f"Address to listen at. Default: {HOST}."),
    click.option("--port", type=click.IntRange(0, 65535), default=PORT, help=f"Port. Default: {PORT}."),
    click.option(
        "--api-key",
        metavar="TOKEN",
        envvar="LORRY_API_KEY",
        help="Token that clients must send. Default: none. [env: LORRY_API_KEY]",
    ),
    click.option(
        "--engine",
        metavar="NAME",
        help="vllm or transformers. Default: the recipe's, or transformers if that cannot serve RUN.",
    ),
    click.option("--only", metavar="NAME", help="Serve one model only: base or an adapter. Default: all."),
    click.option(
        "--max-length",
        type=click.IntRange(min=16),
        metavar="N",
        help="Tokens of prompt and answer together. Default: the recipe's infer.max_length.",
    ),
    click.argument("more", nargs=-1, type=click.UNPROCESSED),
)
"""What `lorry serve` and `lorry-serve` share."""


@click.command()
@click.argument("run_name", metavar="RUN")
@server_options
@card_options
@one_line_errors
def serve(
    run_name: str, more: tuple[str, ...], api_key: str | None, gpus: str | None, target: str | None, **options: Any
) -> None:
    """Serve base and all adapters of RUN by their names, through OpenAI's interface.

    By vLLM's server, in a container if a Docker engine answers. MORE are options of `vllm serve`, after `--`. Ends with
    0 after Ctrl-C or SIGTERM.
    """
    from stages.host.serving import TOKEN, serve_on_host

    if api_key:
        os.environ[TOKEN] = api_key
    host, port = options.pop("host"), options.pop("port")
    arguments = [*as_arguments(options), *(("--", *more) if more else ())]
    sys.exit(print_lines(serve_on_host(run_name, host, port, arguments, gpus, target)))


@click.command(name="lorry-serve")
@click.option("--run", "run_name", metavar="NAME", envvar="LORRY_RUN", help="Run to serve. [env: LORRY_RUN]")
@server_options
@one_line_errors
def main(api_key: str | None, **options: Any) -> None:
    """Serve base and all adapters of a run by this process. MORE are options of `vllm serve`, after `--`."""
    from stages.host.serving import TOKEN, serve_here

    if api_key:
        os.environ[TOKEN] = api_key
    sys.exit(serve_here(**options))


if __name__ == "__main__":
    main()
