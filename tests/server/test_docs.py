"""The documentation is what the code says and does. What it prints of commands is in test_commands.py, of messages in
test_messages.py.
"""

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from documents import PAGES, ROOT, anchors, blocks, spans
from pydantic import BaseModel

import engine
from engine.families import known
from engine.params import Params
from engine.points import POINTS
from schemas.arguments import DifferenceVector, HandleVector, RandomVector, Steer, Target, TokenVector, ValuesVector
from schemas.interventions import Intervention
from server.__main__ import app
from server.prompts import PROMPTS
from server.settings import PREFIX, Settings
from server.tools import TOOLS

DOCS = ROOT / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))
NUMBERS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty
""".split()  # noqa: SIM905
NUMBERS += [f"{tens}-{ones}" for tens in ("twenty", "thirty") for ones in NUMBERS[1:10]]


def ran(*command: str | Path) -> str:
    made = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout


# --- what is generated ------------------------------------------------------------------------------------------------


def test_the_generated_documentation_is_fresh() -> None:
    ran(DOCS / "generate.py", "--check")


def test_the_tool_reference_spells_out_every_type_that_agents_send() -> None:
    page = (DOCS / "tools.md").read_text("utf-8")
    vectors = (HandleVector, TokenVector, ValuesVector, RandomVector, DifferenceVector)
    for model in (Target, Steer, Intervention, *vectors):
        assert _missing(page, model) == [], model.__name__
    assert "list of object" not in page


def test_the_tool_reference_spells_out_every_type_of_every_result() -> None:
    page = (DOCS / "tools.md").read_text("utf-8")
    results = [inspect.signature(f, eval_str=True).return_annotation for f in TOOLS]
    inside = {name: part for model in results for name, part in model.model_json_schema().get("$defs", {}).items()}
    assert len(inside) > 15
    for name, part in inside.items():
        assert _missing(page, name, part["properties"]) == [], name


def _missing(page: str, model: type[BaseModel] | str, fields: Any = None) -> list[str]:
    """The fields of a type that its section lacks; its whole name where it has none."""
    name = model if isinstance(model, str) else model.__name__
    section = re.search(rf"^### {name}\n(.*?)(?=^### |\Z)", page, re.DOTALL | re.MULTILINE)
    wanted = fields if isinstance(model, str) else model.model_fields
    return [name] if section is None else [field for field in wanted if f"\n| `{field}` |" not in section[1]]


def test_the_page_on_python_has_every_public_name_and_every_type_of_what_a_model_holds() -> None:
    page = (DOCS / "python.md").read_text("utf-8")
    assert [
        name for name in engine.__all__ if name != "POINTS" and not re.search(rf"^\| `{name}[`(]", page, re.M)
    ] == []
    kinds = {type(value) for value in _held(engine.load_model("synthetic"), set())}
    assert {"Config", "Params", "Tokenizer", "Rope", "LayerParams"} <= {kind.__name__ for kind in kinds}
    assert [kind.__name__ for kind in kinds if f"### {kind.__name__}\n" not in page] == []


def _held(value: Any, seen: set[int]) -> Iterator[Any]:
    """The engine's objects that public attributes lead to, itself included; layers of weights by their method.

    A tokenizer's `backend` is how it does it, and nobody's business.
    """
    if id(value) in seen or not type(value).__module__.startswith("engine"):
        return
    seen.add(id(value))
    yield value
    names = [name for name in dir(value) if not name.startswith("_") and name != "backend"]
    inner = [getattr(value, name) for name in names if not callable(getattr(value, name))]
    inner += [value.layer(0)] if isinstance(value, Params) else []
    for part in inner:
        for item in part if isinstance(part, tuple | list) else [part]:
            yield from _held(item, seen)


# --- what is written by hand ------------------------------------------------------------------------------------------


def test_the_concepts_page_names_every_point() -> None:
    page = (DOCS / "concepts.md").read_text()
    assert [name for name in POINTS if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", [*PAGES, DOCS / "tools.md", DOCS / "python.md"], ids=lambda path: path.stem)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text("utf-8")):
        to = page.parent / target if target else page
        assert to.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(to), f"{page.name} links to {target}#{anchor}"


FOREIGN = frozenset(
    {
        "HF_TOKEN",
        "MECHSCOPE_TOKEN",
        "OPENBLAS_THREAD_TIMEOUT",
        "XDG_CONFIG_HOME",
        "Application",
        "Caches",
        "Forwarded",
        "Retry",
        "Support",
    }
    | {"process_", "remote", "vscode"}
)
"""Names of other programs, systems and protocols, and one that a page warns of."""


def _words() -> set[str]:
    """Every word of what is tracked beside the pages, and of the names of its files."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sources = [name for name in tracked if not name.endswith(".md") and not name.startswith("bench/results")]
    text = " ".join((ROOT / name).read_text("utf-8", "ignore") for name in sources if (ROOT / name).is_file())
    settings = [f"{PREFIX}{name.upper()}" for name in (*Settings.model_fields, "config")]
    return {*re.findall(r"\w+", f"{text} {' '.join(tracked)}"), *settings}


