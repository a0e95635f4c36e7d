"""The official conformance suite: every required check of both revisions, on the production stack."""

import json
import sys
from pathlib import Path

import pytest
from e2e.conformance import BASELINE, REVISIONS, Verdict, judged
from e2e.fixtures.pages import REMOVED
from e2e.fixtures.serve import with_fixtures
from mcp.server import MCPServer
from serving import MECHSCOPE, serving

from server.app import build_server

pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("revision", REVISIONS)]

TESTS = Path(__file__).parents[1]
BUILDS = {
    "fixtures": ((sys.executable, "-m", "e2e.fixtures.serve"), {"PYTHONPATH": str(TESTS)}),
    "production": (MECHSCOPE, {}),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Verdict]]:
    """What the suite says of the build with its fixtures, and of production."""
    said: dict[str, dict[str, Verdict]] = {}
    for build, (command, env) in BUILDS.items():
        with serving("--rate-limit", "10000/second", command=command, env=env) as served:
            said[build] = {r: judged(served.base, r, tmp_path_factory.mktemp(build)) for r in REVISIONS}
    return said


def baseline(revision: str) -> dict[str, str]:
    return json.loads(BASELINE.read_text("utf-8"))[revision]


def test_every_required_check_passes_on_the_build_with_fixtures(verdicts, revision: str) -> None:
    verdict = verdicts["fixtures"][revision]
    assert verdict.failed == {}
    assert verdict.status == 0
    assert len(verdict.passed) > 60


def test_production_fails_the_checks_of_the_baseline_and_no_other(verdicts, revision: str) -> None:
    failed = verdicts["production"][revision].failed
    news = {name: said for name, said in failed.items() if name not in baseline(revision)}
    assert news == {}, "new failures"
    assert baseline(revision).keys() - failed.keys() == set(), "these pass by now: take them out of the baseline"


def test_what_production_fails_passes_with_fixtures_so_nothing_else_is_missing(verdicts, revision: str) -> None:
    scenarios = {name.partition(":")[0] for name in baseline(revision)}
    passed = {name.partition(":")[0] for name in verdicts["fixtures"][revision].passed}
    assert scenarios <= passed


@pytest.mark.anyio
async def test_each_reason_in_the_baseline_is_a_fixture_that_production_lacks(revision: str) -> None:
    lacking = await offered(with_fixtures()) - await offered(build_server())
    unfounded = {name: reason for name, reason in baseline(revision).items() if reason.split()[-1] not in lacking}
    assert unfounded == {}


async def offered(server: MCPServer[None]) -> set[str]:
    """The names of all tools, prompts and resources of a server, and of the optional methods it answers to."""
    methods = {name for name in (*REMOVED, "completion/complete") if server._lowlevel_server.get_request_handler(name)}
    named = {item.name for item in (*await server.list_tools(), *await server.list_prompts())}
    uris = {str(resource.uri) for resource in await server.list_resources()}
    return methods | named | uris | {template.uri_template for template in await server.list_resource_templates()}
