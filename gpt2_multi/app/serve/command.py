"""The command `serve`."""

from __future__ import annotations

import hashlib
import importlib.util
import ipaddress
import json
import socket
import threading
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2_multi import __version__
from gpt2_multi.app import backends
from gpt2_multi.app.terminal import BACKEND, DEVICE, DTYPE, tokenizer_of
from gpt2_multi.errors import GPT2Error
from gpt2_multi.files.hub import DEMO, resolve
from gpt2_multi.files.progress import busy

if TYPE_CHECKING:
    from gpt2_multi.app.serve.completions import Served

NEEDED = ("starlette", "uvicorn")
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # addresses that listen, and where that is reached from here
PROBED = {"0.0.0.0": "192.0.2.1", "::": "2001:db8::1"}  # addresses of documentation, far from here
READY = """A page to write in: {address}/{elsewhere}

curl {address}/v1/completions -H 'Content-Type: application/json'{key} \\
  -d '{{"prompt": "Once upon a time", "max_tokens": 40}}'"""
ELSEWHERE = """
From other machines: http://{host}:{port}/#key=KEY, with the API key for KEY"""
KEY = ' -H "Authorization: Bearer $GPT2_MULTI_API_KEY"'


@click.command()
@click.argument("model", default=str(DEMO), metavar="[MODEL]")
@BACKEND
@DEVICE
@DTYPE
@click.option("--quantize", type=click.Choice(["int8"]), help="Multiply integers: less memory, and on a CPU faster.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen. Others need --api-key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--api-key", envvar="GPT2_MULTI_API_KEY", show_envvar=True, help="What each request has to bring.")
@click.option("--slots", type=click.IntRange(1, 1024), default=32, show_default=True, help="Texts made at once.")
@click.option("--queue", type=click.IntRange(1, 65536), default=256, show_default=True, help="Texts that may wait.")
@click.option("--timeout", type=click.IntRange(1), default=300, show_default=True, help="Seconds a request may take.")
def serve(model: str, host: str, port: int, api_key: str | None, **options: Any) -> None:
    """Serve MODEL by OpenAI's API, with a page to write in.

    MODEL is "demo", which is the default, a folder, or a name on the Hugging Face hub such as gpt2. Texts that are
    asked for at the same time are made at the same time. Ctrl-C, or SIGTERM, lets the requests that run finish and
    refuses others; a second one ends the server at once.
    """
    _check_installed()
    _check_key(host, api_key)
    row = backends.resolve(options.pop("backend"))
    plan = Plan(model, row, row.device(options.pop("device")), **options)
    with closing(_listener(host, port)) as listener:
        _run(plan, listener, api_key)


@dataclass(frozen=True)
class Plan:
    """What is served, and how."""

    model: str
    backend: backends.Backend
    device: str
    dtype: str
    quantize: str | None
    slots: int
    queue: int
    timeout: int

    def load(self) -> Served:
        """The model, whose engine has begun."""
        from gpt2_multi.app.serve.completions import Served
        from gpt2_multi.app.serve.engine import Engine

        folder = resolve(self.model)
        tokenizer = tokenizer_of(str(folder))
        model = self.backend.load(folder, self.device, self.dtype, quantization=self.quantize)
        engine = Engine(model, tokenizer, slots=self.slots, waiting=self.queue).start()
        own = model.config, model.generation_config, self._fingerprint(folder)
        return Served(self.name, engine, tokenizer, *own, capacity=self.queue, timeout=self.timeout)

    @property
    def name(self) -> str:
        """By what name a request asks for the model: as it was given here, a folder by its last part."""
        path = Path(self.model)
        return path.resolve().name if path.is_dir() else self.model

    def _fingerprint(self, folder: Path) -> str:
        """What changes where the same request may be given another text."""
        sizes = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())
        backend = backends.name_of(self.backend)
        how = [__version__, backend, backends.version(backend), self.device, self.dtype, self.quantize, sizes]
        return f"fp_{hashlib.sha256(json.dumps(how).encode()).hexdigest()[:10]}"


def _run(plan: Plan, listener: socket.socket, key: str | None) -> None:
    """Serve until told to end; what goes wrong while the model is loaded ends it too."""
    from gpt2_multi.app.serve.api import Service, application
    from gpt2_multi.app.serve.server import Server

    service = Service()
    server = Server(application(service, key), service, plan.slots + plan.queue)
    failures: list[Exception] = []

    def load() -> None:
        try:
            with busy("Loading"):
                served = plan.load()
            service.ready(served)
            click.echo(READY.format(address=_address(listener), elsewhere=_elsewhere(listener), key=KEY if key else ""))
        except Exception as error:
            failures.append(error)
            server.should_exit = True

    threading.Thread(target=load, daemon=True).start()  # meanwhile /health says that it loads
    server.run(sockets=[listener])
    if service.served is not None:
        service.served.engine.stop(drain=False)
    if failures:
        raise failures[0]


def _check_installed() -> None:
    if missing := [name for name in NEEDED if not importlib.util.find_spec(name)]:
        raise GPT2Error(f'serve needs {" and ".join(missing)}: pip install "gpt2-multi[serve]"')


def _check_key(host: str, key: str | None) -> None:
    """A server that others reach asks for a key, which a header can bring."""
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip() and key):
        raise click.UsageError("--api-key: expected printable ASCII without spaces around it; choose another")
    if key is None and not _is_local(host):
        raise click.UsageError(f"--host {host} is reached from elsewhere; give an --api-key, or GPT2_MULTI_API_KEY")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # without the address, which comes first here
        raise click.ClickException(f"--host {host} --port {port}: {reason}; choose another, such as --port 0") from None


def _address(listener: socket.socket) -> str:
    """How a server is reached from this machine."""
    host, port = listener.getsockname()[:2]
    host = ANYWHERE.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _elsewhere(listener: socket.socket) -> str:
    """How it is reached from other machines, as far as this one knows: a link that brings the key to the page."""
    host, port = listener.getsockname()[:2]
    if _is_local(host):
        return ""
    if host in ANYWHERE:
        try:
            with socket.socket(listener.family, socket.SOCK_DGRAM) as probe:
                probe.connect((PROBED[host], 9))  # which sends nothing, and finds the address that would
                host = probe.getsockname()[0]
        except OSError:  # no network
            return ""
    return ELSEWHERE.format(host=f"[{host}]" if ":" in host else host, port=port)
