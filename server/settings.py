"""How `mechscope serve` is set up: `Settings`, from flags, MECHSCOPE_... variables and a TOML file, in that order.

read_settings   flags and a configuration file -> Settings
flags           the command line's options, made from the fields of Settings
"""

import inspect
import ipaddress
import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import typer
from platformdirs import user_config_path, user_data_path
from pydantic import BeforeValidator, ByteSize, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

PREFIX = "MECHSCOPE_"
CONFIG = f"{PREFIX}CONFIG"


class BadSettings(Exception):
    """Settings that cannot be used; the message says which, and what is valid."""


def _parts(separator: str) -> BeforeValidator:
    """A list may be written as one text, as environment variables need it."""

    def split(value: object) -> object:
        return [part.strip() for part in value.split(separator) if part.strip()] if isinstance(value, str) else value

    return BeforeValidator(split)


Names = Annotated[tuple[str, ...], NoDecode, _parts(",")]
Folders = Annotated[tuple[Path, ...], NoDecode, _parts(os.pathsep)]


class Settings(BaseSettings):
    """Every setting: a flag, an environment variable with the prefix MECHSCOPE_, and a key of the TOML file."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    http: bool = Field(False, description="Serve Streamable HTTP at /mcp and SSE at /sse instead of stdio.")
    host: str = Field("127.0.0.1", min_length=1, description="Address for HTTP. Others than localhost need a token.")
    port: int = Field(8765, ge=0, le=65535, description="Port for HTTP; 0 takes a free one and logs it.")
    token_file: Path | None = Field(None, description="Who may use HTTP: lines of a name and its bearer token.")
    allowed_hosts: Names = Field((), description="Names beside localhost that clients may reach the server by.")
    allowed_origins: Names = Field((), description="Web pages whose scripts may call the server: https://name[:port].")
    models_dir: Folders = Field(
        (),
        description="Folders that models given by path must be in. Without any: stdio loads from everywhere, "
        "HTTP from nowhere.",
    )
    workspace: Path = Field(
        user_data_path("mechscope"), description="Folder of captures, kept caches and jobs. Servers may share it."
    )
    memory_budget: ByteSize = Field(
        ByteSize(2 << 30), description="Memory for what calls work with, captures and kept caches, together."
    )
    disk_budget: ByteSize = Field(ByteSize(20 << 30), description="What the workspace may hold, in all its servers.")
    model_budget: ByteSize | None = Field(
        None, description="Memory for models; the least recently used go. Without one: 80% of the machine's."
    )
    downloads: bool = Field(True, description="Fetch models of the catalogue and the hub that are not there yet.")
    converted: bool = Field(
        True, description="Keep weights as float32 in the cache directory, so that the next start maps them."
    )
    fast: bool = Field(True, description="Use compiled kernels where the fast extra is installed.")
    toolset: Literal["core", "analysis", "all"] = Field("all", description="Which tools are offered.")
    read_only: bool = Field(False, description="Leave the disk alone: no workspace, no downloads.")
    body_limit: ByteSize = Field(ByteSize(4 << 20), ge=1024, description="Longest HTTP request body, such as 4MiB.")
    rate_limit: str = Field("600/minute", description="HTTP requests of one principal, such as 10/second.")
    max_calls: int = Field(16, ge=1, le=1000, description="Tool calls and jobs that may run or wait at a time.")
    max_calls_each: int = Field(8, ge=1, le=1000, description="Tool calls and jobs of one principal at a time.")
    max_connections: int = Field(256, ge=8, description="Open HTTP connections, event streams included.")
    stop_within: float = Field(5.0, ge=0, le=3600, description="Seconds that running calls get to end when stopped.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="What goes to stderr. Only debug shows prompts."
    )

    _unfollowed: Path | None = PrivateAttr(None)

    @property
    def unfollowed(self) -> Path | None:
        """The file whose http = true is not followed, because stdin belongs to a client."""
        return self._unfollowed

    @field_validator("rate_limit")
    @classmethod
    def _a_rate(cls, value: str) -> str:
        from limits import parse

        parse(value)
        return value

    @field_validator("workspace", "token_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator("models_dir")
    @classmethod
    def _folders_exist(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        folders = tuple(path.expanduser().resolve() for path in value)
        missing = [str(path) for path in folders if not path.is_dir()]
        if missing:
            raise ValueError(f"there is no folder {', '.join(missing)}")
        return folders

    @model_validator(mode="after")
    def _no_strangers(self) -> Self:
        if self.http and not is_local(self.host) and self.token_file is None:
            raise ValueError(
                f"{self.host} is not localhost: beyond localhost clients must show a token. Give --token-file"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


OF_HTTP = {
    "host", "port", "token_file", "allowed_hosts", "allowed_origins", "body_limit", "rate_limit", "max_connections",
}  # fmt: skip


def is_local(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_settings(given: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Flags that were given, over the environment, over the file, over the defaults. Raises `BadSettings`.

    The file that is read without being named turns no client's server into one over HTTP.
    """
    _check_environment()
    path = _config_file(config)

    class Configured(Settings):
        model_config = SettingsConfigDict(toml_file=path)

    known = {name: value for name, value in given.items() if value is not None}
    usual = config is None and "http" not in known and f"{PREFIX}HTTP" not in os.environ
    try:
        overridden = usual and bool(TomlConfigSettingsSource(Configured)().get("http")) and _has_client()
        made = Configured(**known | ({"http": False} if overridden else {}))
        made._unfollowed = path if overridden else None
        return made
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'][:1])) or 'settings'}: {_reason(e)}" for e in error.errors()]
        raise BadSettings("; ".join(wrong)) from None
    except tomllib.TOMLDecodeError as error:
        raise BadSettings(f"{path} is not TOML: {error}") from None


