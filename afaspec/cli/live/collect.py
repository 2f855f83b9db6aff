"""`afaspec collect`: keep a share of the traffic of a server that runs elsewhere."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from afaspec.cli.flags import configured
from afaspec.cli.live.settings import Kept


class CollectConfig(Kept):
    """Which server, where its clients are to ask, and where rows go."""

    url: str = Field(description="the server that answers: any with OpenAI's API")
    out: Path = Field(Path("traffic"), description="folder of the rows")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8001, ge=0, le=65535, description="port to listen on")
    allow_others: bool = Field(False, description="listen where others can reach the server too")


@configured(CollectConfig, arguments=("url",))
def collect(config: CollectConfig) -> None:
    r"""Stand before the server at URL, pass everything on, and keep a share of what passes.

    Clients ask here in its place. Kept are requests with their whole answers, as rows that `afaspec
    capture` reads; one with the header `x-afaspec-collect: no` is never kept. `afaspec serve` needs
    no proxy: it has --collect. What is kept is your users' data: the folder is for its owner alone,
    and with a key in AFASPEC_TRAFFIC_KEY it is encrypted.

    [bold]Examples[/]

      afaspec collect http://10.0.0.7:8000 --out traffic --sample-rate 0.05

      afaspec collect http://10.0.0.7:8000 --redact '[\w.+-]+@[\w.-]+' --keep-days 7
    """
    from afaspec.cli.console import note
    from serving.traffic.proxy import collect_before

    note(f"http://{config.host}:{config.port} passes on to {config.url}; rows go to {config.out}")
    collect_before(
        config.url,
        config.into(config.out),
        config.host,
        config.port,
        allow_others=config.allow_others,
    )
