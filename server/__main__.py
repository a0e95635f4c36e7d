"""The command line: serve, demo, fetch, doctor."""

import logging
import sys
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A microscope for language models, for LLM agents.",
)

MODEL = "smollm2-135m-instruct"


@app.command()
def serve(
    http: Annotated[bool, typer.Option("--http", help="Streamable HTTP instead of stdio.")] = False,
    host: Annotated[str, typer.Option(help="Address for --http: localhost only, until there is authentication.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port for --http.")] = 8765,
) -> None:
    """Serve MCP: over stdio, or with --http on http://HOST:PORT/mcp."""
    from server.app import build_server

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    server = build_server()
    if not http:
        server.run("stdio")
        return
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise typer.BadParameter(f"{host} is not this machine; without authentication only localhost is served")
    typer.echo(f"mechscope serves MCP at http://{host}:{port}/mcp", err=True)
    server.run("streamable-http", host=host, port=port)


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
def doctor() -> None:
    """Check this installation: Python, BLAS, model files, folders, name clashes, and a self-test."""
    from server.doctor import run

    raise typer.Exit(run())


def main() -> None:
    """Entry point of the `mechscope` script."""
    app()


if __name__ == "__main__":
    main()