def test_every_name_that_a_page_quotes_exists() -> None:
    words = _words()
    for page in PAGES:
        names = {word for span in spans(page) for word in re.findall(r"[A-Za-z_]\w{2,}", span)}
        strange = {name for name in names - words - FOREIGN if name.removesuffix("_total") not in words}
        strange = {name for name in strange if not re.fullmatch(r"[GMK]iB", name)}
        assert sorted(strange) == [], page.name


def test_every_argument_that_a_page_gives_a_value_exists() -> None:
    public = [getattr(engine, name) for name in engine.__all__]
    methods = [method for value in public if isinstance(value, type) for method in vars(value).values()]
    functions = [f for f in (*TOOLS, *public, *methods) if inspect.isfunction(f) or inspect.isclass(f)]
    functions = [f for f in functions if not (isinstance(f, type) and issubclass(f, Exception))]
    known = {name for function in functions for name in inspect.signature(function).parameters}
    known |= {*Settings.model_fields, *Intervention.model_fields, "chat"}
    for page in [*PAGES, DOCS / "tools.md"]:
        given = {name for span in spans(page) for name in re.findall(r"^(?:\w+\()?([a-z_]+)(?:=|: ?\")", span)}
        assert sorted(given - known) == [], page.name


def test_every_option_that_a_page_names_is_one() -> None:
    whole: Any = typer.main.get_command(app)
    commands = [whole, *whole.commands.values()]
    options = {option for command in commands for p in command.params for option in (*p.opts, *p.secondary_opts)}
    of_others = {"--build-arg", "--from", "--publish"}  # docker's, uvx's, and of tests/compatibility.py
    for page in PAGES:
        named = {option for span in spans(page) for option in re.findall(r"(?<!\S)--[a-z-]+", span)}
        assert sorted(named - options - of_others) == [], page.name


def test_every_target_of_make_that_a_page_names_is_one() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page in PAGES:
        texts = [*spans(page), *(line for block in blocks(page, "sh") for line in block.splitlines())]
        named = {target for text in texts for target in re.findall(r"^make ([a-z0-9-]+)", text)}
        assert sorted(named - targets) == [], page.name


def test_the_changelog_counts_right() -> None:
    page = (ROOT / "CHANGELOG.md").read_text("utf-8").replace("\n", " ")
    counts = {
        r"([\w-]+) tools over MCP": len(TOOLS),
        r"([\w-]+) prompts that teach": len(PROMPTS),
        r"([\w-]+) named points": len(POINTS),
        r"([\w-]+) dense families": len(known()) - 1,  # gemma3 is named beside them
    }
    for pattern, count in counts.items():
        (told,) = re.findall(pattern, page)
        assert told == NUMBERS[count], pattern


# --- what is run ------------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("page", [*GUIDES, ROOT / "README.md"], ids=lambda path: path.stem)
def test_a_page_prints_what_its_code_prints(page: Path) -> None:
    ran(DOCS / "run.py", "--check", page)


@pytest.mark.real
def test_the_readmes_python_runs_and_says_what_it_should() -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    lens, steered, moved = ran("-c", code).strip().split("\n", 2)
    assert "Paris" in lens
    assert steered.startswith(" London")
    assert "Rome" in moved