def _has_client() -> bool:
    """Whether stdin is another program's: a client that started this process would wait for its answers in vain when a
    file that it knows nothing of says http.
    """
    try:
        kind = os.fstat(0).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)


def _reason(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return f"there is no such setting; there are {', '.join(Settings.model_fields)}"
    return str(error["msg"]).removeprefix("Value error, ")


def _check_environment() -> None:
    """A misspelt variable would otherwise be a setting that silently does not hold."""
    known = {CONFIG, *(f"{PREFIX}{name.upper()}" for name in Settings.model_fields)}
    strange = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    if strange:
        raise BadSettings(f"no such environment variable: {', '.join(strange)}; there are {', '.join(sorted(known))}")


def _config_file(config: Path | None) -> Path | None:
    if config is None:
        usual = user_config_path("mechscope") / "config.toml"
        return usual if usual.is_file() else None
    if not config.is_file():
        raise BadSettings(f"there is no configuration file {config}")
    return config


def flags(run: Callable[[Settings], None]) -> Callable[..., None]:
    """`run` as a command with an option for each field of `Settings`, and --config."""

    def command(config: Path | None, **given: Any) -> None:
        try:
            run(read_settings(given, config))
        except BadSettings as error:
            raise typer.BadParameter(str(error)) from None

    file = typer.Option("--config", envvar=CONFIG, help="A TOML file of settings; flags and variables come first.")
    kinds = {"config": Annotated[Path | None, file]} | {name: _option(name) for name in Settings.model_fields}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in kinds.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = kinds
    command.__doc__ = run.__doc__
    return command


def _option(name: str) -> Any:
    """A typer option without a default of its own, so that a flag that was not given is known as such."""
    field = Settings.model_fields[name]
    kind: Any
    flag = f"--{name.replace('_', '-')}"
    if field.annotation is bool:
        kind, flag, metavar = bool, f"{flag}/--no-{flag[2:]}", None
    else:
        kind, metavar = list[str] if get_origin(field.annotation) is tuple else str, name.rpartition("_")[2].upper()
    shown = _shown(field.default)
    return Annotated[kind | None, typer.Option(flag, metavar=metavar, help=_help(field), show_default=shown or False)]


def _help(field: FieldInfo) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    one_of = f" One of {', '.join(choices)}." if choices else ""
    return f"{field.description}{one_of}"


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return default.human_readable() if isinstance(default, ByteSize) else "" if default in (None, ()) else str(default)
