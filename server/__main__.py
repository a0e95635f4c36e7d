"""The command line: serve, demo, fetch, doctor."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from server.settings import CONFIG, BadSettings, Settings, flags, read_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A microscope for language models, for LLM agents.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mechscope {version('mechscope')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = (
        False
    ),
) -> None:
    """What comes before a command."""


MODEL = "smollm2-135m-instruct"


def serve(settings: Settings) -> None:
    """Serve MCP: over stdio, or with --http on http://HOST:PORT/mcp and /sse."""
    from server.serve import serve as run

    run(settings)


app.command("serve")(flags(serve))


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A model name, a directory, a .gguf file, or synthetic.")] = MODEL,
) -> None:
    """Drive the real server through one investigation, and print what an agent would see."""
    from server.demo import run

    raise typer.Exit(run(model))


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="A catalogue name.")] = MODEL) -> None:
    """Download a catalogue model into the cache, and check it."""
    from server.console import fetch_with_bar

    raise typer.Exit(fetch_with_bar(name))


@app.command()
def doctor(
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Read converted weights and stored tensors whole.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Put the workspace in order; no server may run on it.")
    ] = False,
    workspace: Annotated[
        Path | None, typer.Option(help="The folder to look at; that of the settings if left out.")
    ] = None,
    config: Annotated[Path | None, typer.Option(envvar=CONFIG, help="The TOML file of settings.")] = None,
) -> None:
    """Check this installation: Python, BLAS, model files, folders, name clashes, and a self-test."""
    from server import doctor

    try:
        place = read_settings({"workspace": workspace}, config).workspace
    except BadSettings as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(doctor.repair(place) if repair else doctor.run(place, thorough))


def main() -> None:
    """Entry point of the `mechscope` script."""
    app()


if __name__ == "__main__":
    main()
