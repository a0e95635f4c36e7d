"""Uses a desktop bundle as its host does: `python tests/bundle.py MCPB BUNDLE`, with uv on the PATH.

The official command line unpacks it; the manifest's command is run with the defaults of its settings, from another
directory, and a client speaks to it. The tools it lists must be the manifest's.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio
from clients import ask, connected, refused
from mcp.client.stdio import StdioServerParameters


def command(manifest: dict[str, Any], folder: Path) -> StdioServerParameters:
    """The server as a host starts it when its user changes no setting."""
    config = manifest["server"]["mcp_config"]
    settings = {name: option["default"] for name, option in manifest["user_config"].items()}

    def filled(text: str) -> str:
        found = re.sub(r"\$\{user_config\.(\w+)\}", lambda match: _written(settings[match[1]]), text)
        found = found.replace("${__dirname}", str(folder)).replace("${HOME}", str(Path.home()))
        assert "${" not in found, f"{text} is not filled in"
        return found

    variables = {name: filled(value) for name, value in config["env"].items()}
    return StdioServerParameters(
        command=config["command"], args=[filled(a) for a in config["args"]], env=os.environ | variables, cwd="/"
    )


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


async def use(manifest: dict[str, Any], folder: Path) -> None:
    started = time.monotonic()
    async with connected(command(manifest, folder)) as client:
        print(f"started in {time.monotonic() - started:.1f} s, installation included")
        assert client.server_info.version == manifest["version"]
        listed = [tool.name for tool in (await client.list_tools()).tools]
        assert listed == [tool["name"] for tool in manifest["tools"]]
        await ask(client, "load_model", model="synthetic")
        lens = await ask(client, "logit_lens", prompt="hello", layers=[-1])
        print(f"{len(listed)} tools; logit_lens read {len(lens['rows'])} row")
        print(await refused(client, "load_model", model="/etc"))


def main() -> None:
    mcpb, bundle = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="unpacked-") as folder:
        subprocess.run([mcpb, "unpack", bundle, folder], check=True)
        manifest = json.loads((Path(folder) / "manifest.json").read_text("utf-8"))
        anyio.run(use, manifest, Path(folder))
    print("the bundle installs and serves")


if __name__ == "__main__":
    main()
