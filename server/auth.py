"""Who is calling: bearer tokens from a file, and `principal()`.

A token file has a line per token: a name and a token, in any number. One name may have several tokens, so that they
can be changed without a gap; lines that start with # are comments.
"""

import hashlib
import hmac
import re
from pathlib import Path

from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import AccessToken

from server.call import LOCAL
from server.logs import log
from server.settings import BadSettings

LEAST = 32
"""Characters of a token. `openssl rand -hex 32` makes 64."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")


class Tokens:
    """The tokens of a file, as digests: a token verifier for the MCP library."""

    def __init__(self, names: dict[bytes, str]) -> None:
        self._names = names

    @classmethod
    def read(cls, path: Path) -> "Tokens":
        """Raises `BadSettings` for a file that cannot be used; its message never shows a token."""
        try:
            lines = path.read_text("utf-8").splitlines()
            open_to_others = path.stat().st_mode & 0o077
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise BadSettings(f"token_file: {path} cannot be read: {reason}") from None
        if open_to_others:
            log.warning("other users of this machine can read the token file; chmod 600 it", extra={"file": path.name})
        rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()[:1] not in ("", "#")]
        names: dict[bytes, str] = {}
        for number, words in rows:
            name, digest = _row(f"token_file: line {number} of {path}", words)
            if digest in names:
                raise BadSettings(f"token_file: line {number} of {path} repeats a token; every line needs its own")
            names[digest] = name
        if not names:
            raise BadSettings(f"token_file: {path} holds no token; write lines of a name and a token")
        return cls(names)

    async def verify_token(self, token: str) -> AccessToken | None:
        """The principal of a token. Every known token is compared, each in constant time."""
        shown = _digest(token)
        found = [name for digest, name in self._names.items() if hmac.compare_digest(digest, shown)]
        return AccessToken(token=token, client_id=found[0], scopes=[]) if found else None


def _row(place: str, words: list[str]) -> tuple[str, bytes]:
    if len(words) != 2:
        raise BadSettings(f"{place} has {len(words)} words; write a name and a token, nothing else")
    name, token = words
    if not _NAME.fullmatch(name) or name == LOCAL:
        raise BadSettings(f"{place}: a name is 1 to 64 letters, digits and . _ @ -, and not {LOCAL!r}")
    if len(token) < LEAST or not _TOKEN.fullmatch(token):
        raise BadSettings(
            f"{place}: a token is at least {LEAST} letters, digits and . _ ~ + / = -, as of `openssl rand -hex 32`"
        )
    return name, _digest(token)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def principal() -> str:
    """Who makes the call that is being answered: the name of its token, or `local` where there are no tokens."""
    token = get_access_token()
    return LOCAL if token is None else token.client_id
