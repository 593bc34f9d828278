"""`lorry fetch`: download a model from a hub."""

import sys

import click

from entrypoints.common import one_line_errors, print_lines


@click.command()
@click.argument("model")
@click.option(
    "--from",
    "hub",
    type=click.Choice(["huggingface", "modelscope"]),
    default="huggingface",
    help="Hub to download from. HF_ENDPOINT names a mirror of Hugging Face's. Default: huggingface.",
)
@click.option("--revision", metavar="NAME", help="Branch, tag or commit. Default: the newest.")
@click.option("--code", is_flag=True, help="Also its Python files, which run only with model.trust_remote_code.")
@one_line_errors
def fetch(model: str, hub: str, revision: str | None, code: bool) -> None:
    """Download MODEL, by its name on a hub such as Qwen/Qwen2.5-7B-Instruct, into the models folder.

    Only what Lorry reads: safetensors weights, config, tokenizer, chat template, model card. Every file is checked.
    Files that are here and intact stay; after a cut connection or a kill, the same command goes on. HF_TOKEN or
    MODELSCOPE_API_TOKEN opens gated and private models. Exits with 4 if the disk is too small, and with 75 if the hub
    cannot be reached. No other command but `lorry tune` reaches a hub.
    """
    from stages.host.fetching import fetch as fetch_model

    sys.exit(print_lines(fetch_model(model, hub, revision, code)))
